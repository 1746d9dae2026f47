"""Processes on gloo that share the experts train as one process does that has them all."""

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._inductor import cpu_vec_isa
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.utils import run_and_get_code
from torch.distributed.checkpoint import load

from momoe_titan.model.model import MomoeBlock, blocks_of
from momoe_titan.model.parallel import gathered, parallelize
from momoe_titan.model.parallel.gathered import transfer_sizes
from tests.support import ep_worker
from tests.support.shared import made_once
from tests.support.tiny import (
    assert_same_run,
    batch,
    build,
    job_config,
    loss_of,
    moes,
    optimizers_for,
    tiny_args,
)

DEFAULTS = {
    "replicate": 1,
    "ep": 2,
    "mode": "none",
    "compile": False,
    "param_dtype": "float32",
    "backend": "torch",
    "save_percent": 0,
    "num_experts": 6,
    "starve": False,
    "dispatch": "all_ranks",
    "keeps": False,
    "peers": False,
    "room": 0,
    "save": "",
}
SHEDDING = ("none", "full", "selective")
CHOSEN = {"dispatch": "chosen_ranks"}
SHED = {"starve": True, "save_percent": 100, **CHOSEN}
TWO = {
    "ep": {},
    "chosen": CHOSEN,
    "save 50": {"save_percent": 50},
    "save 100": {"save_percent": 100},
    "full": {"mode": "full"},
    "selective": {"mode": "selective"},
    "bfloat16": {"param_dtype": "bfloat16"},
    "peers": {"peers": True, "save_percent": 50, "keeps": True},
    "peers, recomputed": {"peers": True, "mode": "full"},
    "peers, compiled": {"peers": True, "compile": True},
    "peers, triton": {"peers": True, "backend": "triton", "save_percent": 50},
    "left out": {"keeps": True},
    "left out, bfloat16": {"param_dtype": "bfloat16", "keeps": True},
    "many experts": {"param_dtype": "bfloat16", "num_experts": 520},
    "many experts chosen": {"param_dtype": "bfloat16", "num_experts": 520, **CHOSEN},
    "compiled": {"compile": True, "mode": "full"},
    "compiled chosen": {"compile": True, "mode": "full", **CHOSEN},
    "compiled parts": {"compile": True},
    "triton": {"backend": "triton"},
    "starved": {"starve": True},
    "starved chosen": {"starve": True, **CHOSEN},
    "starved saved": {"starve": True, "save_percent": 100},
    **{f"kept {mode}": {**SHED, "mode": mode} for mode in SHEDDING},
    **{f"shed {mode}": {**SHED, "mode": mode, "room": 3.5} for mode in SHEDDING},
}
SAVED = ("ep", "left out")
FOUR = {
    "fsdp": {"num_experts": 8},
    "hsdp": {"num_experts": 8, "replicate": 2, "shard": 2, **CHOSEN, "keeps": True},
    "one expert each": {"num_experts": 4, "ep": 4},
    "starved": {"num_experts": 8, "ep": 4, "starve": True},
    "starved chosen": {"num_experts": 8, "ep": 4, "starve": True, **CHOSEN},
    "more ranks than experts": {"num_experts": 2},
    "peers": {"num_experts": 8, "ep": 4, "peers": True, "keeps": True},
}


def train_all(folder: Path) -> None:
    for name in SAVED:
        TWO[name]["save"] = str(folder / name)
    settings = {2: TWO, 4: FOUR}
    runs = {n: [{**DEFAULTS, "shard": n, **run} for run in of_n.values()] for n, of_n in settings.items()}
    assert ep_worker.train(folder, runs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the results of all runs are, and the checkpoints of `SAVED`."""
    return made_once(tmp_path_factory, "expert parallel", train_all)


@pytest.fixture(scope="module")
def two(folder):
    return dict(zip(TWO, torch.load(folder / "2.pt"), strict=True))


@pytest.fixture(scope="module")
def four(folder):
    return dict(zip(FOUR, torch.load(folder / "4.pt"), strict=True))


@functools.cache
def one(num_experts=6, ep=0):
    """The same run in one process; ep as where the last of so many ranks is starved."""
    settings = {**DEFAULTS, "num_experts": num_experts}
    model = build(ep_worker.args_for(settings))
    if ep:
        ep_worker.starve(model, num_experts // ep)
    optimizers = optimizers_for(model, implementation="fused")
    losses, counts, norms, grads = [], [], [], {}
    for step in range(ep_worker.STEPS):
        loss = loss_of(model, *batch(step))
        loss.backward()
        losses.append(loss.detach())
        grads = grads or {n: p.grad.clone() for n, p in model.named_parameters()}
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizers.step()
        optimizers.zero_grad()
        counts.append(optimizers.load_balancer.counts_LE)
    return {
        "losses": torch.stack(losses),
        "norms": torch.stack(norms),
        "counts": torch.stack(counts),
        "bias": torch.stack([moe.expert_bias for moe in moes(model)]),
        "grads": grads,
        "weights": {n: p.detach() for n, p in model.named_parameters()},
    }


def assert_like_one(run, expected):
    """Counts and biases to the bit; losses and gradients as float32 sums of another order allow."""
    assert_same_run(run, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(run["norms"], expected["norms"], rtol=1e-4, atol=0)
    for kind in ("grads", "weights"):
        assert run[kind].keys() == expected[kind].keys()
    for name, want in expected["grads"].items():
        error = (run["grads"][name] - want).norm() / want.norm()
        assert error < 1e-5, (name, error)


@pytest.mark.parametrize("name", ["ep", "chosen"])
def test_two_ranks(two, name):
    assert_like_one(two[name], one())
    assert one()["bias"][0].any() and not one()["bias"][1].any()


@pytest.mark.parametrize("name", ["fsdp", "hsdp"])
def test_four_ranks_in_two_copies(four, name):
    assert_like_one(four[name], one(8))


def test_one_expert_each(four):
    assert_like_one(four["one expert each"], one(4))


def test_more_ranks_than_experts(four):
    assert_like_one(four["more ranks than experts"], one(2))


@pytest.mark.parametrize("save_percent", [50, 100])
def test_save_percent_changes_nothing(two, save_percent):
    # but for what a CPU's matrix product makes of another number of rows
    assert_like_one(two[f"save {save_percent}"], two["ep"])


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_activation_checkpointing_changes_nothing(two, mode):
    assert_same_run(two[mode], two["ep"])
    for kind in ("grads", "weights"):
        for name, want in two["ep"][kind].items():
            assert torch.equal(two[mode][kind][name], want), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is off")
@pytest.mark.parametrize("name", ["triton", "peers, triton"])
def test_triton_kernels(two, name):
    assert_same_run(two[name], two["ep"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["peers", "peers, recomputed", "peers, compiled", "peers, triton"])
def test_gpus_that_read_each_other(two, name):
    """Results leave from inside of the op of the experts. A rank reads as late as it may."""
    assert_like_one(two[name], two["ep"])
    dim, chosen = 24, 2
    staged = transfer_sizes(8 * 16 // 2, dim * 4, chosen, ranks=2)
    assert two[name]["staged"] == {16, *staged}


def test_four_gpus_that_read_each_other(four):
    assert_like_one(four["peers"], one(8))


@pytest.mark.parametrize("name", ["compiled", "compiled chosen", "compiled parts"])
def test_compiled(two, name):
    assert_like_one(two[name], two["ep"])


def test_bfloat16_mixed_precision(two):
    torch.testing.assert_close(two["bfloat16"]["losses"], one()["losses"], rtol=0.02, atol=0)


@pytest.mark.parametrize("name, like", [("left out", "ep"), ("left out, bfloat16", "bfloat16")])
def test_experts_that_fsdp_leaves_out(two, name, like):
    """Each rank has its own, which FSDP would neither gather nor reduce."""
    assert_same_run(two[name], two[like])
    for kind in ("grads", "weights"):
        for parameter, want in two[like][kind].items():
            assert torch.equal(two[name][kind][parameter], want), parameter


@pytest.mark.parametrize("name", ["many experts", "many experts chosen"])
def test_ids_above_256_travel_exactly(two, name):
    """bfloat16 holds no odd number above 256: tokens would go to a neighbour of their expert."""
    counts, want = two[name]["counts"][0], one(520)["counts"][0]
    assert counts[:, 257::2].any()
    # the router computes with bfloat16 inputs here: nearly all choices are those of float32
    assert (counts - want).abs().sum() < 0.3 * want.sum()


@pytest.mark.parametrize("name", ["starved", "starved chosen", "starved saved"])
@pytest.mark.parametrize("ranks, num_experts", [(2, 6), (4, 8)])
def test_a_rank_that_receives_nothing(two, four, ranks, num_experts, name):
    """The first ranks then get up to P times their even share; "saved" has room for that share of z alone."""
    run = {2: two, 4: four}[ranks].get(name)
    if run is None:
        pytest.skip("shown by two ranks")
    idle = num_experts // ranks
    assert (run["counts"][..., -idle:] == 0).all() and (run["counts"].sum(-1) == 8 * 16 * 2).all()
    for name, grad in run["grads"].items():
        if ".experts." in name:
            assert (grad[-idle:] == 0).all() and grad[:-idle].any()
    assert_like_one(run, one(num_experts, ep=ranks))


@pytest.mark.parametrize("mode", SHEDDING)
def test_shedding_changes_nothing(two, mode):
    """Rank 0 gets all tokens, twice what it has room for: it sheds the first layer's z, all that is held by then."""
    shed, kept = two[f"shed {mode}"], two[f"kept {mode}"]
    assert_same_run(shed, kept)
    for kind in ("grads", "weights"):
        for name, want in kept[kind].items():
            assert torch.equal(shed[kind][name], want), name
    fair_z = 8 * 16 // 2 * 2 * 2 * 10 * 4
    # (layer, bytes of its z before the last backward); rank 1 has no rows and so no z
    assert shed["shed"] == [(2 * fair_z, [(0, 0), (1, 2 * fair_z)]), (0, [])]


@pytest.mark.parametrize("name", SAVED)
def test_checkpoint_loads_into_one_process(two, folder, name):
    model = build(tiny_args(moe={"num_experts": 6}), seed=1)
    state = model.state_dict()
    load(state, checkpoint_id=str(folder / name))
    model.load_state_dict(state)
    for parameter, weight in model.named_parameters():
        assert torch.equal(weight, two[name]["weights"][parameter]), parameter
    assert torch.equal(torch.stack([moe.expert_bias for moe in moes(model)]), two[name]["bias"])


REFUSED = {
    "must divide the number of experts": {"expert_parallel_degree": 3},
    "expert_parallel_degree is 8, must divide": {"expert_parallel_degree": 8},
    "expert_parallel_degree is 0": {"expert_parallel_degree": 0},
    "expert_parallel_comm_backend is 'deepep'": {"expert_parallel_comm_backend": "deepep"},
    "must be 1 without FSDP": {"data_parallel_shard_degree": 1},
    "must divide the 3 ranks": {"data_parallel_shard_degree": 3},
    "8 must divide all of": {"data_parallel_shard_degree": 16},
    "expert_tensor_parallel_degree is 2, must be 1 or": {"expert_tensor_parallel_degree": 2},
    "pipeline_parallel_expert_parallel_overlap is True": {
        "pipeline_parallel_degree": 2,
        "pipeline_parallel_schedule": "DualPipeV",
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused_when_the_configuration_is_read(message):
    args = tiny_args(moe={"num_experts": 4})
    config = job_config()
    fields = {"expert_parallel_degree": 2, "data_parallel_shard_degree": 4, **REFUSED[message]}
    for name, value in fields.items():
        setattr(config.parallelism, name, value)
    with pytest.raises(ValueError, match=message):
        args.update_from_config(config)


def test_expert_tp_without_ep_has_no_effect(caplog):
    config = job_config()
    config.parallelism.expert_tensor_parallel_degree = 2
    tiny_args().update_from_config(config)
    assert "expert_tensor_parallel_degree = 2 has no effect" in caplog.text


def test_degree_left_to_the_number_of_processes(monkeypatch):
    config = job_config()
    config.parallelism.expert_parallel_degree = 4
    args = tiny_args(moe={"num_experts": 4})
    args.update_from_config(config)
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(ValueError, match="must divide the 6 ranks"):
        args.update_from_config(config)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_stock_layer_is_refused_on_a_cpu():
    config = job_config()
    config.parallelism.expert_parallel_degree = 2
    with pytest.raises(ValueError, match="must be 1 for momoe.backend = 'torchtitan' on a CPU"):
        tiny_args(moe={"num_experts": 4}, backend="torchtitan").update_from_config(config)


class Unchanged(torch.nn.Module):
    def forward(self, x_BLD, *_):
        return x_BLD


@pytest.mark.parametrize("in_two_parts", [True, False])
def test_every_block_is_compiled(in_two_parts, monkeypatch):
    """Those that gather tokens in two parts, where that is allowed; of all others what surrounds the experts."""
    model, cut = build(tiny_args()), []
    monkeypatch.setattr(MomoeBlock, "compile_parts", lambda block, backend: cut.append(block))
    blocks = blocks_of(model)
    assert [block.moe_enabled for block in blocks] == [False, True, True]
    for block in blocks[1:]:
        block.moe.gatherer = SimpleNamespace()
    parallelize._compile_around_experts(model, job_config(), in_two_parts)
    assert cut == (blocks[1:] if in_two_parts else [])
    compiled = [block.attention._compiled_call_impl is not None for block in blocks]
    assert compiled == [True, *[not in_two_parts] * 2]


def test_a_compiled_block_sends_before_it_works_on(monkeypatch):
    """Inductor would start transfers behind all work that they are to be hidden behind, to save memory.

    Only the order of what it calls is looked at: a C++ compiler would take half a minute for its kernels.
    """
    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", lambda self, argument_types, source: lambda *args: None)
    monkeypatch.setattr(cpu_vec_isa, "valid_vec_isa_list", list)  # which is found out by compiling
    peers = SimpleNamespace(gather=lambda rows, first: [t.clone() for t in rows])
    monkeypatch.setattr(gathered, "connect", lambda group: None)
    monkeypatch.setattr(gathered, "peers_of", lambda name: peers)
    block = MomoeBlock(1, tiny_args(moe={"num_shared_experts": 1}))
    group: Any = SimpleNamespace(rank=lambda: 0, size=lambda: 1, group_name="of a test")
    block.moe.gatherer = gathered.TokenGatherer(group, block.moe.num_experts, "torch")
    block.attention = Unchanged()
    block.compile_parts("inductor")
    assert block.compiled_parts is not None
    x_TD, y_MD = (torch.randn(8, 24, requires_grad=True) for _ in range(2))

    def before_experts():
        return block.compiled_parts[0](x_TD.view(2, 4, 24), None, None, None)

    def after_experts():
        block.compiled_parts[1](x_TD.view(2, 4, 24), x_TD, y_MD).sum().backward()

    with torch._inductor.config.patch(force_disable_caches=True):
        _, (code,) = run_and_get_code(before_experts)
        _, (forward, backward) = run_and_get_code(after_experts)
    router = code[code.index("gather_tokens.default(") :]
    assert "mm(" in router[: router.index("gather_choice.default(")]
    assert forward.index("mm(") < forward.index("sum_tokens.default(")
    assert backward.index("gather_tokens.default(") < backward.index("mm(")
