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

import json
import os
import shutil
from typing import Any

import torch
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.models.moe import MoEArgs

from momoe_titan.config.model_args import ModelArgs

ARCHITECTURES = {
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
}
BIAS_FILE = "expert_bias.safetensors"  # beside the weights, of a model whose format has no place for the bias
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)


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
    moe, factor = args.moe_args, args.rope_scaling_args.scaling_factor
    any_format = [
        (moe.gate_bias, "moe_args.gate_bias is True: its routers have no bias"),
        (factor != 1, f"rope_scaling_args.scaling_factor is {factor}, must be 1"),
    ]
    softmax = [
        (
            moe.num_shared_experts > 0,
            f"moe_args.num_shared_experts is {moe.num_shared_experts}: with softmax scores it has none",
        ),
        (moe.route_scale != 1, f"moe_args.route_scale is {moe.route_scale}: with softmax scores it is 1"),
    ]
    all_moe = (args.n_dense_layers > 0, f"n_dense_layers is {args.n_dense_layers}: all its layers are MoE layers")
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
        ],
    }
    return any_format + one_format[name]


def hf_config(args: ModelArgs) -> dict[str, Any]:
    """config.json of the model, for transformers 4 and 5.

    Raises:
        ValueError: no format holds the model.
    """
    name = hf_format(args)
    return {
        "architectures": [ARCHITECTURES[name]],
        "model_type": name,
        "vocab_size": args.vocab_size,
        "hidden_size": args.dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads or args.n_heads,
        "head_dim": args.attention_head_dim,
        "max_position_embeddings": args.max_seq_len,
        "rms_norm_eps": args.norm_eps,
        "rope_theta": float(args.rope_theta),
        "num_experts_per_tok": args.moe_args.top_k,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        # The classes' own defaults are ids of their tokenizers.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **FORMAT_FIELDS[name](args),
    }


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
        "mlp_only_layers": list(range(args.n_dense_layers)),
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
        raise ValueError(f"model_type is {name!r}, must be one of {tuple(ARCHITECTURES)}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
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
            "moe_args": MoEArgs(**moe),
            **shape,
        }
    except KeyError as e:
        raise ValueError(f"this {name} model's config.json lacks {e}") from e


def _check_computed(name: str, config: dict[str, Any], rope: dict[str, Any]) -> None:
    """Refuse a config.json with something that this package does not compute."""
    dense_layers = config.get("mlp_only_layers") or []
    windowed = config.get("use_sliding_window", name == "mixtral")
    rotary = 1.0
    if name == "glm4_moe":  # 0.5 is what transformers takes where none is given
        rotary = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 0.5))
    for field, value, computed in (
        ("hidden_act", config.get("hidden_act", "silu"), "silu"),
        ("attention_bias", config.get("attention_bias", False), False),
        ("tie_word_embeddings", config.get("tie_word_embeddings", False), False),
        ("rope type", rope.get("rope_type", rope.get("type", "default")), "default"),
        ("sliding_window", config.get("sliding_window") if windowed else None, None),
        ("clip_qkv", config.get("clip_qkv"), None),
        ("decoder_sparse_step", config.get("decoder_sparse_step", 1), 1),
        ("mlp_only_layers", dense_layers, list(range(len(dense_layers)))),
        ("n_group", config.get("n_group", 1), 1),
        ("partial_rotary_factor", rotary, 1.0),
    ):
        if value != computed:
            raise ValueError(f"{field} of this {name} model is {value!r}, must be {computed!r}")


def _mixtral_shape(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    return {"moe_hidden_dim": config["intermediate_size"]}, {"num_experts": config["num_local_experts"]}


def _qwen3_moe_shape(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    shape = {
        "qk_norm": "per_head",
        "moe_hidden_dim": config["moe_intermediate_size"],
        "n_dense_layers": len(config.get("mlp_only_layers") or []),
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


def read_hf_fields(folder: str) -> dict[str, Any]:
    """Fields of `MomoeLlamaArgs` of the model in a Hugging Face folder.

    Raises:
        ValueError: no readable config.json, or another kind of model; names the file.
    """
    path = os.path.join(folder, "config.json")
    try:
        with open(path, encoding="utf-8") as f:
            return fields_from_hf_config(json.load(f))
    except (OSError, ValueError) as e:
        raise ValueError(f"{path}: {e}") from e


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
    tokenizer = HuggingFaceTokenizer(assets)
    for name in ("bos", "eos"):
        config[f"{name}_token_id"] = getattr(tokenizer, f"{name}_id")
    if bias_file:
        config["momoe_titan"] = {
            "expert_bias": BIAS_FILE,
            "note": "Trained with a bias for the choice of experts that this format cannot hold: "
            "transformers ignores it and computes another model.",
        }
    os.makedirs(folder, exist_ok=True)
    _copy_tokenizer(assets, folder)
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(config, f, indent=2)


def _copy_tokenizer(assets: str, folder: str) -> None:
    for name in TOKENIZER_FILES:
        source = os.path.join(assets, name)
        if os.path.isfile(source) and not os.path.samefile(assets, folder):
            shutil.copy(source, folder)
    # Where no class is named, transformers takes the class of the model type, which may split text otherwise.
    path = os.path.join(folder, "tokenizer_config.json")
    tokenizer_config = {}
    if os.path.isfile(path):
        with open(path) as f:
            tokenizer_config = json.load(f)
    if "tokenizer_class" not in tokenizer_config:
        with open(path, "w") as f:
            json.dump({**tokenizer_config, "tokenizer_class": "PreTrainedTokenizerFast"}, f, indent=2)
