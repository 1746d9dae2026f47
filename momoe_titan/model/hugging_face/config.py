"""Which Hugging Face format holds a model, and its config.json, both ways.

Formats are named by transformers' `model_type`. A model fits one of them at most, by its scores
and its normalisation of queries and keys:

    scores    qk_norm           format      of
    softmax   none              mixtral     Mixtral
    softmax   per_head          qwen3_moe   Qwen3-MoE
    softmax   full              olmoe       OLMoE
    sigmoid   none, per_head    glm4_moe    GLM-4.5: DeepSeek-V3's router and shared experts with
                                            llama's attention
"""

import dataclasses
import json
import os
from typing import Any

import torch
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torchtitan.models.llama3.model.args import RoPEScalingArgs
from torchtitan.models.moe import MoEArgs

from momoe_titan.config.hugging_face import FORMATS_WITH_BIAS
from momoe_titan.config.model_args import ModelArgs
from momoe_titan.data.tokenizer import TextTokenizer
from momoe_titan.model.hugging_face.tokenizer import export_tokenizer
from momoe_titan.model.rope import YarnArgs, yarn_attention_factor

ARCHITECTURES = {
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
}
# Formats that are often asked for, and what of them this package does not compute
NEAR_FORMATS = {
    "qwen2_moe": "its attention has biases, and its shared expert a gate of its own",
    "deepseek_v3": "its attention is compressed (MLA)",
    "deepseek_v2": "its attention is compressed (MLA)",
    "gpt_oss": "its experts have biases and another activation, and its attention has sinks",
    "llama": "it has no experts",
}
ROPE_TYPES = ("default", "llama3", "yarn")
# Fields of an imported config.json that an export does not keep: other names of what it writes itself, and what tells
# of the imported files.
NOT_KEPT = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "rope_parameters",
    "original_max_position_embeddings",
    "dtype",
    "transformers_version",
    "momoe_titan",
    "_name_or_path",
)
BIAS_FILE = "expert_bias.safetensors"  # beside the weights, of a model whose format has no place for the bias


def hf_format(args: ModelArgs) -> str:
    """transformers' `model_type` of the class that computes what this model computes.

    Raises:
        ValueError: there is none; says why.
    """
    if args.moe_args.score_func == "sigmoid":
        name = "glm4_moe"
    else:
        name = {"none": "mixtral", "per_head": "qwen3_moe", "full": "olmoe"}[args.qk_norm]
    reasons = [reason for applies, reason in _reasons_against(name, args) if applies]
    if reasons:
        raise ValueError(
            f"no Hugging Face format holds this model; the nearest, {name!r}, does not: " + "; ".join(reasons)
        )
    return name


def _reasons_against(name: str, args: ModelArgs) -> list[tuple[bool, str]]:
    """(whether it applies, why this format does not hold the model)."""
    moe = args.moe_args
    any_format = [(moe.gate_bias, "moe_args.gate_bias is True: its routers have no bias")]
    softmax = [
        (
            moe.num_shared_experts > 0,
            f"moe_args.num_shared_experts is {moe.num_shared_experts}: with softmax scores it has none",
        ),
        (moe.route_scale != 1, f"moe_args.route_scale is {moe.route_scale}: with softmax scores it is 1"),
    ]
    others = args.other_dense_layers
    all_moe = (
        args.has_dense_layers,
        f"n_dense_layers is {args.n_dense_layers} and other_dense_layers {others}: all its layers are MoE layers",
    )
    one_format = {
        "mixtral": [
            *softmax,
            (not moe.route_norm, "moe_args.route_norm is False: its scores add up to 1"),
            all_moe,
        ],
        "qwen3_moe": softmax,
        "olmoe": [
            *softmax,
            all_moe,
            (
                args.attention_head_dim * args.n_heads != args.dim,
                f"head_dim is {args.attention_head_dim}, must be dim / n_heads",
            ),
        ],
        "glm4_moe": [
            (args.qk_norm == "full", "qk_norm is 'full': with sigmoid scores it has 'none' or 'per_head'"),
            (moe.num_experts < 2, "moe_args.num_experts is 1, must be at least 2"),
            (bool(others), f"other_dense_layers is {others}: its dense layers are the first ones"),
        ],
    }
    return any_format + one_format[name]


def hf_config(args: ModelArgs) -> dict[str, Any]:
    """config.json of the model, for transformers 4 and 5.

    Keeps the fields of the config.json that the model came with, except those that this package sets.

    Raises:
        ValueError: no format holds the model.
    """
    name = hf_format(args)
    imported = args.hf_fields if args.hf_fields.get("model_type") == name else {}
    kept = {field: value for field, value in imported.items() if field not in NOT_KEPT}
    # The classes' own defaults are ids of their tokenizers.
    no_tokens: dict[str, Any] = {f"{token}_token_id": None for token in ("bos", "eos", "pad")}
    return (
        no_tokens
        | kept
        | {
            "architectures": [ARCHITECTURES[name]],
            "model_type": name,
            "vocab_size": args.vocab_size,
            "hidden_size": args.dim,
            "num_hidden_layers": args.n_layers,
            "num_attention_heads": args.n_heads,
            "num_key_value_heads": args.n_kv_heads or args.n_heads,
            "head_dim": args.attention_head_dim,
            # of a model that is trained on shorter sequences than it was made for, the longer
            "max_position_embeddings": max(args.max_seq_len, imported.get("max_position_embeddings", 0)),
            "rms_norm_eps": args.norm_eps,
            "rope_theta": float(args.rope_theta),
            "rope_scaling": rope_scaling_fields(args),
            "num_experts_per_tok": args.moe_args.top_k,
            "hidden_act": "silu",
            "tie_word_embeddings": args.tie_word_embeddings,
            **FORMAT_FIELDS[name](args),
        }
    )


def rope_scaling_fields(args: ModelArgs) -> dict[str, Any] | None:
    """`rope_scaling` of config.json, which transformers 5 reads as well as 4; None where RoPE is not rescaled."""
    yarn, llama3 = args.yarn_args, args.rope_scaling_args
    if yarn is not None:
        return {"rope_type": "yarn", **dataclasses.asdict(yarn)}
    if llama3.scaling_factor == 1:
        return None
    fields = dataclasses.asdict(llama3)
    return {"rope_type": "llama3", "factor": fields.pop("scaling_factor"), **fields}


def _mixtral_fields(args: ModelArgs) -> dict[str, Any]:
    return {
        "intermediate_size": args.moe_hidden_dim,
        "num_local_experts": args.moe_args.num_experts,
        "sliding_window": None,
    }


def _qwen3_moe_fields(args: ModelArgs) -> dict[str, Any]:
    return {
        "intermediate_size": _dense_width(args),
        "moe_intermediate_size": args.moe_hidden_dim,
        "num_experts": args.moe_args.num_experts,
        "norm_topk_prob": args.moe_args.route_norm,
        "mlp_only_layers": [i for i in range(args.n_layers) if i not in args.moe_layer_ids],
        "decoder_sparse_step": 1,
        "attention_bias": False,
    }


def _olmoe_fields(args: ModelArgs) -> dict[str, Any]:
    return {
        "intermediate_size": args.moe_hidden_dim,
        "num_experts": args.moe_args.num_experts,
        "norm_topk_prob": args.moe_args.route_norm,
        "clip_qkv": None,
        "attention_bias": False,
    }


def _glm4_moe_fields(args: ModelArgs) -> dict[str, Any]:
    return {
        "intermediate_size": _dense_width(args),
        "moe_intermediate_size": args.moe_hidden_dim,
        "n_routed_experts": args.moe_args.num_experts,
        "n_shared_experts": args.moe_args.num_shared_experts,
        "first_k_dense_replace": args.n_dense_layers,
        "norm_topk_prob": args.moe_args.route_norm,
        "routed_scaling_factor": args.moe_args.route_scale,
        "n_group": 1,
        "topk_group": 1,
        "use_qk_norm": args.qk_norm == "per_head",
        "partial_rotary_factor": 1.0,
        "num_nextn_predict_layers": 0,
        "attention_bias": False,
    }


def _dense_width(args: ModelArgs) -> int:
    """Width of the dense layers; where there are none the format still wants a width."""
    return args.dense_hidden_dim or args.moe_hidden_dim


# What config.json has in one format only.
FORMAT_FIELDS = {
    "mixtral": _mixtral_fields,
    "qwen3_moe": _qwen3_moe_fields,
    "olmoe": _olmoe_fields,
    "glm4_moe": _glm4_moe_fields,
}


def fields_from_hf_config(config: dict[str, Any]) -> dict[str, Any]:
    """Fields of `MomoeLlamaArgs` that a config.json describes.

    Raises:
        ValueError: names what of the described model this package does not compute.
    """
    name = config.get("model_type")
    if name not in ARCHITECTURES:
        why = f": {NEAR_FORMATS[name]}" if name in NEAR_FORMATS else ""
        raise ValueError(f"model_type is {name!r}, must be one of {tuple(ARCHITECTURES)}{why}")
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}  # as transformers 5 does
    _check_computed(name, config, rope)
    try:
        shape, moe = FORMAT_SHAPES[name](config)
        moe = {
            "top_k": config["num_experts_per_tok"],
            "num_shared_experts": 0,
            "score_func": "softmax",
            "route_norm": name == "mixtral" or config["norm_topk_prob"],
            "score_before_experts": False,
            **moe,
        }
        return {
            "dim": config["hidden_size"],
            "n_layers": config["num_hidden_layers"],
            "n_heads": config["num_attention_heads"],
            "n_kv_heads": config.get("num_key_value_heads"),
            "head_dim": config.get("head_dim"),
            "vocab_size": config["vocab_size"],
            "max_seq_len": config["max_position_embeddings"],
            "norm_eps": config["rms_norm_eps"],
            "rope_theta": rope["rope_theta"] if "rope_theta" in rope else config["rope_theta"],
            **_rope_scaling(config, rope),
            "tie_word_embeddings": config.get("tie_word_embeddings", False),
            "moe_args": MoEArgs(**moe),
            "hf_fields": config,
            **shape,
        }
    except KeyError as e:
        raise ValueError(f"this {name} model's config.json lacks {e}") from e


def _check_computed(name: str, config: dict[str, Any], rope: dict[str, Any]) -> None:
    """Refuse a config.json with something that this package does not compute."""
    windowed = config.get("use_sliding_window", name == "mixtral")
    rotary = 1.0
    if name == "glm4_moe":  # 0.5 is what transformers takes where none is given
        rotary = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 0.5))
    for field, value, *computed in (
        ("hidden_act", config.get("hidden_act", "silu"), "silu"),
        ("attention_bias", config.get("attention_bias", False), False),
        ("quantization_config", config.get("quantization_config"), None),
        ("rope type", _rope_type(rope), *ROPE_TYPES),
        ("sliding_window", config.get("sliding_window") if windowed else None, None),
        ("clip_qkv", config.get("clip_qkv"), None),
        ("n_group", config.get("n_group", 1), 1),
        ("partial_rotary_factor", rotary, 1.0),
    ):
        if value not in computed:
            must = f"{computed[0]!r}" if len(computed) == 1 else f"one of {tuple(computed)}"
            raise ValueError(f"{field} of this {name} model is {value!r}, must be {must}")


def _rope_type(rope: dict[str, Any]) -> str:
    return rope.get("rope_type", rope.get("type", "default"))


def _rope_scaling(config: dict[str, Any], rope: dict[str, Any]) -> dict[str, Any]:
    """Fields of `MomoeLlamaArgs` that rescale RoPE."""
    kind = _rope_type(rope)
    if kind == "default":
        return {}
    longest = config["max_position_embeddings"]
    context = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings", longest)
    if kind == "llama3":
        scaling = RoPEScalingArgs(rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"], context)
        return {"rope_scaling_args": scaling}
    factor = rope["factor"] or longest / context
    attention_factor = rope.get("attention_factor")
    if attention_factor is None:
        attention_factor = yarn_attention_factor(factor, rope.get("mscale"), rope.get("mscale_all_dim"))
    return {
        "yarn_args": YarnArgs(
            factor=factor,
            original_max_position_embeddings=context,
            attention_factor=attention_factor,
            beta_fast=rope.get("beta_fast") or 32.0,
            beta_slow=rope.get("beta_slow") or 1.0,
            truncate=rope.get("truncate", True),
        )
    }


def _mixtral_shape(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    return {"moe_hidden_dim": config["intermediate_size"]}, {"num_experts": config["num_local_experts"]}


def _qwen3_moe_shape(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    named, every = config.get("mlp_only_layers") or [], config.get("decoder_sparse_step", 1)
    n_layers = config["num_hidden_layers"]
    dense = [i for i in range(n_layers) if i in named or (i + 1) % every]
    first = next((i for i in range(n_layers) if i not in dense), n_layers)
    shape = {
        "qk_norm": "per_head",
        "moe_hidden_dim": config["moe_intermediate_size"],
        "n_dense_layers": first,
        "other_dense_layers": dense[first:],
        "dense_hidden_dim": config["intermediate_size"],
    }
    # transformers 5 writes the second name
    return shape, {"num_experts": config.get("num_experts") or config["num_local_experts"]}


def _olmoe_shape(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    return {"qk_norm": "full", "moe_hidden_dim": config["intermediate_size"]}, {"num_experts": config["num_experts"]}


def _glm4_moe_shape(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    shape = {
        "qk_norm": "per_head" if config["use_qk_norm"] else "none",
        "moe_hidden_dim": config["moe_intermediate_size"],
        "n_dense_layers": config["first_k_dense_replace"],
        "dense_hidden_dim": config["intermediate_size"],
    }
    moe = {
        "num_experts": config["n_routed_experts"],
        "num_shared_experts": config["n_shared_experts"],
        "score_func": "sigmoid",
        "route_scale": config["routed_scaling_factor"],
    }
    return shape, moe


# (fields of the model, fields of its moe_args) that a config.json describes in one format only.
FORMAT_SHAPES = {
    "mixtral": _mixtral_shape,
    "qwen3_moe": _qwen3_moe_shape,
    "olmoe": _olmoe_shape,
    "glm4_moe": _glm4_moe_shape,
}


def read_config(folder: str) -> dict[str, Any]:
    """config.json of a Hugging Face folder.

    Raises:
        ValueError: there is none that can be read; names the file.
    """
    path = os.path.join(folder, "config.json")
    try:
        with open(path, encoding="utf-8") as f:
            config = json.load(f)
    except (OSError, ValueError) as e:
        raise ValueError(f"{path}: {e}") from e
    if not isinstance(config, dict):
        raise ValueError(f"{path}: no JSON object")
    return config


def read_hf_fields(folder: str) -> dict[str, Any]:
    """Fields of `MomoeLlamaArgs` of the model in a Hugging Face folder.

    Raises:
        ValueError: no readable config.json, or another kind of model; names the file.
    """
    config = read_config(folder)
    try:
        return fields_from_hf_config(config)
    except ValueError as e:
        raise ValueError(f"{os.path.join(folder, 'config.json')}: {e}") from e


def holds_no_bias(folder: str) -> str | None:
    """The format of a Hugging Face folder if it has no place for the balancing bias; None otherwise, or if unknown."""
    try:
        name = read_config(folder).get("model_type")
    except ValueError:
        return None
    return name if name in ARCHITECTURES and name not in FORMATS_WITH_BIAS else None


def saved_dtype(folder: str) -> torch.dtype:
    """The dtype of the weights in a Hugging Face folder."""
    saved: Any = HuggingFaceStorageReader(folder).read_metadata().state_dict_metadata
    return saved["model.norm.weight"].properties.dtype


def write_hf_config(folder: str, args: ModelArgs, assets: str, dtype: torch.dtype, bias_file: bool = False) -> None:
    """Write config.json and the tokenizer's files, so that transformers' `from_pretrained` loads
    the folder.

    Args:
        folder: made where it is missing.
        args: of the model.
        assets: folder of the tokenizer.
        dtype: of the weights.
        bias_file: whether the load-balancing bias lies in `BIAS_FILE`, because the format has no
            place for it; config.json then says so.

    Raises:
        ValueError: no format holds the model.
    """
    config = hf_config(args) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    tokenizer = TextTokenizer(assets)
    for name, own in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id)):
        imported = config[f"{name}_token_id"]
        among = isinstance(imported, list) and own in imported  # several tokens that end a text
        if own is not None and not among:
            config[f"{name}_token_id"] = own
    if bias_file:
        config["momoe_titan"] = {
            "expert_bias": BIAS_FILE,
            "note": "Trained with a bias for the choice of experts that this format cannot hold: "
            "transformers ignores it and computes another model.",
        }
    os.makedirs(folder, exist_ok=True)
    export_tokenizer(tokenizer, assets, folder)
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(config, f, indent=2)
