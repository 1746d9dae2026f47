"""The balance benchmark on a CPU: a few steps of the debug model on made-up text."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import balance


def test_arms():
    assert balance.parse_arm("sign_0.01") == ("sign_0.01", {"rule": "sign", "rate": 0.01})
    name, arm = balance.parse_arm("mine:rule=quantile,average=0.25,warmup=5")
    assert (name, arm) == ("mine", {"rule": "quantile", "average": 0.25, "warmup": 5})
    for wrong in ("nothing", "mine:speed=3"):
        with pytest.raises(ValueError, match="is none of"):
            balance.parse_arm(wrong)
    for arm in (balance.ARMS | balance.OTHER_ARMS).values():
        assert arm.keys() <= balance.DEFAULTS.keys()
    options = balance.parse_options(["--seeds", "0", "1", "--arms", "none", "mine:seed=2,steps=9"])
    assert [(name, seed) for name, _, seed in balance.jobs_of(options)] == [("none", 0), ("mine", 2), ("none", 1)]


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_schedule(decay):
    factors = [balance.lr_factor(step, 100, 10, decay) for step in range(1, 101)]
    assert factors[4] == 0.5 and factors[9] == 1.0 and factors[-1] == pytest.approx(0.1)
    assert factors[9:] == sorted(factors[9:], reverse=True)


def test_text_is_split_by_file(tmp_path):
    train, val = balance.text_files(3e6)
    assert train and val and not set(train) & set(val)


def test_runs_share_weights_and_batches(tmp_path):
    rng = np.random.default_rng(0)
    for name, tokens in (("train", 20_000), ("val", 5_000)):
        rng.integers(2048, size=tokens, dtype=np.uint16).tofile(tmp_path / f"{name}.bin")
    out = tmp_path / "out.json"
    arguments = ["--flavor", "debugmodel", "--steps", "2", "--batch", "2", "--seq_len", "64", "--floor"]
    arguments += ["--floor_rounds", "1", "--val_tokens", "512", "--data", str(tmp_path), "--out", str(out)]
    arguments += ["--arms", "quantile", "sign_0.001_sequence_1e-4", "none_centred", "quantile_gate_lr_0.1"]
    arguments += ["by_share:rule=quantile,follow=2"]
    balance.main(arguments)
    runs = {run["arm"]: run for run in json.loads(out.read_text())["runs"]}
    assert len(runs) == 5
    first = {name: run["loss"][0] for name, run in runs.items()}
    assert first["quantile"] == first["sign_0.001_sequence_1e-4"] == first["quantile_gate_lr_0.1"]
    assert {"other_half", "other_half_batch", "other_files"} <= runs["quantile"]["floor"].keys()
    for measured in ("loss", "maxvio", "bias_max"):  # in the warm-up the share is 1
        assert runs["by_share"][measured] == runs["quantile"][measured]
    for run in runs.values():
        assert len(run["maxvio"]) == 2 and run["val_loss"] > 0 and run["val_tokens"] == 512
        assert 0 < run["entropy"]["2"] <= 1


def test_floor_of_files_has_halves_of_other_windows(monkeypatch, tmp_path):
    for name in ("train", "val"):
        (np.arange(5_000) % 2048).astype(np.uint16).tofile(tmp_path / f"{name}.bin")
    options = balance.parse_options(
        ["--flavor", "debugmodel", "--batch", "2", "--seq_len", "64", "--floor_rounds", "1"]
    )
    options.data, options.val_tokens = tmp_path, 1024
    run = balance.Run(options, "quantile", balance.ARMS["quantile"], 0, torch.device("cpu"))
    order, seen = run.val_batches.order.copy(), []
    count = run._count_validation

    def watched(batches):
        rows = [run.val_batches.order[i * 2 : i * 2 + 2].tolist() for i in batches]
        seen.append({row for pair in rows for row in pair})
        return count(batches)

    monkeypatch.setattr(run, "_count_validation", watched)
    run._floor()
    half, files = seen[1:3], seen[4:6]
    assert max(files[0]) < min(files[1]) and files[0] | files[1] == half[0] | half[1]
    assert max(half[0]) > min(half[1])
    assert (run.val_batches.order == order).all()


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_follow_by_share(share):
    bias, gained = torch.tensor([0.5, -0.5]), torch.tensor([0.2, -0.2])
    layer = SimpleNamespace(expert_bias=bias)
    balancer = SimpleNamespace(
        solved=[layer], average_factor=lambda: share, follow_gates=lambda: layer.expert_bias.sub_(gained)
    )
    balance.follow_by_share(balancer)
    torch.testing.assert_close(bias, torch.tensor([0.5, -0.5]) - share * gained)
