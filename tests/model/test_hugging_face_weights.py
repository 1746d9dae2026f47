"""Hugging Face's models and ours: equal logits, both ways, on models that are built here."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch as safetensors_torch
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed import fake_pg  # noqa: F401
from torchtitan.components.checkpoint import (
    MODEL,
    AsyncMode,
    CheckpointManager,
    ModelWrapper,
)
from torchtitan.config import ConfigManager

from momoe_titan.components.hugging_face import check_hf_weights, keep_published_routing
from momoe_titan.components.trainer import check_config
from momoe_titan.config.section import Momoe
from momoe_titan.model import MomoeLlama, MomoeLlamaArgs, MomoeStateDictAdapter, flavors
from momoe_titan.model.args import args_from_hf_config, read_hf_args
from momoe_titan.model.flavors import AUX_LOSS_WEIGHT
from momoe_titan.model.hugging_face.config import (
    BIAS_FILE,
    hf_config,
    hf_format,
    write_hf_config,
)
from momoe_titan.model.hugging_face.files import check_hf_files
from momoe_titan.model.hugging_face.names import hf_shapes
from tests.support import commands
from tests.support.tiny import VOCAB, batch, build, job_config, loss_of, moes, optimizers_for, tiny_args

ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / "momoe_titan/assets/tokenizer"
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "num_experts_per_tok": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MIXTRAL = SHAPE | {"intermediate_size": 12, "num_local_experts": 5}
# With contexts so short that every case of the rules occurs among a few columns and 16 positions
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 64}
QWEN = SHAPE | {"head_dim": 16, "moe_intermediate_size": 12, "num_experts": 5}
OLMOE = SHAPE | {"intermediate_size": 12, "num_experts": 5}
GLM = SHAPE | {
    "head_dim": 16,
    "intermediate_size": 20,
    "moe_intermediate_size": 12,
    "n_routed_experts": 5,
    "partial_rotary_factor": 1.0,
    "num_nextn_predict_layers": 0,
}
# transformers' configuration class and its arguments
MODELS = {
    "mixtral": ("MixtralConfig", SHAPE | {"intermediate_size": 12, "num_local_experts": 5}),
    "mixtral, wide heads": (
        "MixtralConfig",
        SHAPE | {"intermediate_size": 12, "num_local_experts": 5, "head_dim": 12},
    ),
    "qwen3_moe": ("Qwen3MoeConfig", QWEN | {"norm_topk_prob": True}),
    "qwen3_moe, a dense layer": (
        "Qwen3MoeConfig",
        QWEN | {"norm_topk_prob": False, "mlp_only_layers": [0], "rope_theta": 500.0},
    ),
    "olmoe": ("OlmoeConfig", OLMOE | {"norm_topk_prob": False}),
    "olmoe, normalised scores": ("OlmoeConfig", OLMOE | {"norm_topk_prob": True}),
    "glm4_moe": (
        "Glm4MoeConfig",
        GLM | {"n_shared_experts": 2, "routed_scaling_factor": 2.5, "rms_norm_eps": 1e-3},
    ),
    "glm4_moe, queries and keys normalised": (
        "Glm4MoeConfig",
        GLM | {"use_qk_norm": True, "norm_topk_prob": False, "first_k_dense_replace": 0},
    ),
    "glm4_moe, no shared experts": ("Glm4MoeConfig", GLM | {"n_shared_experts": 0}),
    "mixtral, tied": ("MixtralConfig", MIXTRAL | {"tie_word_embeddings": True}),
    "mixtral, llama3": ("MixtralConfig", MIXTRAL | {"rope_parameters": LLAMA3}),
    "olmoe, yarn": ("OlmoeConfig", OLMOE | {"rope_parameters": YARN}),
    "qwen3_moe, yarn, tied, every other layer dense": (
        "Qwen3MoeConfig",
        QWEN
        | {
            "num_hidden_layers": 5,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "intermediate_size": 20,
            "tie_word_embeddings": True,
            "rope_parameters": YARN | {"mscale": 1.2, "mscale_all_dim": 0.7, "beta_fast": 4.0, "truncate": False},
        },
    ),
    "glm4_moe, yarn": (
        "Glm4MoeConfig",
        GLM
        | {
            "use_qk_norm": True,
            "rope_parameters": YARN | {"attention_factor": 1.3, "partial_rotary_factor": 1.0},
        },
    ),
}


def randomise(model: nn.Module, seed: int) -> None:
    """Norms, attention, routers and biases that matter, in a model of transformers' or ours."""
    generator = torch.Generator().manual_seed(seed)
    bias_counts = getattr(getattr(model, "model_args", None), "moe_args", None)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "norm" in name:
            nn.init.uniform_(tensor, 0.5, 1.5, generator=generator)
        elif name.endswith(("q_proj.weight", "k_proj.weight", "wq.weight", "wk.weight")):
            nn.init.normal_(tensor, std=0.5, generator=generator)  # so that positions matter
        elif name.endswith("gate.weight"):
            nn.init.normal_(tensor, generator=generator)
        elif name.endswith("e_score_correction_bias") or (
            name.endswith("expert_bias") and bias_counts.score_func == "sigmoid"
        ):
            nn.init.normal_(tensor, std=0.3, generator=generator)


def hf_model(name: str, seed: int = 0) -> nn.Module:
    config_class, fields = MODELS[name]
    torch.manual_seed(seed)
    config = getattr(transformers, config_class)(**fields)
    model = transformers.AutoModelForCausalLM.from_config(config)
    randomise(model, seed)
    return model.eval()


def manager(model: nn.Module, args, hf_assets_path=None) -> SimpleNamespace:
    """What TorchTitan's checkpoint manager needs to load and save Hugging Face folders."""
    adapter = MomoeStateDictAdapter(args, hf_assets_path)
    return SimpleNamespace(sd_adapter=adapter, states={MODEL: ModelWrapper(model)})


def load_hf(model: nn.Module, args, folder) -> None:
    state = manager(model, args)
    CheckpointManager.dcp_load(state, state.states[MODEL].state_dict(), str(folder), from_hf=True, from_quantized=False)


def save_hf(model: nn.Module, args, folder, hf_assets_path=None) -> None:
    """What `checkpoint.last_save_in_hf` leaves, and config.json."""
    state = manager(model, args, hf_assets_path)
    state_dict = state.states[MODEL].state_dict()
    CheckpointManager.dcp_save(state, state_dict, str(folder), AsyncMode.DISABLED, to_hf=True)
    write_hf_config(str(folder), args, str(TOKENIZER), torch.float32)


def logits(model: nn.Module) -> torch.Tensor:
    tokens = torch.randint(VOCAB, (3, 16), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        out = model(tokens)
    return out if isinstance(out, torch.Tensor) else out.logits


def from_pretrained(folder) -> nn.Module:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("backend", ["torch", "torchtitan"])
def test_logits_are_equal_both_ways(name, backend, tmp_path):
    theirs = hf_model(name)
    theirs.save_pretrained(tmp_path / "theirs")
    args = replace(read_hf_args(tmp_path / "theirs"), backend=backend)
    assert hf_format(args) == theirs.config.model_type
    ours = build(args, seed=1).eval()
    load_hf(ours, args, tmp_path / "theirs")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-4)

    randomise(ours, 2)
    with torch.no_grad():
        for weight in ours.parameters():
            weight.mul_(1.1)
    save_hf(ours, args, tmp_path / "ours")
    assert (logits(ours) - logits(theirs)).abs().max() > 0.1
    back = from_pretrained(tmp_path / "ours")
    assert type(back) is type(theirs)
    torch.testing.assert_close(logits(back), logits(ours), rtol=0, atol=1e-4)
    written = json.loads((tmp_path / "ours/config.json").read_text())
    assert hf_config(read_hf_args(tmp_path / "ours")) == written
    assert read_hf_args(tmp_path / "ours").differences_from_hf(tmp_path / "theirs") == []
    # the names that transformers itself writes
    assert saved(tmp_path / "ours").keys() == saved(tmp_path / "theirs").keys()


@pytest.mark.parametrize("name", [name for name in MODELS if "llama3" in name or "yarn" in name])
def test_rescaled_rope_is_not_plain_rope(name, tmp_path):
    """That the logits are compared where the rescaling shows."""
    theirs = hf_model(name)
    theirs.save_pretrained(tmp_path)
    args = read_hf_args(tmp_path)
    plain = replace(args, yarn_args=None, rope_scaling_args=MomoeLlamaArgs().rope_scaling_args)
    model = build(plain).eval()
    load_hf(model, plain, tmp_path)
    assert (logits(model) - logits(theirs)).abs().max() > 1e-2
    assert [field for field, *_ in plain.differences_from_hf(tmp_path)] == ["rope_scaling"]


@pytest.mark.parametrize("name", ["mixtral, llama3", "olmoe, yarn"])
def test_rope_scaling_in_the_spelling_of_transformers_4(name):
    config_class, fields = MODELS[name]
    config = getattr(transformers, config_class)(**fields).to_dict()
    expected = args_from_hf_config(config)
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope | {"type": rope.pop("rope_type")}}
    assert args_from_hf_config(config) == expected
    # no original context: the model's own maximum
    del config["rope_scaling"]["original_max_position_embeddings"]
    args = args_from_hf_config(config | {"max_position_embeddings": 64})
    assert hf_config(args)["rope_scaling"] == hf_config(expected)["rope_scaling"]


def test_tied_embeddings_are_one_weight_in_training(tmp_path):
    args = tiny_args(tie_word_embeddings=True, dim=32, moe_hidden_dim=12)
    model = build(args)
    assert model.output.weight is model.tok_embeddings.weight
    assert model.output.weight.std() < 0.3  # the output layer's small values
    tokens, labels = batch(0)
    loss_of(model, tokens, labels).backward()
    optimizers_for(model).step()
    save_hf(model, args, tmp_path)
    assert "lm_head.weight" not in saved(tmp_path)
    back = from_pretrained(tmp_path)
    assert back.lm_head.weight is back.model.embed_tokens.weight
    torch.testing.assert_close(logits(back), logits(model.eval()), rtol=0, atol=1e-4)
    job = job_config()
    job.parallelism.pipeline_parallel_degree = 2
    with pytest.raises(ValueError, match="pipeline_parallel_degree is 2, must be 1 with tie_word_embeddings"):
        args.update_from_config(job)


@pytest.mark.parametrize("name", MODELS)
def test_shapes_by_the_arguments_alone_are_those_of_the_model(name):
    config_class, fields = MODELS[name]
    args = args_from_hf_config(getattr(transformers, config_class)(**fields).to_dict())
    with torch.device("meta"):
        model = MomoeLlama(args)
    converted = MomoeStateDictAdapter(args, None).to_hf(model.state_dict())
    assert hf_shapes(args) == {key: tuple(weight.shape) for key, weight in converted.items()}


def broken_folders():
    """(how the folder is broken, what the message must name)."""

    def change(folder, **tensors):
        weights = safetensors_torch.load_file(folder / "model.safetensors")
        for key, tensor in tensors.items():
            if tensor is None:
                del weights[key]
            else:
                weights[key] = tensor
        safetensors_torch.save_file(weights, folder / "model.safetensors")

    def fuse(folder):
        weights = safetensors_torch.load_file(folder / "model.safetensors")
        fused = {key: weight for key, weight in weights.items() if ".experts." not in key}
        for layer in range(3):
            fused[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.zeros(5, 24, 32)
            fused[f"model.layers.{layer}.mlp.experts.down_proj"] = torch.zeros(5, 32, 12)
        safetensors_torch.save_file(fused, folder / "model.safetensors")

    def lose_a_shard(folder):
        weights = safetensors_torch.load_file(folder / "model.safetensors")
        weight_map = {key: f"model-{1 + (key == 'model.norm.weight')}.safetensors" for key in weights}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")

    def truncate(folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-7])

    q = "model.layers.1.self_attn.q_proj.weight"
    file = "model.safetensors"
    expert = r"model.layers.0.mlp.experts.0.gate_proj.weight of shape (12, 32)"
    return {
        "fused experts": (fuse, [file, "model.layers.0.mlp.experts.gate_up_proj, of shape (5, 24, 32)", expert]),
        "a missing shard": (lose_a_shard, ["model-2.safetensors is missing", "model.norm.weight, of shape (32,)"]),
        "another shape": (lambda f: change(f, **{q: torch.zeros(60, 32)}), [file, q, "(60, 32)", "(64, 32)"]),
        "a missing tensor": (lambda f: change(f, **{q: None}), ["no file holds", q, "(64, 32)"]),
        "quantized": (
            lambda f: change(f, **{q: torch.zeros(64, 32, dtype=torch.float8_e4m3fn)}),
            [file, q, "F8_E4M3"],
        ),
        "cut off": (truncate, [file, "bytes"]),
        "no weights": (lambda f: (f / "model.safetensors").unlink(), ["holds no *.safetensors"]),
        "no safetensors": (lambda f: (f / "model.safetensors").write_text("hello, world"), [file, "damaged"]),
    }


@pytest.mark.parametrize("case", broken_folders())
def test_folders_without_the_weights_are_refused_before_anything_is_built(case, tmp_path):
    theirs = hf_model("qwen3_moe")
    theirs.save_pretrained(tmp_path)
    args = read_hf_args(tmp_path)
    check_hf_files(str(tmp_path), args)
    breaks, named = broken_folders()[case]
    breaks(tmp_path)
    job = hf_job(tmp_path, initial_load_in_hf=True)
    job.model.name = "momoe_llama"
    with pytest.raises(ValueError) as refused:
        check_hf_weights(job, args)
    assert [name for name in ["checkpoint.initial_load_in_hf", *named] if name not in str(refused.value)] == []


def test_tensors_beside_the_weights_are_named(tmp_path, caplog):
    args = tiny_args()
    save_hf(build(args), args, tmp_path)
    check_hf_files(str(tmp_path), args)
    assert "NOT PART" not in caplog.text
    safetensors_torch.save_file({"model.layers.0.self_attn.q_proj.bias": torch.ones(2)}, tmp_path / "b.safetensors")
    check_hf_files(str(tmp_path), args)
    assert "1 TENSORS ARE NOT PART OF THIS MODEL AND ARE LEFT OUT: model.layers.0.self_attn.q_proj.bias" in caplog.text


def test_pipeline_stages_convert_alone():
    args = tiny_args()
    model = build(args)
    randomise(model, 0)
    adapter = MomoeStateDictAdapter(args, None)
    state_dict = model.state_dict()
    converted = adapter.to_hf(state_dict)
    first = {key for key in state_dict if key.startswith(("tok", "layers.0.", "layers.1."))}
    stages = [
        {key: value for key, value in state_dict.items() if (key in first) == is_first} for is_first in (True, False)
    ]
    for stage in stages:
        part = adapter.to_hf(stage)
        assert part and all(torch.equal(converted.pop(key), value) for key, value in part.items())
        back = adapter.from_hf(part)
        assert back.keys() == stage.keys()
        assert all(torch.equal(back[key], value) for key, value in stage.items())
    assert not converted


def saved(folder) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in Path(folder).glob("model*.safetensors"):
        tensors |= safetensors_torch.load_file(file)
    return tensors


def test_index_file_of_the_assets_says_how_many_files(tmp_path):
    args = tiny_args()
    model = build(args)
    save_hf(model, args, tmp_path / "one")
    weight_map = json.loads((tmp_path / "one/model.safetensors.index.json").read_text())["weight_map"]
    assert set(weight_map.values()) == {"model-00001-of-00001.safetensors"}
    for i, key in enumerate(weight_map):
        weight_map[key] = f"model-0000{1 + i % 2}-of-00002.safetensors"
    assets = tmp_path / "assets"
    assets.mkdir()
    index = assets / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    save_hf(model, args, tmp_path / "two", str(assets))
    assert len(list((tmp_path / "two").glob("model*.safetensors"))) == 2
    # of another format: not ours to follow
    index.write_text(json.dumps({"weight_map": {"wte.weight": "model-00001-of-00002.safetensors"}}))
    save_hf(model, args, tmp_path / "other", str(assets))
    assert len(list((tmp_path / "other").glob("model*.safetensors"))) == 1
    expected = saved(tmp_path / "one")
    for folder in ("two", "other"):
        tensors = saved(tmp_path / folder)
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[key], expected[key]) for key in expected)


SOFTMAX = {"score_func": "softmax", "num_shared_experts": 0}


@pytest.mark.parametrize(
    "moe, fields, reason",
    [
        ({"gate_bias": True}, {}, "moe_args.gate_bias"),
        ({}, {"qk_norm": "full"}, "qk_norm"),
        ({**SOFTMAX, "num_shared_experts": 1}, {"n_dense_layers": 0}, "num_shared_experts"),
        ({**SOFTMAX, "route_scale": 2.0}, {"n_dense_layers": 0}, "route_scale"),
        ({**SOFTMAX, "route_norm": False}, {"n_dense_layers": 0}, "route_norm"),
        (SOFTMAX, {"n_dense_layers": 1}, "n_dense_layers"),
        (SOFTMAX, {"n_dense_layers": 0, "qk_norm": "full"}, "head_dim"),
        ({"num_experts": 1, "top_k": 1}, {}, "num_experts"),
    ],
)
def test_a_model_that_no_format_holds_is_refused(moe, fields, reason):
    args = tiny_args(moe, **fields)
    model = build(args)
    with pytest.raises(ValueError, match=f"no Hugging Face format.*{reason}"):
        MomoeStateDictAdapter(args, None).to_hf(model.state_dict())


@pytest.mark.parametrize(
    "name, field, value",
    [
        ("mixtral", "model_type", "llama"),
        ("mixtral", "sliding_window", 64),
        ("mixtral", "hidden_act", "gelu"),
        ("mixtral", "quantization_config", {"quant_method": "fp8"}),
        ("mixtral", "rope_parameters", {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
        ("qwen3_moe", "attention_bias", True),
        ("mixtral", "model_type", "qwen2_moe"),
        ("olmoe", "clip_qkv", 8.0),
        ("glm4_moe", "rope_parameters", {"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        ("glm4_moe", "n_group", 5),
    ],
)
def test_a_configuration_that_we_do_not_compute_is_refused(name, field, value, tmp_path):
    config_class, fields = MODELS[name]
    config = getattr(transformers, config_class)(**fields).to_dict()
    args_from_hf_config(config)
    with pytest.raises(ValueError) as refused:
        args_from_hf_config({**config, field: value})
    if field == "rope_parameters":
        field = "rope type" if "rope_type" in value else "partial_rotary_factor"
    assert field in str(refused.value)
    if name == "mixtral":
        del config["num_local_experts"]
        with pytest.raises(ValueError, match="num_local_experts"):
            args_from_hf_config(config)


def test_a_bias_that_the_format_cannot_hold_is_said_and_kept_beside(tmp_path, caplog, monkeypatch):
    from torchtitan.tools.logging import logger

    monkeypatch.setattr(logger, "propagate", True)
    args = tiny_args(SOFTMAX, dim=32, moe_hidden_dim=12, n_dense_layers=0)
    model = build(args)
    save_hf(model, args, tmp_path)
    assert "BIAS" not in caplog.text
    biases = {}
    for i, moe in enumerate(moes(model)):
        moe.expert_bias.copy_(torch.randn(5))
        biases[f"layers.{i}.moe.expert_bias"] = moe.expert_bias
    save_hf(model, args, tmp_path / "biased")
    assert "BIAS IS NOT ZERO AND MIXTRAL CANNOT HOLD IT" in caplog.text
    safetensors_torch.save_file(biases, tmp_path / "biased" / BIAS_FILE)
    again = build(args, seed=1)
    load_hf(again, args, tmp_path / "biased")
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), logits(from_pretrained(tmp_path / "biased")))


# Of the published models, with what their config.json has.
PUBLISHED = {
    "mixtral-8x7b": {"model_type": "mixtral", "rope_theta": 1e6, "rms_norm_eps": 1e-5},
    "30B": {
        "model_type": "qwen3_moe",
        "head_dim": 128,
        "num_hidden_layers": 48,
        "norm_topk_prob": True,
        "rope_theta": 1e6,
        "decoder_sparse_step": 1,
    },
}


@pytest.mark.parametrize("flavor", [name for name in flavors if name != "hf"])
def test_every_flavor_has_a_format_with_as_many_weights(flavor):
    args = flavors[flavor]
    config = hf_config(args)
    if flavor in PUBLISHED:
        # transformers' defaults are those of the published model
        published = transformers.AutoConfig.for_model(**PUBLISHED[flavor])
        given = transformers.AutoConfig.for_model(**config)
        ignored = {"max_position_embeddings", "bos_token_id", "eos_token_id", "intermediate_size"}
        ignored |= {"architectures"} | ({"head_dim"} if flavor == "mixtral-8x7b" else set())
        ignored -= {"intermediate_size"} if flavor == "mixtral-8x7b" else set()
        differ = {k for k, v in published.to_dict().items() if given.to_dict().get(k) != v}
        assert differ <= ignored
    with torch.device("meta"):
        ours = MomoeLlama(args)
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    converted = MomoeStateDictAdapter(args, None).to_hf(ours.state_dict())
    plain = {k: v.shape for k, v in theirs.state_dict().items() if ".experts." not in k}
    names = {k.replace("block_sparse_moe", "mlp"): v.shape for k, v in converted.items() if ".experts." not in k}
    assert names == plain
    assert sum(p.numel() for p in converted.values()) == sum(p.numel() for p in theirs.state_dict().values())


def hf_job(folder, **checkpoint):
    config = job_config()
    config.job.dump_folder = "no such folder"
    config.model.hf_assets_path = str(folder)
    config.checkpoint.enable = True
    for field, value in checkpoint.items():
        setattr(config.checkpoint, field, value)
    return config


def test_flavor_hf_takes_the_shape_from_the_folder(tmp_path):
    theirs = hf_model("qwen3_moe, a dense layer")
    theirs.save_pretrained(tmp_path)
    args = flavors["hf"]
    args.update_from_config(hf_job(tmp_path, initial_load_in_hf=True))
    model = build(args)
    load_hf(model, args, tmp_path)
    torch.testing.assert_close(logits(model.eval()), logits(theirs), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="config.json.*No such file"):
        flavors["hf"].update_from_config(hf_job(tmp_path / "none"))


def test_jobs_that_the_formats_cannot_serve_are_refused(tmp_path):
    hf_model("qwen3_moe").save_pretrained(tmp_path)
    job = hf_job("", initial_load_in_hf=True, initial_load_path=str(tmp_path))
    right = read_hf_args(tmp_path)
    right.update_from_config(job)
    for field, value in (("norm_eps", 1e-3), ("moe_hidden_dim", 16), ("head_dim", 8)):
        with pytest.raises(ValueError, match=f"initial_load_in_hf.*has {field}"):
            replace(right, **{field: value}).update_from_config(job)
    with pytest.raises(ValueError, match=r"has moe_args\.top_k 2 and this one 3"):
        moe = replace(right.moe_args, top_k=3)
        replace(right, moe_args=moe).update_from_config(job)
    job.job.dump_folder, job.checkpoint.initial_load_path = str(tmp_path / "run"), "gone"
    with pytest.raises(ValueError, match="gone/config.json"):
        right.update_from_config(job)
    (tmp_path / "run/checkpoint").mkdir(parents=True)
    right.update_from_config(job)  # resumes, and needs the folder no more

    last = hf_job(tmp_path, last_save_in_hf=True)
    with pytest.raises(ValueError, match="last_save_in_hf.*momoe.load_balance_rate"):
        right.update_from_config(last)
    replace(right, load_balance_rate=0.0).update_from_config(last)
    tiny_args().update_from_config(last)  # sigmoid scores: the format has a place for the bias
    for job in (last, hf_job(tmp_path, initial_load_in_hf=True)):
        with pytest.raises(ValueError, match="_in_hf is true, but no Hugging Face format"):
            tiny_args(qk_norm="full").update_from_config(job)


def test_published_routing_is_kept_unless_the_job_says_otherwise(tmp_path, caplog):
    hf_model("mixtral").save_pretrained(tmp_path / "mixtral")
    hf_model("glm4_moe").save_pretrained(tmp_path / "glm4_moe")
    toml = tmp_path / "job.toml"
    toml.write_text('[momoe]\nload_balance_rule = "sign"\n')

    def rate_of(folder, *options, **checkpoint):
        job = hf_job(tmp_path / folder, **{"initial_load_in_hf": True, **checkpoint})
        job.model.name, job.momoe = "momoe_llama", Momoe()
        caplog.clear()
        keep_published_routing(job, options)
        return job.momoe.load_balance_rate

    assert rate_of("mixtral") == 0
    assert "LOAD BALANCING BY A BIAS IS OFF, because 'mixtral'" in caplog.text
    default = Momoe().load_balance_rate
    for case in (
        rate_of("mixtral", "--momoe.load_balance_rate=0.001"),
        rate_of("mixtral", "--momoe.load_balance_rule", "quantile"),
        rate_of("mixtral", f"--job.config_file={toml}"),
        rate_of("mixtral", initial_load_in_hf=False),
        rate_of("glm4_moe"),
    ):
        assert case == default > 0 and "IS OFF" not in caplog.text

    # the flavor "hf" has the folder's format also where it begins with random weights
    for options, aux_loss in (((), AUX_LOSS_WEIGHT), (("--momoe.aux_loss_weight=0.3",), 0.3)):
        job = hf_job(tmp_path / "mixtral")
        job.model.name, job.model.flavor, job.momoe = "momoe_llama", "hf", Momoe()
        job.momoe.aux_loss_weight = 0.3 if options else 0.0
        caplog.clear()
        keep_published_routing(job, options)
        assert (job.momoe.load_balance_rate, job.momoe.aux_loss_weight) == (0, aux_loss)
        assert f"aux_loss_weight is {aux_loss}" in caplog.text and "'mixtral', the format of the model" in caplog.text

    args = read_hf_args(tmp_path / "mixtral")
    for rate, warned in ((0.0, False), (1e-3, True)):
        caplog.clear()
        replace(args, load_balance_rate=rate).update_from_config(hf_job(tmp_path / "mixtral", initial_load_in_hf=True))
        assert ("has no place: other programs will choose other experts" in caplog.text) == warned


def test_the_shipped_fine_tuning_job_is_accepted(tmp_path, monkeypatch):
    """As its user starts it, with folders of their own."""
    monkeypatch.chdir(ROOT)
    theirs = hf_model("olmoe")
    theirs.resize_token_embeddings(2048)
    theirs.save_pretrained(tmp_path / "model")
    for file in TOKENIZER.glob("*.json"):
        shutil.copy(file, tmp_path / "model")
    (tmp_path / "text.txt").write_text("words")
    folders = [
        f"--model.hf_assets_path={tmp_path / 'model'}",
        f"--training.dataset_path={tmp_path / 'text.txt'}",
        f"--job.dump_folder={tmp_path / 'run'}",
    ]
    job = ConfigManager().parse_args(["--job.config_file=train_configs/finetune_hf.toml", *folders])
    monkeypatch.setenv("WORLD_SIZE", "1")
    check_config(job)
    args = flavors["hf"]
    args.take_settings(job)
    assert not any(args.layer_load_balance_rate(i) for i in args.moe_layer_ids)
    assert hf_config(args)["max_position_embeddings"] == max(32, job.training.seq_len)
    (tmp_path / "model/model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"initial_load_in_hf is true, but .* holds no \*.safetensors"):
        check_config(job)


@pytest.mark.parametrize(
    "field, value, others",
    [
        ("initial_load_in_hf_quantized", True, {"initial_load_in_hf": True}),
        ("initial_load_model_only", False, {"initial_load_in_hf": True}),
        ("last_save_model_only", False, {"last_save_in_hf": True}),
        ("last_save_in_hf", True, {"create_seed_checkpoint": True}),
        ("exclude_from_loading", ["optimizer", "optimizers"], {}),
        ("exclude_from_loading", "optimizer", {}),
    ],
)
def test_checkpoint_options_that_exclude_one_another_are_refused(field, value, others, tmp_path):
    write_hf_config(str(tmp_path), tiny_args(), str(TOKENIZER), torch.float32)
    tiny_args().update_from_config(hf_job(tmp_path, **others))
    job = hf_job(tmp_path, **others, **{field: value})
    shown = str(value).lower() if isinstance(value, bool) else repr(value)
    with pytest.raises(ValueError, match=re.escape(f"checkpoint.{field} is {shown}, must be")):
        tiny_args().update_from_config(job)
    if isinstance(value, str):
        return  # no list, which is refused without checkpoints too
    job.checkpoint.enable = job.checkpoint.create_seed_checkpoint = False
    tiny_args().update_from_config(job)


@pytest.mark.parametrize("backend", ["torch", "torchtitan"])
@pytest.mark.parametrize("rank", range(4))
def test_experts_whose_columns_are_sharded_twice(rank, backend):
    """As by tensor parallelism in them, and FSDP over more ranks than experts."""
    args = tiny_args(backend=backend, moe_hidden_dim=12)
    state_dict = build(args).state_dict()
    adapter = MomoeStateDictAdapter(args, None)
    whole = adapter.to_hf(state_dict)
    twice = [_StridedShard(1, split_factor=2), Shard(1)]
    if backend == "torch":
        placements = {"w1": [Shard(1), Shard(3)], "w2": twice}
    else:
        placements = {"w1": twice, "w2": [Shard(1), Shard(2)], "w3": twice}

    def local_slice(tensor: torch.Tensor, sharded: DTensor) -> torch.Tensor:
        shape, offset = compute_local_shape_and_global_offset(sharded.shape, sharded.device_mesh, sharded.placements)
        return tensor[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]

    dist.init_process_group("fake", rank=rank, world_size=4)
    try:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("efsdp", "etp"))
        i, j = mesh.get_coordinate()
        pieces = {}
        for key, tensor in state_dict.items():
            if ".experts.w" not in key:
                continue
            placed = placements[key[-2:]]
            if placed is twice:  # the columns of a rank of tensor parallelism, then FSDP's half of them
                piece = tensor.chunk(2, 1)[j].chunk(2, 1)[i]
            else:
                piece = tensor.chunk(2, placed[1].dim)[j].chunk(2, 1)[i]
            pieces[key] = piece
            state_dict[key] = DTensor.from_local(
                piece, mesh, placed, run_check=False, shape=tensor.shape, stride=tensor.stride()
            )
        converted = adapter.to_hf(state_dict)
        assert converted.keys() == whole.keys()
        for key, value in converted.items():
            assert isinstance(value, DTensor) == (".experts." in key)
            if isinstance(value, DTensor):
                assert value.shape == whole[key].shape
                assert torch.equal(value.to_local(), local_slice(whole[key], value)), key
        back = adapter.from_hf(converted)
        for key, piece in pieces.items():
            assert back[key].placements == state_dict[key].placements
            assert torch.equal(back[key].to_local(), piece), key
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_sharded_models_load_and_save_as_whole_ones_do(tmp_path):
    """Four processes; see hf_worker.py for how the weights are sharded."""
    args = tiny_args()
    model = build(args, seed=3)
    randomise(model, 3)
    save_hf(model, args, tmp_path / "whole")
    done = commands.run("-m", "tests.support.hf_worker", tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    expected = saved(tmp_path / "whole")
    cases = [folder.name for folder in tmp_path.iterdir() if folder.is_dir() and folder.name != "whole"]
    assert len(cases) == 8
    for case in cases:
        tensors = saved(tmp_path / case)
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[key], expected[key]) for key in expected)
