"""Models of transformers with our experts against their own: results, gradients, checkpoints, training, generation."""

import copy
import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from momoe_titan.adapters import transformers as adapter
from momoe_titan.adapters.activation import UnknownActivationError, activation_of
from tests.support.forks import in_gloo_forks

VOCAB = 64
COMMON = dict(
    vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
LATENT = dict(
    num_key_value_heads=4, n_shared_experts=1, first_k_dense_replace=1, kv_lora_rank=16, qk_rope_head_dim=8,
    qk_nope_head_dim=8, v_head_dim=8,
)  # fmt: skip
MODELS = {
    "mixtral": dict(intermediate_size=24, num_local_experts=5, num_experts_per_tok=2),
    "qwen2_moe": dict(
        intermediate_size=48, moe_intermediate_size=24, shared_expert_intermediate_size=20, num_experts=6,
        num_experts_per_tok=3,
    ),
    "qwen3_moe": dict(
        intermediate_size=48, moe_intermediate_size=24, head_dim=8, num_experts=6, num_experts_per_tok=3,
        norm_topk_prob=True,
    ),
    "olmoe": dict(intermediate_size=24, num_experts=6, num_experts_per_tok=3),
    "deepseek_v2": dict(
        **LATENT, intermediate_size=48, moe_intermediate_size=24, n_routed_experts=6, num_experts_per_tok=3,
        q_lora_rank=None, n_group=1, topk_group=1, topk_method="greedy",
    ),
    "deepseek_v3": dict(
        **LATENT, intermediate_size=48, moe_intermediate_size=24, n_routed_experts=8, num_experts_per_tok=3,
        q_lora_rank=16, n_group=4, topk_group=2,
    ),
    "glm4_moe": dict(
        intermediate_size=48, moe_intermediate_size=24, head_dim=8, n_routed_experts=6, num_experts_per_tok=3,
        n_shared_experts=1, first_k_dense_replace=1,
    ),
    "gpt_oss": dict(intermediate_size=24, head_dim=8, num_local_experts=6, num_experts_per_tok=3, sliding_window=8),
    "granitemoe": dict(intermediate_size=24, num_local_experts=6, num_experts_per_tok=3),
    "phimoe": dict(intermediate_size=24, num_local_experts=6, num_experts_per_tok=2),
}  # fmt: skip


def build(name: str, **fields):
    """A model on the CPU, of unit-scale weights, so that an error of the experts is not hidden under a tolerance."""
    config = AutoConfig.for_model(name, **{**COMMON, **MODELS[name], **fields})
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager", attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
            elif key.endswith("bias"):
                parameter.normal_(0, 0.3, generator=generator)
    return model.train()


def tokens(rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


def results(model, implementation: str, percent: float = 0.0) -> dict[str, torch.Tensor]:
    """Logits, and the gradient of every parameter."""
    model.set_experts_implementation(implementation)
    model.zero_grad()
    torch.manual_seed(0)  # of routers that add noise
    with adapter.save_percent(percent):
        out = model(tokens(), labels=tokens())
        out.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach().clone(), **gradients}


def assert_as_close(found: dict, wanted: dict, other: dict) -> None:
    """`found` is as close to `wanted` as `other` is, transformers' second implementation, but for a few roundings."""
    assert found.keys() == wanted.keys()
    for name in wanted:
        allowed = 4 * (other[name] - wanted[name]).abs().max() + 2e-6 * wanted[name].abs().max()
        assert (found[name] - wanted[name]).abs().max() <= allowed, name


def train(model, implementation: str, steps: int = 3) -> list[float]:
    """The losses of a short run by SGD."""
    model.set_experts_implementation(implementation)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    torch.manual_seed(0)
    for _ in range(steps):
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def generated(model, implementation: str) -> torch.Tensor:
    model.set_experts_implementation(implementation)
    return model.generate(tokens(2, 5), max_new_tokens=8, do_sample=False, eos_token_id=VOCAB + 1)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_trains_and_generates_what_it_did(name):
    model = build(name)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    wanted, other = results(model, "eager"), results(model, "batched_mm")
    assert_as_close(results(model, "momoe", percent=30), wanted, other)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_as_close(results(model, "momoe", percent=60), wanted, other)  # repeated outside of the block
    model.gradient_checkpointing_disable()
    assert {key: value.shape for key, value in model.state_dict().items()} == shapes

    torch.testing.assert_close(generated(model.eval(), "momoe"), generated(model, "eager"))
    model.zero_grad()
    twin = copy.deepcopy(model.train())
    losses = train(model, "momoe")
    assert losses == pytest.approx(train(twin, "eager"), rel=1e-5)
    assert losses[-1] < losses[0]


@pytest.fixture(scope="module")
def qwen():
    return build("qwen3_moe")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "olmoe"])
def test_a_model_in_bfloat16_on_the_device(name, device):
    """On a GPU by the kernels, and about as far from eager as transformers' second implementation is.

    One layer, so that its router sees the same tokens in all.
    """
    fields = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    model = build(name, **fields, **({"moe_intermediate_size": 64} if name == "qwen3_moe" else {}))
    model = model.to(device, torch.bfloat16)
    ids, found = tokens(4, 40).to(device), []
    for implementation in ("eager", "batched_mm", "momoe"):
        model.set_experts_implementation(implementation)
        model.zero_grad()
        with adapter.save_percent(50):
            out = model(ids, labels=ids)
        out.loss.backward()
        found.append({"logits": out.logits, **{n: p.grad for n, p in model.named_parameters()}})

    def errors(other: dict) -> dict[str, float]:
        return {key: ((other[key] - w).float().norm() / w.float().norm()).item() for key, w in found[0].items()}

    second, ours = map(errors, found[1:])
    assert max(ours.values()) <= 3 * max(second.values()), (ours, second)


def test_from_pretrained_takes_the_name(qwen, tmp_path):
    qwen.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="momoe", dtype=torch.bfloat16)
    assert model.config._experts_implementation == "momoe"
    out = model(tokens(), labels=tokens())
    out.loss.backward()
    assert out.logits.dtype == model.model.layers[0].mlp.experts.down_proj.grad.dtype == torch.bfloat16


def test_autocast_computes_in_its_dtype_and_keeps_that_of_the_tokens(qwen):
    experts = copy.deepcopy(qwen.model.layers[0].mlp.experts)
    experts.config._experts_implementation = "momoe"
    x, ids, weights = torch.randn(7, 32), torch.randint(0, 6, (7, 3)), torch.rand(7, 3)
    with torch.autocast("cpu", torch.bfloat16):
        out = experts(x, ids, weights)
    assert out.dtype == torch.float32
    assert torch.equal(out, experts.bfloat16()(x.bfloat16(), ids, weights).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_routing_weights_of_any_dtype(qwen, dtype):
    experts = qwen.model.layers[0].mlp.experts
    x, ids = torch.randn(7, 32), torch.randint(0, 6, (7, 3))
    weights = torch.rand(7, 3).to(dtype).requires_grad_()
    adapter.momoe_experts_forward(experts, x, ids, weights).sum().backward()
    wanted = weights.detach().float().requires_grad_()
    adapter.momoe_experts_forward(experts, x, ids, wanted).sum().backward()
    assert weights.grad.dtype == dtype
    torch.testing.assert_close(weights.grad, wanted.grad.to(dtype))


def test_experts_of_other_ranks_add_nothing(qwen):
    """transformers' expert parallelism writes the number of local experts for the id of another rank's."""
    experts = qwen.model.layers[0].mlp.experts
    x, ids, weights = torch.randn(7, 32), torch.randint(0, 7, (7, 3)), torch.rand(7, 3)
    ids[:, 0] = 6
    found = adapter.momoe_experts_forward(experts, x, ids, weights)
    wanted = adapter.momoe_experts_forward(experts, x, ids.clamp(max=5), weights.where(ids < 6, 0.0))
    torch.testing.assert_close(found, wanted)


def saved_rows(experts, forward=None) -> list[int]:
    """Of each forward of these experts within `forward`, how many rows of pre-activations it saves."""
    rows = []
    width = experts.gate_up_proj.shape[1]
    x, ids, weights = torch.randn(10, 32), torch.randint(0, 6, (10, 3)), torch.rand(10, 3)

    def pack(t):
        if t.dim() == 2 and t.shape[1] == width and t.dtype == torch.float32:
            rows.append(t.shape[0])
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        adapter.momoe_experts_forward(experts, x, ids, weights)
    return rows


def test_save_percent_of_a_block_of_a_model_and_of_the_environment(qwen, monkeypatch):
    model = copy.deepcopy(qwen)
    experts, other = (layer.mlp.experts for layer in model.model.layers)
    assert saved_rows(experts) == [0]
    monkeypatch.setenv("MOMOE_SAVE_PERCENT", "10")
    assert saved_rows(experts) == [3]
    assert adapter.set_save_percent(model, 40) == 2
    assert adapter.set_save_percent(model.model.layers[1], 50) == 1
    assert (saved_rows(experts), saved_rows(other)) == ([12], [15])
    with adapter.save_percent(100):
        with adapter.save_percent(20):
            assert saved_rows(experts) == [6]
        assert saved_rows(experts) == [30]
    adapter.set_save_percent(model, None)
    assert saved_rows(experts) == [3]


def test_wrong_save_percents_are_refused_by_name(qwen, monkeypatch):
    with pytest.raises(ValueError, match="save_percent must be a number from 0 to 100, got 101"):
        adapter.save_percent(101).__enter__()
    with pytest.raises(ValueError, match="percent must be a number from 0 to 100, got 'half'"):
        adapter.set_save_percent(qwen, "half")
    with pytest.raises(ValueError, match="model must hold experts .*, got a Linear without"):
        adapter.set_save_percent(torch.nn.Linear(2, 2), 50)
    monkeypatch.setenv("MOMOE_SAVE_PERCENT", "most")
    with pytest.raises(ValueError, match="MOMOE_SAVE_PERCENT must be a number from 0 to 100, got 'most'"):
        saved_rows(qwen.model.layers[0].mlp.experts)


def experts_of(module: str, name: str, **fields):
    """An experts module alone, of random weights."""
    pytest.importorskip(f"transformers.models.{module}")
    classes = __import__(f"transformers.models.{module}.modeling_{module}", fromlist=[name])
    sizes = dict(
        hidden_size=16, intermediate_size=12, moe_intermediate_size=12, moe_latent_size=None, moe_hidden_size=16,
        hidden_act="silu", mlp_hidden_act="relu2", hidden_activation="gelu_pytorch_tanh", num_experts=5,
        num_local_experts=5, n_routed_experts=5, moe_num_experts=5, swiglu_alpha=1.702, swiglu_limit=7.0,
        post_norm_eps=1e-6, _experts_implementation="eager",
    )  # fmt: skip
    experts = getattr(classes, name)(SimpleNamespace(**{**sizes, **fields}))
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_()
    return experts


KNOWN = {
    "aria": ("AriaExperts", {}, ("swiglu", "gate_up")),  # transposed
    "beam": ("BeamExperts", {}, ("swiglu", "gate_up")),  # with a gate of its own
    "gemma4": ("Gemma4TextExperts", {}, ("geglu_tanh", "gate_up")),
    "mixtral": ("MixtralExperts", {"hidden_act": "gelu"}, ("geglu", "gate_up")),
    "olmoe": ("OlmoeExperts", {"hidden_act": "relu"}, ("reglu", "gate_up")),
    "nemotron_h": ("NemotronHExperts", {}, ("relu2", "up_gate")),  # without a gate
    "minimax_m3_vl": ("MiniMaxM3VLExperts", {}, ("clamped_swiglu", "gate_up")),
    "openai_privacy_filter": ("OpenAIPrivacyFilterExperts", {}, ("clamped_swiglu", "gate_up")),  # transposed, biases
}


@pytest.mark.parametrize("module", KNOWN)
def test_every_kind_of_experts_that_the_kernels_know(module):
    name, fields, form = KNOWN[module]
    experts = experts_of(module, name, **fields)
    x, ids, weights = torch.randn(20, 16), torch.rand(20, 5).topk(2).indices, torch.rand(20, 2)
    outs, gradients = [], []
    for implementation in ("eager", "momoe"):
        experts.config._experts_implementation = implementation
        leaves = [t.clone().requires_grad_() for t in (x, weights)]
        outs.append(experts(leaves[0], ids, leaves[1]))
        gradients.append(torch.autograd.grad(outs[-1].square().sum(), [*leaves, *experts.parameters()]))
    assert experts._momoe_form == form
    for wanted, found in zip([outs[0], *gradients[0]], [outs[1], *gradients[1]], strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6 * wanted.abs().max().item() + 1e-6)


UNKNOWN = {
    "deepseek_v4": ("DeepseekV4Experts", {}, r"DeepseekV4Experts \(SiLUActivation\): it is none of swiglu"),
    "mixtral": ("MixtralExperts", {"hidden_act": "mish"}, r"MixtralExperts \(MishActivation\): it is none of"),
    "gpt_oss": ("GptOssExperts", {"swiglu_limit": 6.0}, r"GptOssExperts \(.*\): it is none of"),
    "nemotron_h": ("NemotronHExperts", {"mlp_hidden_act": "silu"}, r"NemotronHExperts .*: it is none of relu2"),
    "muse_spark": ("MuseSparkExperts", {}, "has no norm after the experts, which MuseSparkExperts has"),
}


@pytest.mark.parametrize("module", UNKNOWN)
def test_what_the_kernels_do_not_know_is_refused_by_name(module):
    name, fields, message = UNKNOWN[module]
    experts = experts_of(module, name, **fields)
    experts.config._experts_implementation = "momoe"
    with pytest.raises(ValueError, match=message):
        experts(torch.randn(3, 16), torch.tensor([[0], [1], [2]]), torch.ones(3, 1))


@pytest.mark.parametrize("name", ["gelu_fast", "gelu_new", "gelu_pytorch_tanh"])
def test_activations_are_known_by_what_they_do(name):
    function = ACT2FN[name]
    assert (
        activation_of(lambda z: function(z[:, : z.shape[1] // 2]) * z[:, z.shape[1] // 2 :]).activation == "geglu_tanh"
    )


@pytest.mark.parametrize("name", ["quick_gelu", "gelu_10", "tanh", "leaky_relu"])
def test_activations_that_are_almost_known_are_not_taken(name):
    function = ACT2FN[name]
    with pytest.raises(UnknownActivationError):
        activation_of(lambda z: function(z[:, : z.shape[1] // 2]) * z[:, z.shape[1] // 2 :])


@pytest.mark.parametrize("known", [True, False])
def test_compiled_model_gives_the_same(known, qwen):
    experts = copy.deepcopy(qwen.model.layers[0].mlp.experts)
    x, ids, weights = torch.randn(20, 32), torch.rand(20, 6).topk(3).indices, torch.rand(20, 3)
    compiled = torch.compile(adapter.momoe_experts_forward, fullgraph=True, backend="aot_eager")
    want = adapter.momoe_experts_forward(copy.deepcopy(experts), x, ids, weights)
    if known:
        adapter.set_save_percent(experts, None)
    elif torch.__version__.startswith("2.11"):
        pytest.skip("torch 2.11 cannot find the form of a module while it compiles")
    torch.testing.assert_close(compiled(experts, x, ids, weights), want)
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(compiled(experts, x, ids, weights), want)


def test_trainer_trains_the_same(qwen, tmp_path):
    pytest.importorskip("accelerate")
    losses = []
    for implementation in ("momoe", "eager"):
        model = copy.deepcopy(qwen)
        model.set_experts_implementation(implementation)
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, logging_steps=1, report_to=[],
            use_cpu=True, learning_rate=1e-3, gradient_checkpointing=True, save_strategy="no", disable_tqdm=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )  # fmt: skip
        rows = [{"input_ids": row, "labels": row} for row in tokens(8)]
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_adapters_on_attention_leave_frozen_experts_without_gradients(qwen):
    peft = pytest.importorskip("peft")
    found = []
    for implementation in ("momoe", "eager"):
        torch.manual_seed(0)
        model = peft.get_peft_model(
            copy.deepcopy(qwen), peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        )
        model.set_experts_implementation(implementation)
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert all("lora" in name for name in found[0]) and len(found[0]) == 8
    for name, wanted in found[1].items():
        torch.testing.assert_close(found[0][name], wanted, rtol=0, atol=2e-5 * wanted.abs().max().item())


def sharded_by_torch(model, optimizer):
    for layer in [*model.model.layers, model]:
        fully_shard(layer)
    return model, type(optimizer)(model.parameters(), **optimizer.defaults)


def sharded_by_accelerate(model, optimizer):
    """By its FSDP2, which it otherwise does on accelerators alone: nothing but its state says so."""
    accelerate, state = pytest.importorskip("accelerate"), pytest.importorskip("accelerate.state")
    layer = type(model.model.layers[0]).__name__
    plugin = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=[layer]
    )
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="1")  # asked for, though the group is there
    accelerator = accelerate.Accelerator(cpu=True)
    state.AcceleratorState._shared_state |= {"distributed_type": state.DistributedType.FSDP, "fsdp_plugin": plugin}
    return accelerator.prepare(model, optimizer)


@pytest.mark.parametrize("shard", [sharded_by_torch, sharded_by_accelerate], ids=["torch", "accelerate"])
def test_sharded_over_two_ranks_it_trains_the_same(shard, tmp_path):
    """A layer at a time, then the rest of the model."""

    def losses(rank: int, is_sharded: bool) -> list[float]:
        model = build("qwen3_moe")
        model.set_experts_implementation("momoe" if is_sharded else "eager")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        if is_sharded:
            model, optimizer = shard(model, optimizer)
            assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        rows, found = tokens(4), []
        for _ in range(3):
            part = rows[2 * rank : 2 * rank + 2] if is_sharded else rows
            loss = model(part, labels=part).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            mean = loss.detach().clone()
            if is_sharded:
                dist.all_reduce(mean)
            found.append(mean.item() / (2 if is_sharded else 1))
        return found

    def work() -> None:
        assert losses(dist.get_rank(), True) == pytest.approx(losses(0, False), rel=1e-5)

    pytest.importorskip("accelerate")  # in the forks it is imported already
    assert in_gloo_forks(2, tmp_path / "store", work)


def test_the_name_is_registered():
    assert ALL_EXPERTS_FUNCTIONS["momoe"] is adapter.momoe_experts_forward


def test_earlier_transformers_are_refused():
    message = "momoe_titan.adapters.transformers needs transformers 5.8 or later, found 5.5.4"
    with pytest.raises(ImportError, match=message):
        adapter.register("5.5.4")
