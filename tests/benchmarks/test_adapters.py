"""The script that measures other packages' models runs, with every variant of theirs and ours."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from benchmarks import adapters
from momoe_titan.kernels import momoe_mlp_ref
from tests.support import commands

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "adapters.py"
SMALL = ("tiny", "--device", "cpu", "--layers", "1", "--batch", "1", "--length", "32", "--rounds", "1")


@pytest.mark.parametrize("package, own", [("transformers", ["grouped_mm"]), ("torchtitan", [])])
def test_every_variant_is_a_row(package, own, tmp_path):
    """Of TorchTitan's own layer a CPU has no count of tokens."""
    run = commands.run(SCRIPT, package, *SMALL, "--out", tmp_path / "rows.jsonl")
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["variant"] for row in rows] == [*own, "momoe 0", "momoe 50", "momoe 100"]
    assert all(row["tokens"] == 32 and row["step ms"] > row["moe ms"] > 0 for row in rows)


def test_sonicmoe_gets_its_own_layout(monkeypatch):
    """As its documentation has it: w1 (2F, D, E) with gate above up, w2 (D, F, E), tokens in order."""
    enums, functional = ModuleType("sonicmoe.enums"), ModuleType("sonicmoe.functional")
    enums.ActivationType = SimpleNamespace(SWIGLU="swiglu")

    def layer(x, scores, tokens, ids, w1, b1, w2, b2, experts, stream, activation, inference, concat_layout):
        assert concat_layout and activation == "swiglu" and (b1, b2) == (None, None)
        assert torch.equal(tokens, torch.arange(len(x), dtype=torch.int32).repeat_interleave(len(ids) // len(x)))
        ids, scores = (t.view(len(x), -1) for t in (ids, scores))
        return momoe_mlp_ref(x, w1.permute(2, 1, 0), w2.permute(2, 1, 0), ids, scores, order="gate_up")

    functional.moe_general_routing_inputs = layer
    for module in (enums, functional):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    case = adapters.OfTransformers("tiny", 1, "cpu", torch.float32, sonicmoe=True)
    found = []
    for name in ("grouped_mm", "sonicmoe"):
        next(variant for variant in case.variants if variant.name == name).use()
        x = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        out, leaves = case.moe(x)
        found.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
