"""TorchTitan's own MoE models with our experts, by the model converter "momoe", against the models as they were."""

import copy
import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchtitan.config import ConfigManager, JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import parallel_dims as parallel_dims_module
from torchtitan.models.moe import MoE
from torchtitan.protocols.model_converter import build_model_converters
from torchtitan.protocols.train_spec import get_train_spec

import momoe_titan.register  # noqa: F401 - makes the converter known
from momoe_titan.adapters.torchtitan import CONVERTED, ConvertedMoE
from momoe_titan.components import auto_save_percent
from momoe_titan.config.checks.converter import check_converter
from momoe_titan.config.checks.job import check_job
from momoe_titan.memory.auto_save_percent import MEASURED_STEPS
from momoe_titan.memory.plan import GIB, MemoryPlan, Moment
from momoe_titan.model.router import MomoeRouter
from tests.support import commands
from tests.support.forks import in_gloo_forks


class OneProcess(ParallelDims):
    """No parallelism, and no process group."""

    def get_optional_mesh(self, dims):
        return None


ONE_PROCESS = OneProcess(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=1)
VOCAB, LENGTH = 96, 16
MODELS = {  # flavor, fields of its arguments that make it small, and fields of its MoE arguments
    "qwen3": (
        "debugmodel_moe",
        dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, moe_inter_dim=24),
        dict(num_experts=8, top_k=3),
    ),
    "deepseek_v3": (
        "debugmodel",
        dict(
            dim=32, n_layers=3, n_heads=2, inter_dim=48, moe_inter_dim=24, kv_lora_rank=16, qk_nope_head_dim=8,
            qk_rope_head_dim=8, v_head_dim=8,
        ),
        {},
    ),
    "llama4": ("debugmodel", dict(dim=32, n_layers=4, n_heads=4, multiple_of=8), {}),
    "gpt_oss": ("debugmodel", dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, moe_inter_dim=24), {}),
    "in groups": (
        "debugmodel",
        dict(
            dim=32, n_layers=2, n_heads=2, inter_dim=48, moe_inter_dim=24, kv_lora_rank=16, qk_nope_head_dim=8,
            qk_rope_head_dim=8, v_head_dim=8,
        ),
        dict(num_expert_groups=4, num_limited_groups=2, score_func="sigmoid", route_norm=True, route_scale=2.5),
    ),
}  # fmt: skip


class PlainAttention(nn.Module):
    """What gpt-oss asks of flex attention, which has no kernels for the CPU: causal, with the sums' logarithms."""

    def forward(self, q, k, v, *, block_mask, scale, return_lse, enable_gqa):
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        logits = q @ k.mT * scale
        logits = logits.masked_fill(logits.new_ones(logits.shape[-2:]).triu(1).bool(), float("-inf"))
        return logits.softmax(-1) @ v, logits.logsumexp(-1)


@pytest.fixture(autouse=True)
def histogram_of_integers(monkeypatch):
    """TorchTitan counts tokens by `torch.histc`, which has no kernel for integers on the CPU."""
    histc = torch.histc
    monkeypatch.setattr(torch, "histc", lambda ids, **options: histc(ids.double(), **options).long())


def config_of(name: str, *options: str) -> JobConfig:
    model = "deepseek_v3" if name == "in groups" else name
    options = [f"--model.name={model}", f"--model.flavor={MODELS[name][0]}", "--model.converters=momoe", *options]
    # the balancing that the models have by themselves
    balance = [f"--training.seq_len={LENGTH}", "--momoe.load_balance_rule=sign", "--momoe.load_balance_rate=1e-3"]
    return ConfigManager().parse_args(["--job.custom_config_module=momoe_titan.job_config", *balance, *options])


def build(name: str, dims=ONE_PROCESS, converted: bool = False, config: JobConfig | None = None, parallelize=False):
    """A model of unit-scale weights on the CPU, built as TorchTitan's trainer does it."""
    flavor, fields, moe_fields = MODELS[name]
    config = config or config_of(name)
    spec = get_train_spec(config.model.name)
    args = copy.deepcopy(spec.model_args[flavor])
    args = dataclasses.replace(args, vocab_size=VOCAB, max_seq_len=LENGTH, **fields)
    args.moe_args = dataclasses.replace(args.moe_args, use_grouped_mm=False, **moe_fields)
    args.update_from_config(config)
    with torch.device("meta"):
        model = spec.model_cls(args)
    if converted:
        build_model_converters(config, dims).convert(model)
    if parallelize:
        model = spec.parallelize_fn(model, dims, config)
    model.float().to_empty(device="cpu")  # gpt-oss's weights are bfloat16
    with torch.no_grad():
        model.init_weights(buffer_device=torch.device("cpu"))
        torch.manual_seed(0)
        for key, parameter in sorted(model.named_parameters()):
            drawn = torch.randn(parameter.shape) * (parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3)
            if parameter.dim() > 1 or key.endswith(("bias", "sinks")):
                values = parameter.to_local() if hasattr(parameter, "to_local") else parameter
                values.copy_(_part(drawn, parameter))
    for module in model.modules():
        if name == "gpt_oss" and hasattr(module, "sinks"):
            module.inner_attention = PlainAttention()
    return model.train()


def _part(whole: torch.Tensor, parameter) -> torch.Tensor:
    """What this rank holds of a parameter that is sharded along its dimensions."""
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements).to_local()


def tokens(rows: int = 4) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, LENGTH + 1), generator=torch.Generator().manual_seed(1))


def loss_of(model, rows: torch.Tensor) -> torch.Tensor:
    device = next(model.parameters()).device
    rows, mask = rows.to(device), _any_mask(device)
    masks = (
        {"attention_masks": {"basic_mask": mask, "sliding_window_mask": mask}} if "GptOss" in str(type(model)) else {}
    )
    logits = model(rows[:, :-1], **masks)
    return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def _any_mask(device: torch.device | str = "cpu"):
    return create_block_mask(lambda b, h, q, k: q >= k, None, None, LENGTH, LENGTH, device=device)


def results(model) -> dict[str, torch.Tensor]:
    """The loss, and the gradient of every parameter."""
    model.zero_grad()
    loss = loss_of(model, tokens())
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


def shapes(model) -> dict[str, tuple]:
    return {name: (value.shape, value.stride(), value.dtype) for name, value in model.state_dict().items()}


def moe_layers(model) -> list:
    return [module for module in model.modules() if isinstance(module, MoE)]


@pytest.mark.parametrize("name", MODELS)
def test_a_converted_model_computes_what_it_did(name):
    config = config_of(name, "--momoe.save_percent=40")
    stock, ours = build(name), build(name, converted=True, config=config)
    assert shapes(ours) == shapes(stock)
    layers = moe_layers(ours)
    assert len(layers) == len(moe_layers(stock)) == len(getattr(config, CONVERTED).moe_layer_ids)
    assert all(isinstance(layer, ConvertedMoE) and isinstance(layer.router, MomoeRouter) for layer in layers)
    assert {layer.experts.save_percent for layer in layers} == {40.0}

    double = copy.deepcopy(stock).double()
    wanted, exact, found = results(stock), results(double), results(ours)
    for key in wanted:
        scale = wanted[key].abs().max()
        allowed = 4 * (exact[key] - wanted[key]).abs().max() + 2e-6 * scale
        assert (found[key] - wanted[key]).abs().max() <= allowed, key
    for ours_layer, stock_layer in zip(layers, moe_layers(stock), strict=True):
        assert ours_layer.tokens_per_expert.tolist() == stock_layer.tokens_per_expert.tolist()


def train(model, state: dict | None, steps: int) -> tuple[list[float], dict]:
    """The losses of so many steps, from a checkpoint if there is one, and the checkpoint after them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    losses = []
    for _ in range(steps):
        loss = loss_of(model, tokens())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})


@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_go_from_stock_to_converted_and_back(name, tmp_path):
    """Weights, biases of the balancing and the optimizer's state, through a checkpoint of PyTorch's; equal losses."""
    wanted, _ = train(biased(build(name)), None, 6)
    first, state = train(biased(build(name)), None, 2)
    second, state = train(build(name, converted=True), through_a_file(state, tmp_path / "stock"), 2)
    third, _ = train(build(name), through_a_file(state, tmp_path / "converted"), 2)
    assert first + second + third == pytest.approx(wanted, rel=1e-4)
    assert wanted[-1] < wanted[0]


def biased(model):
    """The model with biases of the balancing that change its choices of experts."""
    for seed, layer in enumerate(moe_layers(model)):
        layer.expert_bias.copy_(torch.randn(layer.experts.num_experts, generator=torch.Generator().manual_seed(seed)))
    return model


def through_a_file(state: dict, folder) -> dict:
    checkpoint.save(state, checkpoint_id=folder, no_dist=True)
    loaded = copy.deepcopy(state)
    for tensor in tree_leaves(loaded):
        if isinstance(tensor, torch.Tensor):
            tensor.zero_()
    checkpoint.load(loaded, checkpoint_id=folder, no_dist=True)
    return loaded


def balanced(model, config: JobConfig):
    """The optimizers that the train spec builds."""
    return get_train_spec(config.model.name).build_optimizers_fn([model], config.optimizer, ONE_PROCESS)


class CountOps(TorchDispatchMode):
    """How often the experts run forward."""

    forwards = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.forwards += func is torch.ops.momoe_titan.moe_forward.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_tokens_are_counted_once_and_move_the_bias(mode):
    """Nor do the experts run again, where activation checkpointing recomputes their block."""
    config = config_of("qwen3", "--momoe.load_balance_rate=0.5", f"--activation_checkpoint.mode={mode}")
    model = build("qwen3", converted=True, config=config, parallelize=True)
    assert any("checkpoint" in name for name, _ in model.named_parameters()) == (mode != "none")
    optimizers = balanced(model, config)
    with CountOps() as count:
        for _ in range(2):
            loss_of(model, tokens()).backward()
    assert count.forwards == 2 * len(moe_layers(model))
    with torch.no_grad():
        loss_of(model, tokens())
    layer = moe_layers(model)[0]
    counts_E = layer.tokens_per_expert.clone()
    assert counts_E.sum() == 2 * 4 * LENGTH * layer.router.top_k
    optimizers.step()
    mean = counts_E.float().mean()
    assert layer.expert_bias.tolist() == (0.5 * (mean - counts_E).sign()).tolist()
    assert layer.tokens_per_expert.sum() == 0
    assert torch.equal(optimizers.load_balancer.counts_LE[0], counts_E)


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_checkpointed_blocks_have_the_same_gradients(mode):
    plain = results(build("in groups", converted=True))
    config = config_of("in groups", f"--activation_checkpoint.mode={mode}", "--momoe.save_percent=70")
    found = results(build("in groups", converted=True, config=config, parallelize=True))
    for key, wanted in plain.items():
        same = next(value for name, value in found.items() if name.replace("_checkpoint_wrapped_module.", "") == key)
        torch.testing.assert_close(same, wanted, rtol=0, atol=1e-6 * wanted.abs().max().item())


@pytest.mark.parametrize("name", ["llama4", "in groups"])
def test_quantile_balancing_evens_out_the_load(name):
    """Where a token chooses from few groups of experts, too."""
    config = config_of(name, "--momoe.load_balance_rule=quantile", "--momoe.load_balance_average=1.0")
    model = build(name, converted=True, config=config)
    optimizers = balanced(model, config)
    layer = moe_layers(model)[0]
    loads = []
    for _ in range(6):
        loss_of(model, tokens()).backward()
        loads.append(layer.tokens_per_expert.max().item())
        optimizers.zero_grad()
        optimizers.step()
    share = 4 * LENGTH * layer.router.top_k / layer.num_experts
    assert loads[0] > 1.3 * share
    assert loads[-1] <= 1.15 * share + 1


def test_a_pipeline_stage_without_moe_layers_has_the_hooks_of_the_others():
    """They sum over all ranks, which would wait for it."""
    config = config_of("deepseek_v3")
    stage = build("deepseek_v3", converted=True, config=config)
    stage.layers = nn.ModuleDict({"0": stage.layers["0"]})
    assert not moe_layers(stage)
    assert hasattr(balanced(stage, config), "non_finite_guard")
    assert not hasattr(balanced(build("deepseek_v3"), config), "non_finite_guard")


def test_a_pipeline_trains_on_the_gradient_of_the_mean():
    """TorchTitan's has that of the sum, beside which the routers' losses would count for nothing."""
    dims = OneProcess(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=2, ep=1, etp=1, world_size=2)
    config = config_of("qwen3", "--training.local_batch_size=4")
    gradients = []
    for converters in (["momoe"], []):
        config.model.converters = converters
        logits = torch.randn(4, LENGTH, VOCAB, generator=torch.Generator().manual_seed(0)).requires_grad_()
        loss = get_train_spec("qwen3").build_loss_fn(config, parallel_dims=dims)
        loss(logits, tokens()[:, 1:]).backward()
        gradients.append(logits.grad)
    torch.testing.assert_close(gradients[0], gradients[1] / (4 * LENGTH))


def test_another_converter_leaves_the_router_alone():
    """A converter that swaps every linear layer, as Float8's does."""
    model = build("deepseek_v3", converted=True)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert any("shared_experts" in name for name in linear) and any("attention" in name for name in linear)
    assert not any("router" in name for name in linear)


def test_float8_converts_the_dense_layers_behind_ours():
    pytest.importorskip("torchao")
    config = config_of("qwen3", "--quantize.linear.float8.emulate")
    config.model.converters = ["momoe", "quantize.linear.float8"]
    model = build("qwen3", converted=True, config=config)
    found = {name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"}
    assert any("attention" in name for name in found) and not any("moe" in name for name in found)
    loss, plain = loss_of(model, tokens()), loss_of(build("qwen3", converted=True), tokens())
    loss.backward()
    assert loss.item() == pytest.approx(plain.item(), rel=0.05)


def test_a_model_without_a_section_keeps_its_own_balancing():
    options = ["--model.name=qwen3", "--model.flavor=debugmodel_moe", "--model.converters=momoe"]
    config = ConfigManager().parse_args([*options, f"--training.seq_len={LENGTH}"])
    layer = moe_layers(build("qwen3", converted=True, config=config))[0]
    assert (layer.load_balance_rate, layer.load_balance_rule, layer.experts.save_percent) == (1e-3, "sign", 0.0)


def test_settings_reach_the_layers():
    options = [
        "--momoe.save_percent",
        "10",
        "20",
        "--momoe.load_balance_off_layers",
        "1",
        "--momoe.aux_loss_weight=0.1",
    ]
    model = build("qwen3", converted=True, config=config_of("qwen3", *options))
    layers = moe_layers(model)
    assert [layer.experts.save_percent for layer in layers] == [10.0, 20.0]
    assert [layer.load_balance_rate for layer in layers] == [1e-3, 0.0]
    assert all(layer.router.aux_loss_weight == 0.1 and layer.router.last_shares_E is not None for layer in layers)


class EnoughMemory:
    """`DeviceMemory` of a GPU of 100 GiB, all of which is free."""

    def total(self) -> int:
        return 100 * GIB

    def outside(self) -> int:
        return 0

    def peak_reserved(self) -> int:
        return GIB

    def give_back(self) -> None:
        pass


def test_auto_chooses_for_the_converted_layers(monkeypatch, tmp_path):
    """By the plan, in which they are layers, and again by what steps have taken."""
    config = config_of("qwen3", "--momoe.save_percent=auto", f"--job.dump_folder={tmp_path}")
    config.momoe.memory_budget = 80.0
    z = [("0", GIB), ("1", GIB)]
    plan = MemoryPlan(["0", "1"], [Moment("loss", z, 78 * GIB, {})], {}, 1)
    monkeypatch.setattr(auto_save_percent, "plan_in_child", lambda config: plan.to_dict())
    monkeypatch.setattr(auto_save_percent, "CudaMemory", EnoughMemory)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        model = build("qwen3", converted=True, config=config, parallelize=True)
    layers = [layer.experts for layer in moe_layers(model)]
    at_first = sum(layer.save_percent for layer in layers)
    assert at_first < 200
    optimizers = balanced(model, config)
    for _ in range(MEASURED_STEPS):
        loss_of(model, tokens()).backward()
        optimizers.step()
        optimizers.zero_grad()
    assert sum(layer.save_percent for layer in layers) > at_first


def two_ranks(name: str, *options: str, **dims) -> None:
    """A rank of a job that the model's own `parallelize_fn` spreads: its gradients are those of one process."""
    options = ["--training.mixed_precision_param=float32", "--momoe.save_percent=50", *options]
    options.append(f"--parallelism.expert_parallel_degree={dims.get('ep', 1)}")
    config = config_of(name, *options)
    sizes = dict(dp_replicate=1, dp_shard=2, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=2) | dims
    parallel_dims_module.device_type = "cpu"  # in this fork alone; TorchTitan takes it for "cuda" where it is imported
    parallel_dims = ParallelDims(**sizes)
    parallel_dims.build_mesh()
    single = build(name)
    model = build(name, parallel_dims, converted=True, config=config, parallelize=True)
    own = config.momoe.expert_dispatch
    for layer in moe_layers(model):
        assert (layer.gatherer is not None, layer.dispatcher is not None) == (own == "all_ranks", own == "chosen_ranks")
    rank = dist.get_rank()
    loss_of(model, tokens()[2 * rank : 2 * rank + 2]).backward()
    loss_of(single, tokens()).backward()
    layer, stock = moe_layers(model)[0], moe_layers(single)[0]
    counts_E = layer.tokens_per_expert.clone()
    dist.all_reduce(counts_E)
    assert counts_E.tolist() == stock.tokens_per_expert.tolist()
    whole = dict(single.named_parameters())
    for key, parameter in model.named_parameters():
        # TorchTitan's trainer divides the loss by the tokens of all ranks, and its FSDP does not divide gradients.
        plain = key.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")
        found, wanted = parameter.grad.full_tensor() / 2, whole[plain].grad
        assert (found - wanted).abs().max() <= 2e-5 * wanted.abs().max(), key


THEIR_DISPATCH = [(name, ep) for ep in (1, 2) for name in MODELS if name != "in groups"]  # ep: expert parallelism


def test_two_ranks_compute_what_one_does(tmp_path):
    """All models in one pair of processes: FSDP alone, and with TorchTitan's own expert parallelism."""

    def all_models() -> None:
        for name, ep in THEIR_DISPATCH:
            two_ranks(name, ep=ep)

    assert in_gloo_forks(2, tmp_path / "store", all_models)


OWN_DISPATCH = [  # model, dispatch, and options beside it
    ("qwen3", "chosen_ranks", "--activation_checkpoint.mode=full"),
    ("deepseek_v3", "all_ranks", "--activation_checkpoint.mode=selective"),
    ("llama4", "all_ranks"),
    ("gpt_oss", "chosen_ranks"),
    ("in groups", "all_ranks", "--momoe.load_balance_rule=quantile"),
]


def test_our_dispatch_computes_what_one_rank_does(tmp_path):
    """All models in one pair of processes."""

    def all_models() -> None:
        for name, dispatch, *options in OWN_DISPATCH:
            two_ranks(name, f"--momoe.expert_dispatch={dispatch}", *options, ep=2)

    assert in_gloo_forks(2, tmp_path / "store", all_models)


def test_our_dispatch_computes_the_same_in_compiled_blocks(tmp_path):
    """TorchTitan compiles attention, routers and shared experts one by one where a block has an MoE layer."""

    def both_ways() -> None:
        for name, dispatch in (("qwen3", "all_ranks"), ("llama4", "chosen_ranks")):
            torch._dynamo.reset()
            compiled = "--compile.enable", "--compile.backend=eager", "--activation_checkpoint.mode=none"
            two_ranks(name, f"--momoe.expert_dispatch={dispatch}", *compiled, ep=2)
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0

    assert in_gloo_forks(2, tmp_path / "store", both_ways)


INTERLEAVED = [
    *("--momoe.expert_dispatch=all_ranks", "--parallelism.expert_parallel_degree=2"),
    *("--parallelism.pipeline_parallel_schedule=DualPipeV", "--activation_checkpoint.mode=none"),
]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.name=momoe_llama"], "model.converters is .*, must be empty with model.name = 'momoe_llama'"),
        (["--model.converters=quantize.linear.float8,momoe"], "must name 'momoe' once, and first"),
        (["--model.converters=momoe,quantize.grouped_mm.mx"], "'quantize.grouped_mm.mx', but the experts of 'momoe'"),
        (["--parallelism.tensor_parallel_degree=2"], "parallelism.tensor_parallel_degree is 2, must be 1"),
        (["--parallelism.expert_tensor_parallel_degree=2"], "expert_tensor_parallel_degree is 2, must be 1"),
        (["--parallelism.expert_parallel_comm_backend=deepep"], "comm_backend is 'deepep', must be 'standard'"),
        (["--momoe.backend=torchtitan"], "momoe.backend is 'torchtitan', which leaves nothing"),
        (["--momoe.save_percent=auto", "--parallelism.expert_parallel_degree=2"], "'auto', which does not know"),
        *(
            (
                [
                    "--momoe.expert_dispatch=all_ranks",
                    "--parallelism.expert_parallel_degree=2",
                    f"--activation_checkpoint.mode={mode}",
                    "--compile.enable",
                ],
                "momoe.expert_dispatch is 'all_ranks', must be 'auto' with torch.compile and activation_checkpoint",
            )
            for mode in ("full", "selective")
        ),
        ([*INTERLEAVED, "--parallelism.pipeline_parallel_degree=2"], "pipeline_parallel_schedule = 'DualPipeV' inter"),
    ],
)
def test_jobs_that_cannot_work_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        check_converter(config_of("qwen3", *options))


def test_a_schedule_without_a_pipeline_is_no_reason_to_refuse():
    check_converter(config_of("qwen3", *INTERLEAVED))


def test_such_jobs_are_refused_where_they_are_read():
    with pytest.raises(ValueError, match="parallelism.tensor_parallel_degree is 2, must be 1"):
        check_job(config_of("qwen3", "--parallelism.tensor_parallel_degree=2"))


def test_fields_without_effect_on_a_converted_model_are_named(caplog):
    check_converter(config_of("qwen3"))
    assert "effect" not in caplog.text
    check_converter(config_of("qwen3", "--momoe.expert_dispatch=all_ranks"))
    assert "momoe.expert_dispatch = 'all_ranks' has no effect without expert parallelism" in caplog.text
    caplog.clear()
    check_converter(config_of("qwen3", "--momoe.data_packing=best_fit"))
    assert "Without effect on a converted model: momoe.data_packing" in caplog.text.splitlines()[-1]


def test_models_that_cannot_be_converted_are_refused_by_name():
    with pytest.raises(ValueError, match="load_balance_off_layers names \\[7\\], but the MoE layers are \\[0, 1\\]"):
        build("qwen3", converted=True, config=config_of("qwen3", "--momoe.load_balance_off_layers", "7"))
    dense = nn.Module()
    dense.layers = nn.ModuleDict({"0": SimpleBlock()})
    with pytest.raises(ValueError, match="model.flavor has no MoE layers"):
        build_model_converters(config_of("qwen3"), ONE_PROCESS).convert(dense)


class SimpleBlock(nn.Module):
    moe_enabled = False


def job_of_the_page(folder) -> list[str]:
    """Options of the job that docs/use_it_in_your_model.md shows, made small."""
    page = (commands.ROOT / "docs/use_it_in_your_model.md").read_text()
    (block,) = re.findall(r"^```toml\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    (folder / "job.toml").write_text(block)
    small = ["--training.steps=2", "--training.seq_len=16", "--training.local_batch_size=1", "--metrics.log_freq=1"]
    options = [f"--job.config_file={folder / 'job.toml'}", f"--job.dump_folder={folder}", *small]
    return [*options, "--training.dataset=python_stdlib"]


@pytest.mark.slow
def test_the_job_of_the_page_trains(tmp_path):
    """With our metrics, which TorchTitan's own train specs do not have."""
    done = commands.run("-m", "momoe_titan.train", *job_of_the_page(tmp_path), cwd=commands.ROOT)
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert "Our experts and routers in 5 MoE layers" in said
    assert len(re.findall("maxvio: ", said)) == 2
    assert "experts without a token" in said


OF_TWO = ["--world_size=2", "--parallelism.expert_parallel_degree=2", "--momoe.expert_dispatch=all_ranks"]


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], OF_TWO], ids=["one rank", "two by our dispatch"])
def test_the_job_of_the_page_is_planned(options, tmp_path):
    """Its five MoE layers keep pre-activations by save_percent: the planner converts the model too."""
    done = commands.run("-m", "momoe_titan.plan", "--json", *job_of_the_page(tmp_path), *options, cwd=commands.ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["plan"]["layers"] == ["1", "2", "3", "4", "5"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["qwen3", "gpt_oss", "in groups"])
def test_a_gpu_computes_and_balances_as_the_cpu_does(name):
    config = config_of(name, "--momoe.load_balance_rule=quantile", "--momoe.save_percent=60")
    on_cpu = build(name, converted=True, config=config)
    on_gpu = copy.deepcopy(on_cpu).cuda()
    wanted, found = results(on_cpu), results(on_gpu)
    for key, value in wanted.items():
        assert (found[key].cpu() - value).abs().max() <= 2e-2 * value.abs().max(), key
    for model in (on_cpu, on_gpu):
        balanced(model, config).step()
    for cpu_layer, gpu_layer in zip(moe_layers(on_cpu), moe_layers(on_gpu), strict=True):
        assert (cpu_layer.tokens_per_expert - gpu_layer.tokens_per_expert.cpu()).abs().sum() <= 4
        assert cpu_layer.expert_bias.abs().max() > 0
        torch.testing.assert_close(gpu_layer.expert_bias.cpu(), cpu_layer.expert_bias, rtol=0, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_job_of_the_page_trains_on_a_gpu_by_auto(compiled, tmp_path):
    """With a plan of its memory, balancing and our metrics."""
    options = [*job_of_the_page(tmp_path), "--momoe.save_percent=auto", *(["--compile.enable"] if compiled else [])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(commands.ROOT), *sys.path])}
    command = [sys.executable, "-m", "momoe_titan.train", *options]
    with (tmp_path / "said.txt").open("w") as file:  # which a test that is cut off leaves behind
        done = subprocess.run(command, cwd=commands.ROOT, env=environment, stdout=file, stderr=file, timeout=200)
    said = (tmp_path / "said.txt").read_text()
    assert done.returncode == 0, said[-3000:]
    assert "could not be planned" not in said
    assert json.loads((tmp_path / "save_percent.json").read_text())["save_percent"] == [100.0] * 5
    assert len(re.findall("maxvio: ", said)) == 2
