"""The balance benchmark on a CPU: a few steps of the debug model on made-up text."""

import json

import numpy as np
import pytest

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
    balance.main(arguments)
    runs = {run["arm"]: run for run in json.loads(out.read_text())["runs"]}
    assert len(runs) == 4
    first = {name: run["loss"][0] for name, run in runs.items()}
    assert first["quantile"] == first["sign_0.001_sequence_1e-4"] == first["quantile_gate_lr_0.1"]
    assert "other_half" in runs["quantile"]["floor"]
    for run in runs.values():
        assert len(run["maxvio"]) == 2 and run["val_loss"] > 0 and run["val_tokens"] == 512
        assert 0 < run["entropy"]["2"] <= 1
