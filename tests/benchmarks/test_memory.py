import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks import memory as bench
from tests.support import commands

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "memory.py"


def row(moe, ac, percent, peak, speed):
    measured = {"peak_gib": peak, "reserved_gib": peak, "tokens_per_s": speed, "loss": 2.0}
    return {"moe": moe, "ac": ac, "save_percent": percent, **measured}


ROWS = [
    row("torchtitan", "none", None, 75.0, 150.0),
    row("torchtitan", "full", None, 30.0, 100.0),
    row("momoe", "none", 100.0, 57.0, 300.0),
    row("momoe", "full", 0.0, 25.0, 220.0),
    row("momoe", "full", 100.0, 31.0, 210.0),
    {"moe": "momoe", "ac": "none", "save_percent": 0.0, "error": "out of memory"},
]


def test_points_cover_the_product():
    points = bench.points(["none", "full"], ["full"], [0.0, 100.0])
    assert [(p["moe"], p["ac"], p["save_percent"]) for p in points] == [
        ("torchtitan", "full", None),
        ("momoe", "none", 0.0),
        ("momoe", "none", 100.0),
        ("momoe", "full", 0.0),
        ("momoe", "full", 100.0),
    ]


def test_front_has_no_beaten_row():
    assert bench.front(ROWS[:5]) == [ROWS[3], ROWS[2]]


def test_comparison_stays_within_the_memory_of_stock():
    lines = bench.against_stock(ROWS).splitlines()
    assert lines[0].startswith("within 75.00 GiB (torchtitan, none): 2.00x the tokens/s (save_percent 100")
    assert lines[1].startswith("within 30.00 GiB (torchtitan, full): 2.20x the tokens/s (save_percent 0, full")
    assert bench.against_stock(ROWS[1:2]).endswith("none of ours")


def test_table_says_what_did_not_fit():
    lines = bench.table(ROWS).splitlines()
    assert lines[2] == "| torchtitan | none | 150 | 75.00 | 75.00 |  | 2.00000 |"
    assert lines[-1] == "| save_percent 0 | none | out of memory |  |  |  |  |"


def test_plot_is_drawn_from_the_file(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    source, image = tmp_path / "memory.json", tmp_path / "memory.svg"
    source.write_text(json.dumps({"config": "a/b.toml", "device": "a GPU", "rows": ROWS}))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--from", str(source), "--plot", str(image)])
    bench.main()
    assert "</svg>" in image.read_text()


def test_moe_memory_is_what_a_forward_leaves_behind():
    """A counter in place of the allocator: a layer takes 5 bytes of every token and keeps 2."""

    class Layer(nn.Module):
        def forward(self, x):
            clock.append(clock[-1] + 2 * len(x) + x.nbytes)
            return x.sin()  # keeps x, so that the backward recomputes

    clock = [0]
    model, block = nn.Module(), nn.Module()
    block.moe_enabled, block.moe = True, Layer()
    model.layers = nn.ModuleDict({"0": block})
    x = torch.randn(7, requires_grad=True)
    with bench.MoeMemory(model, allocated=lambda: clock[-1]) as memory:
        checkpoint(block.moe, x, use_reentrant=False).sum().backward()
    assert len(clock) == 3  # recomputed, and counted once
    assert memory.held == 2 * 7
    block.moe(x)
    assert memory.held == 2 * 7


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the same command on a GPU needs no test")
def test_measures_on_a_cpu(tmp_path):
    out = tmp_path / "memory.json"
    command = [SCRIPT, "--config", "train_configs/debug_model.toml", "--out", str(out)]
    command += ["--modes", "none,full", "--stock_modes", "selective:op", "--save_percent", "50"]
    command += ["--warmup", "1", "--steps", "1"]
    command += ["--", "--training.local_batch_size", "1", "--training.seq_len", "64"]
    done = commands.run(*command)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(out.read_text())["rows"]
    assert [(r["moe"], r["ac"]) for r in rows] == [
        ("torchtitan", "selective:op"),
        ("momoe", "none"),
        ("momoe", "full"),
    ]
    assert all(r["tokens_per_s"] > 0 and r["peak_gib"] > 0 for r in rows)
    assert rows[1]["loss"] == rows[2]["loss"]
    assert abs(rows[0]["loss"] - rows[1]["loss"]) < 1e-4
