"""Every parallelism, and pairs of them, trains as one process does.

Under TorchTitan's trainer on gloo, from the same weights on the same batches, in float32. The model computes the loss,
from the logits of a few tokens at a time, but where a run's name has logits in it.
Losses and gradient norms of three optimizer steps agree within a relative 1e-5, the last step's
gradient of each parameter within 1e-4 of its norm; counts of tokens, biases (but those of quantile
balancing, within 1e-6) and metrics exactly. A
checkpoint of one process goes on on two, tensor-parallel, and from there on one.
"""

import json
from pathlib import Path

import pytest
import torch

from tests.support import commands
from tests.support.shared import made_once

pytestmark = pytest.mark.slow


def mesh(**degrees) -> dict:
    names = {"replicate": "data_parallel_replicate", "shard": "data_parallel_shard"}
    names |= {"tp": "tensor_parallel", "pp": "pipeline_parallel", "cp": "context_parallel"}
    names |= {"ep": "expert_parallel", "etp": "expert_tensor_parallel"}
    degrees = {"shard": 1, **degrees}
    settings = {f"parallelism.{names[k]}_degree": v for k, v in degrees.items()}
    if "pp" in degrees:
        settings["parallelism.pipeline_parallel_microbatch_size"] = 2  # 4 microbatches
    data_ranks = degrees.get("replicate", 1) * degrees["shard"]
    return {**settings, "training.local_batch_size": 8 // data_ranks}


ACCUMULATED = {"training.local_batch_size": 2}
WHOLE_LOGITS = {"momoe.loss_chunk_mib": 0}
LOCAL_LOSS = {
    **WHOLE_LOGITS,
    "parallelism.disable_loss_parallel": True,
    "activation_checkpoint.mode": "full",
    **ACCUMULATED,
}
COMPILED = {
    "compile.enable": True,
    "compile.backend": "aot_eager",
    "compile.components": ["model"],
}
STOCK = {"momoe.backend": "torchtitan"}
THREE_EXPERTS = {"model.flavor": "3 experts"}  # fewer than ranks
SIX_EXPERTS = {"model.flavor": "6 experts"}
EIGHT_EXPERTS = {"model.flavor": "8 experts"}
RECOMPUTED = {"activation_checkpoint.mode": "full"}
QK_NORM = {"model.flavor": "normalised"}
TIED = {"model.flavor": "tied"}
# the first stage has no MoE layer
DENSE_STAGE = {
    "parallelism.module_fqns_per_model_part": [
        ["tok_embeddings", "layers.0"],
        ["layers.1", "layers.2", "norm", "output"],
    ],
    **ACCUMULATED,
    "parallelism.pipeline_parallel_microbatch_size": 1,
}
INTERLEAVED = {
    "parallelism.pipeline_parallel_schedule": "Interleaved1F1B",
    "parallelism.pipeline_parallel_layers_per_stage": 1,
    "parallelism.pipeline_parallel_first_stage_less_layers": 0,
}
QUANTILE = {
    "momoe.load_balance_rule": "quantile",
    "momoe.aux_loss_weight": 0.5,
    "momoe.aux_loss_scope": "sequence",
    "momoe.router_z_loss_weight": 0.1,
}
BY_QUANTILE = {
    **SIX_EXPERTS,
    "momoe.load_balance_rule": "quantile",
    "momoe.aux_loss_weight": 0.1,
    "momoe.router_z_loss_weight": 0.1,
}
DOCUMENTS = {"momoe.document_mask": True}
VALIDATED = {"validation.enable": True, "validation.seq_len": 16, "validation.local_batch_size": 8}
SAVED = {"checkpoint.enable": True}
ONE_PROCESS = {
    "one": mesh() | VALIDATED,
    "whole logits, one": mesh() | WHOLE_LOGITS,
    "one, stock": mesh() | STOCK,
    "one, 3 experts": mesh() | THREE_EXPERTS,
    "one, 6 experts": mesh() | SIX_EXPERTS,
    "one, 8 experts": mesh() | EIGHT_EXPERTS,
    "one, QK-norm": mesh() | QK_NORM,
    "one, tied": mesh() | TIED,
    "one, quantile": mesh() | QUANTILE,
    "one, 6 experts by quantile": mesh() | BY_QUANTILE,
    "one, documents": mesh() | DOCUMENTS | VALIDATED,
}
TWO_PROCESSES = {
    "fsdp, accumulated": mesh(shard=2) | ACCUMULATED | VALIDATED,
    "ddp, accumulated": mesh(replicate=2) | ACCUMULATED,
    "tp": mesh(tp=2) | VALIDATED,
    "tp, stock": mesh(tp=2) | STOCK,
    "tp, compiled": mesh(tp=2) | COMPILED,
    "tp, QK-norm": mesh(tp=2) | QK_NORM,
    "tp, tied": mesh(tp=2) | TIED,
    "tp, shared logits": mesh(tp=2) | WHOLE_LOGITS,
    "tp, whole logits, accumulated, recomputed": mesh(tp=2) | LOCAL_LOSS,
    "pp, a stage without MoE, accumulated": mesh(pp=2) | DENSE_STAGE,
    "pp, interleaved": mesh(pp=2) | INTERLEAVED | VALIDATED,
    "tp, quantile": mesh(tp=2) | QUANTILE,
    "tp, whole logits, accumulated, recomputed, quantile": mesh(tp=2) | LOCAL_LOSS | QUANTILE,
    "pp, interleaved, quantile": mesh(pp=2) | INTERLEAVED | QUANTILE,
    "fsdp, compiled, documents": mesh(shard=2) | COMPILED | DOCUMENTS,
    "tp, recomputed, accumulated, documents": mesh(tp=2) | RECOMPUTED | ACCUMULATED | DOCUMENTS,
    "pp, interleaved, documents": mesh(pp=2) | INTERLEAVED | DOCUMENTS | VALIDATED,
}
FOUR_PROCESSES = {
    "fsdp, 3 experts": mesh(shard=4) | THREE_EXPERTS,
    "hsdp": mesh(replicate=2, shard=2) | VALIDATED,
    "tp + fsdp": mesh(tp=2, shard=2),
    "tp + fsdp, tied": mesh(tp=2, shard=2) | TIED,
    "pp + fsdp": mesh(pp=2, shard=2),
    "pp + tp": mesh(pp=2, tp=2),
    "cp + fsdp": mesh(cp=2, shard=2) | VALIDATED,
    "cp + tp": mesh(cp=2, tp=2),
    "cp + pp": mesh(cp=2, pp=2),
    "ep + pp, 6 experts": mesh(ep=2, shard=2, pp=2) | SIX_EXPERTS,
    "ep + cp, 6 experts by quantile": mesh(ep=2, shard=2, cp=2) | BY_QUANTILE,
    "ep that borrows tp, 6 experts by quantile": mesh(ep=2, shard=2, tp=2) | BY_QUANTILE,
    "ep that borrows tp, recomputed, 8 experts": mesh(ep=4, shard=2, tp=2) | RECOMPUTED | EIGHT_EXPERTS,
    "ep + expert tp, 6 experts": mesh(ep=2, shard=2, tp=2, etp=2) | SIX_EXPERTS,
}
NARROW = {"training.mixed_precision_param": "bfloat16", "optimizer.implementation": "fused"}
BFLOAT16 = {
    "fsdp, bfloat16": mesh(shard=2) | NARROW,
    "tp, bfloat16": mesh(tp=2) | NARROW,
    "pp, interleaved, bfloat16": mesh(pp=2) | INTERLEAVED | NARROW | VALIDATED,
}
KEPT = {"parallelism.fsdp_reshard_after_forward": "never"}  # by which FSDP leaves the experts out
NARROW_EXPERTS = mesh(shard=2, ep=2) | NARROW | EIGHT_EXPERTS
EXPERTS_ALONE = {
    "ep": NARROW_EXPERTS,
    "ep, left out": NARROW_EXPERTS | KEPT | VALIDATED,
    "ep, accumulated": NARROW_EXPERTS | ACCUMULATED,
    "ep, left out, accumulated": NARROW_EXPERTS | ACCUMULATED | KEPT,
}
RUNS = [  # (processes, name, settings), one after another
    *((1, *run) for run in ONE_PROCESS.items()),
    (1, "saved by one until step 1", mesh() | SAVED | {"stop": 1}),
    *((2, *run) for run in TWO_PROCESSES.items()),
    *((2, *run) for run in BFLOAT16.items()),
    *((2, *run) for run in EXPERTS_ALONE.items()),
    (2, "resumed by tp until step 2", mesh(tp=2) | SAVED | {"stop": 2}),
    *((4, *run) for run in FOUR_PROCESSES.items()),
    (1, "resumed by one", mesh() | SAVED),
]


def train_all(folder: Path) -> None:
    runs = json.dumps([(world, settings) for world, _, settings in RUNS])
    done = commands.run("-m", "tests.support.parallel_worker", str(folder), runs)
    errors = "\n".join(line for line in done.stderr.splitlines() if "redistributing" not in line)
    assert done.returncode == 0, f"exit code {done.returncode}\n{errors[-20000:]}"


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    folder = made_once(tmp_path_factory, "parallel", train_all)
    return {name: torch.load(folder / f"{i}.pt") for i, (_, name, _) in enumerate(RUNS)}


@pytest.mark.parametrize("name", [name for _, name, _ in RUNS if name not in ("one", *BFLOAT16, *EXPERTS_ALONE)])
def test_trains_as_one_process_does(results, name):
    *_, variant = name.rpartition(", ")
    run, one = results[name], results.get(f"one, {variant}", results["one"])
    for mine in map(dict, run["logged"]):
        expected = dict(one["logged"][mine["step"] - 1])
        if "validation_metrics/loss" not in mine:
            expected = {k: v for k, v in expected.items() if not k.startswith("validation_metrics")}
        # of a layout with expert-parallel ranks only
        assert mine.pop("moe/worst_ep_rank_load", 1) >= 1
        for field in [k for k in mine if "loss" in k or "norm" in k or "entropy" in k or "bias" in k]:
            atol = 1e-6 if "bias" in field and "quantile" in variant else None
            close = pytest.approx(expected.pop(field), rel=0 if "bias" in field else 1e-5, abs=atol or 0)
            assert mine.pop(field) == close, field
        assert mine == expected
    if "until" in name:
        return
    if "quantile" in variant:  # solved by floating-point numbers
        assert all(run["bias"][layer] == pytest.approx(bias, abs=1e-6) for layer, bias in one["bias"].items())
    else:
        assert run["bias"] == one["bias"]
    assert run["grads"].keys() == one["grads"].keys()
    for key, grad in run["grads"].items():
        expected = one["grads"][key]
        assert (grad - expected).norm() <= 1e-4 * expected.norm(), key


@pytest.mark.parametrize("name", [name for name in BFLOAT16 if not name.startswith("fsdp")])
def test_bfloat16_without_fsdp_is_that_of_fsdp(results, name):
    exact, fsdp, mine = (results[run]["logged"] for run in ("one", "fsdp, bfloat16", name))
    for step in range(3):
        for field, close in (("loss_metrics/global_avg_loss", 1e-4), ("grad_norm", 1e-3)):
            assert mine[step][field] == pytest.approx(fsdp[step][field], rel=close)
    first = "loss_metrics/global_avg_loss"
    assert mine[0][first] != pytest.approx(exact[0][first], rel=3e-5)


@pytest.mark.parametrize("name", ["ep", "ep, accumulated"])
def test_experts_that_fsdp_leaves_out_train_as_its_own(results, name):
    """They compute with narrow copies, and their gradients are added up in float32 over microbatches."""
    fsdp, left_out = results[name], results[name.replace("ep", "ep, left out")]
    for mine, want in zip(left_out["logged"], fsdp["logged"], strict=True):
        assert {k: v for k, v in mine.items() if k in want} == want
    assert left_out["bias"] == fsdp["bias"] and left_out["grads"].keys() == fsdp["grads"].keys()
    for key, grad in fsdp["grads"].items():
        assert torch.equal(left_out["grads"][key].float(), grad), key


def test_documents_change_the_loss(results):
    first, masked = (results[name]["logged"][0]["loss_metrics/global_avg_loss"] for name in ("one", "one, documents"))
    if not torch.__version__.startswith("2.11"):  # which draws weights with which the mean hardly changes
        assert abs(first - masked) > 1e-4
    whole, masked = (results[name]["grads"] for name in ("one", "one, documents"))
    for key in [key for key in whole if key.endswith(("wq.weight", "wk.weight"))]:
        assert (masked[key] - whole[key]).norm() > 0.1 * whole[key].norm(), key


def test_biases_move_where_balancing_is_on(results):
    for name in ("one", "one, quantile"):
        bias = results[name]["bias"]
        assert any(bias["1"]) and not any(bias["2"])
