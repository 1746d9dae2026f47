"""Two processes on gloo train as one does: FSDP2 and DDP."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from momoe_titan.config.reading import read_job
from momoe_titan.config.section import Momoe
from momoe_titan.model.flavors import flavors
from momoe_titan.model.model import MomoeLlama, blocks_of
from momoe_titan.model.parallel import fsdp, parallelize
from momoe_titan.model.parallel.fsdp import _experts_placement, _set_collectives, apply_fsdp, leaves_experts
from momoe_titan.moe.balancing import bias_delta
from tests.support import commands
from tests.support.shared import made_once
from tests.support.tiny import ONE_PROCESS, assert_same_run, build, job_config, tiny_args, train


def launch(folder, processes, runs):
    """Train these runs, one after the other in the same processes; results.pt has what came of them."""
    defaults = {
        "replicate": 1,
        "shard": processes,
        "mode": "none",
        "param_dtype": "float32",
        "backend": "torch",
        "optimizer": "for-loop",
        "non_finite_on": -1,
    }
    out = folder / "results.pt"
    settings = json.dumps([{**defaults, **run} for run in runs.values()])
    done = commands.run("-m", "tests.support.fsdp_worker", str(out), str(processes), settings)
    assert done.returncode == 0, done.stderr[-4000:]


RUNS = {
    "fsdp": {},
    "fsdp, full": {"mode": "full"},
    "fsdp, selective": {"mode": "selective"},
    "fsdp, stock": {"backend": "torchtitan"},
    "fsdp, bfloat16": {"param_dtype": "bfloat16"},
    "fsdp, non-finite gradient": {"non_finite_on": 1, "optimizer": "fused"},
    "ddp, non-finite gradient": {**{"non_finite_on": 1, "optimizer": "fused", "replicate": 2, "shard": 1}},
    "fsdp, infinite element": {"infinite_on": 1, "optimizer": "fused"},
    "ddp, infinite element": {**{"infinite_on": 1, "optimizer": "fused", "replicate": 2, "shard": 1}},
    "ddp": {"replicate": 2, "shard": 1},
    "fsdp, quantile": {"rule": "quantile"},
    "fsdp, full, quantile": {"rule": "quantile", "mode": "full"},
    "fsdp, tied": {"tied": True},
    "fsdp, full, tied": {"tied": True, "mode": "full"},
    "ddp, tied": {"tied": True, "replicate": 2, "shard": 1},
    "ddp, quantile": {"rule": "quantile", "replicate": 2, "shard": 1},
}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = made_once(tmp_path_factory, "fsdp", lambda folder: launch(folder, 2, RUNS))
    return dict(zip(RUNS, torch.load(folder / "results.pt"), strict=True))


@pytest.fixture(scope="module")
def one():
    return train(build(tiny_args(load_balance_off_layers=[2])))


@pytest.mark.parametrize(
    "ranks, expert_ranks, along, warns",
    [(5, 1, None, False), (12, 1, (1, 1, 0), False), (7, 1, None, True), (2, 3, (1, 1, 0), False), (7, 3, None, True)],
)
def test_experts_are_divided_along_the_second_dimension_on_more_ranks(ranks, expert_ranks, along, warns, caplog):
    experts = 5 if expert_ranks == 1 else 3
    block = build(tiny_args(moe={"num_experts": experts}, moe_hidden_dim=12)).layers["1"]
    place = _experts_placement(block, ranks, expert_ranks)
    weights = block.moe.experts.w1, block.moe.experts.w2, block.attention.wq.weight
    assert (None if place is None else tuple(place(weight).dim for weight in weights)) == along
    _experts_placement(block, ranks, expert_ranks)  # of the next layer
    assert caplog.text.count("ranks leaves") == warns


NARROW = MixedPrecisionPolicy(torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    "kind, policy, ranks, says",
    [
        ("pp", NARROW, [0, 1], "pipeline parallelism"),
        ("ep", NARROW, [0, 1], "expert parallelism"),
        ("", MixedPrecisionPolicy(torch.float32, torch.float32), [0, 1], "mixed_precision_param"),
        ("", NARROW, [0, 2], "several hosts"),
        ("", NARROW, [0, 1], "no GPUs"),
        ("", NARROW, [0, 1], "more than"),
    ],
)
def test_a_job_that_cannot_have_copies_says_why(kind, policy, ranks, says, monkeypatch, caplog):
    mesh = SimpleNamespace(get_group=lambda: SimpleNamespace(group_name="of CPUs"), device_type="cuda")
    dims = SimpleNamespace(pp_enabled=kind == "pp", ep_enabled=kind == "ep", get_mesh=lambda name: mesh)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(fsdp.dist, "get_process_group_ranks", lambda group: ranks)
    connected = []
    monkeypatch.setattr(fsdp, "connect", connected.append)
    monkeypatch.setattr(fsdp, "MOST_COPIED", 8 * 2)
    group = nn.Linear(4, 2 if says != "more than" else 3, bias=False)
    group.set_custom_reduce_scatter = lambda collective: None
    caplog.set_level("INFO")
    _set_collectives([[], [group]], dims, policy, copies=False)
    assert not caplog.text
    _set_collectives([[], [group]], dims, policy, copies=True)
    (record,) = caplog.records
    assert record.getMessage().startswith("momoe.fsdp_copies has no effect") and says in record.getMessage()
    assert len(connected) == (says == "no GPUs")  # whether they can is found out where all else allows it


def _mesh(size):
    return SimpleNamespace(size=lambda: size, get_group=lambda: None, device_type="cpu")


def _dims(**fields):
    names = ("dp_replicate_enabled", "pp_enabled", "ep_enabled")
    return SimpleNamespace(
        **{
            **dict.fromkeys(names, False),
            "ep": 1,
            "get_mesh": lambda name: _mesh(1 if name == "efsdp" else 2),
            **fields,
        }
    )


@pytest.mark.parametrize("reshard", ["never", "default", "always"])
def test_each_block_is_a_group_and_only_always_frees_the_last(reshard, monkeypatch):
    model, config, groups = build(tiny_args()), job_config(), []
    config.parallelism.fsdp_reshard_after_forward = reshard
    for name in ("disable_fsdp_gradient_division", "_set_collectives", "_prefetch"):
        monkeypatch.setattr(fsdp, name, lambda *args: None)
    monkeypatch.setattr(
        fsdp, "fully_shard", lambda module, **of_it: groups.append((module, of_it["reshard_after_forward"]))
    )
    apply_fsdp(model, _dims(), config)
    frees = reshard != "never"
    ends = [([model.tok_embeddings], frees), ([model.norm, model.output], reshard == "always")]
    assert groups == [*ends, *((block, frees) for block in model.layers.values()), (model, frees)]


def test_a_shared_weight_that_tensor_parallelism_makes_two_of_is_one_for_fsdp(monkeypatch):
    """Which would gather both, and hold both whole."""

    def apply_tp(model, *_):
        model.output.weight = nn.Parameter(model.output.weight.detach().clone())

    monkeypatch.setattr(parallelize, "apply_tp", apply_tp)
    dims: Any = SimpleNamespace(**{**vars(ONE_PROCESS), "tp_enabled": True}, get_mesh=lambda name: None)
    model = MomoeLlama(tiny_args(tie_word_embeddings=True))
    parallelize.parallelize_momoe_llama(model, dims, job_config())
    assert model.output.weight is model.tok_embeddings.weight


def test_experts_are_left_out_of_fsdp_only_where_no_other_rank_has_them():
    config, experts = job_config(), build(tiny_args()).layers["1"].moe.experts
    config.parallelism.fsdp_reshard_after_forward = "never"
    assert leaves_experts(experts, _dims(ep_enabled=True), config)
    for name in ("dp_replicate_enabled", "pp_enabled"):
        assert not leaves_experts(experts, _dims(ep_enabled=True, **{name: True}), config)
    assert not leaves_experts(experts, _dims(), config)
    assert not leaves_experts(experts, _dims(ep_enabled=True, get_mesh=lambda name: _mesh(2)), config)
    config.training.enable_cpu_offload = True
    assert not leaves_experts(experts, _dims(ep_enabled=True), config)


def test_nothing_is_staged_for_fsdp_that_does_not_copy(monkeypatch):
    model = build(tiny_args())
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(fsdp.dist, "get_process_group_ranks", lambda group: [0, 1])
    for copies in (True, False):
        config = job_config()
        config.momoe = Momoe(fsdp_copies=copies)
        config.training.mixed_precision_param = "bfloat16"
        assert (fsdp.staging_bytes(model, _dims(fsdp_enabled=True), config) > 0) == copies
        assert fsdp.staging_bytes(model, _dims(fsdp_enabled=False), config) == 0


@pytest.mark.parametrize("file, copied", [("500m", True), ("1.4b", True), ("7b", False), ("mixtral_8x7b", False)])
def test_files_have_copies_where_their_groups_of_weights_are_small_enough(file, copied):
    job = read_job(["--job.config_file", f"train_configs/{file}.toml"])
    with torch.device("meta"):
        model = MomoeLlama(flavors[job.model.flavor])
    groups = [[model.tok_embeddings], *([block] for block in blocks_of(model)[:2]), [model.norm, model.output]]
    assert job.momoe.fsdp_copies == copied == (fsdp._sizes(groups, torch.bfloat16) is not None)


@pytest.mark.parametrize("hosts_of_experts", [1, 2])
def test_gradients_of_experts_go_by_the_ranks_that_have_the_same_experts(hosts_of_experts, monkeypatch):
    """Which may be of one host where all ranks together are not, and the reverse."""
    ranks = {
        "fsdp": [0, 1, 2, 3] if hosts_of_experts == 1 else [0, 1],
        "efsdp": [0, 1] if hosts_of_experts == 1 else [0, 2],
    }
    dims = SimpleNamespace(
        pp_enabled=False,
        ep_enabled=True,
        get_mesh=lambda name: SimpleNamespace(get_group=lambda: name, device_type="cpu"),
    )
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(fsdp.dist, "get_process_group_ranks", lambda group: ranks[group])
    first, block, experts, dense, last = groups = [nn.Linear(1, 1) for _ in range(5)]
    given = []
    for module in groups:
        module.set_custom_reduce_scatter = lambda collective, module=module: given.append(module)
    _set_collectives([[first], [block, experts], [dense], [last]], dims, NARROW, copies=False)
    assert given == ([experts] if hosts_of_experts == 1 else [first, block, dense, last])


def test_fsdp_is_the_single_process_run(one, two):
    assert_same_run(two["fsdp"], one, rtol=1e-4, atol=1e-4)
    assert one["bias"][0].any() and not one["bias"][1].any()


@pytest.mark.parametrize("name", ["fsdp, stock", "ddp"])
def test_stock_moe_and_ddp_too(one, two, name):
    assert_same_run(two[name], one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["fsdp", "fsdp, full", "ddp"])
def test_tied_embeddings_get_both_gradients(two, name):
    want = train(build(tiny_args(tie_word_embeddings=True, load_balance_off_layers=[2])))
    assert_same_run(two[f"{name}, tied"], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_activation_checkpointing_changes_nothing(two, mode):
    assert_same_run(two[f"fsdp, {mode}"], two["fsdp"])


def test_initial_weights_do_not_depend_on_the_number_of_ranks(two):
    single = dict(build(tiny_args()).named_parameters())
    for name in ("fsdp", "fsdp, full", "ddp"):
        assert two[name]["init"].keys() == single.keys()
        for key, weight in two[name]["init"].items():
            assert torch.equal(weight, single[key]), (name, key)


def test_bfloat16_mixed_precision(one, two):
    torch.testing.assert_close(two["fsdp, bfloat16"]["losses"], one["losses"], rtol=0.02, atol=0)
    assert two["fsdp, bfloat16"]["bias"].dtype == torch.float32


@pytest.mark.parametrize("name", ["fsdp", "ddp"])
def test_non_finite_gradient_on_one_rank(two, name):
    """No rank takes that step. That they agree and clear their counts is asserted in the worker."""
    run = two[f"{name}, non-finite gradient"]
    torch.testing.assert_close(run["counts"][:2], two["fsdp"]["counts"][:2])
    assert run["losses"].isfinite().tolist() == [True, False, True]
    delta = sum(bias_delta(run["counts"][step], 0.01) for step in (0, 2))
    torch.testing.assert_close(run["bias"][0], delta[0])


@pytest.mark.parametrize("name", ["fsdp", "ddp"])
def test_an_infinite_element_of_one_rank_s_gradient_skips_the_step_on_all(two, name):
    """Nothing spreads it: a NaN in the loss reaches all ranks by the reduction of the gradients."""
    run, skipped = two[f"{name}, infinite element"], two[f"{name}, non-finite gradient"]
    assert run["losses"].isfinite().all()
    torch.testing.assert_close(run["losses"][2], skipped["losses"][2], rtol=0, atol=0)
    assert torch.equal(run["bias"], skipped["bias"])


@pytest.mark.parametrize("name", ["fsdp", "fsdp, full", "ddp"])
def test_quantile_balancing(two, name):
    """All ranks together solve for what one process solves for, whose gates they hold in parts."""
    run = two[f"{name}, quantile"]
    want = train(build(tiny_args(load_balance_rule="quantile", load_balance_off_layers=[2])))
    torch.testing.assert_close(run["losses"], want["losses"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run["bias"], want["bias"], rtol=0, atol=1e-4)
    assert want["bias"][0].any() and not want["bias"][1].any()
