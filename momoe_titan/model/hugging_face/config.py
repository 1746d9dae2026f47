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
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.models.moe import MoEArgs

from momoe_titan.config.model_args import ModelArgs

ARCHITECTURES = {
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
}
BIAS_FILE = "expert_bias.safetensors"
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
    moe = args.moe_args
    if moe.score_func == "sigmoid":
        name = "glm4_moe"
    else:
        name = {"none": "mixtral", "per_head": "qwen3_moe", "full": "olmoe"}[args.qk_norm]
    glm = name == "glm4_moe"
    reasons = [
        reason
        for applies, reason in (
            (moe.gate_bias, "moe_args.gate_bias is True: its routers have no bias"),
            (
                args.rope_scaling_args.scaling_factor != 1,
                f"rope_scaling_args.scaling_factor is {args.rope_scaling_args.scaling_factor}, must be 1",
            ),
            (
                glm and args.qk_norm == "full",
                "qk_norm is 'full': with sigmoid scores it has 'none' or 'per_head'",
            ),
            (
                not glm and moe.num_shared_experts,
                f"moe_args.num_shared_experts is {moe.num_shared_experts}: with softmax scores it has none",
            ),
            (
                not glm and moe.route_scale != 1,
                f"moe_args.route_scale is {moe.route_scale}: with softmax scores it is 1",
            ),
            (
                name == "mixtral" and not moe.route_norm,
                "moe_args.route_norm is False: its scores add up to 1",
            ),
            (
                name in ("mixtral", "olmoe") and args.n_dense_layers,
                f"n_dense_layers is {args.n_dense_layers}: all its layers are MoE layers",
            ),
            (
                name == "olmoe" and args.attention_head_dim * args.n_heads != args.dim,
                f"head_dim is {args.attention_head_dim}, must be dim / n_heads",
            ),
            (glm and moe.num_experts < 2, "moe_args.num_experts is 1, must be at least 2"),
        )
        if applies
    ]
    if reasons:
        raise ValueError(
            f"no Hugging Face format holds this model; the nearest, {name!r}, does not: " + "; ".join(reasons)
        )
    return name


def hf_config(args: ModelArgs) -> dict[str, Any]:
    """config.json of the model, for transformers 4 and 5.

    Raises:
        ValueError: no format holds the model.
    """
    name = hf_format(args)
    moe = args.moe_args
    config = {
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
        "num_experts_per_tok": moe.top_k,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        # The classes' own defaults are ids of their tokenizers.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    # Of the dense layers; where there are none it must still be a width.
    dense = args.dense_hidden_dim or args.moe_hidden_dim
    match name:
        case "mixtral":
            config |= {
                "intermediate_size": args.moe_hidden_dim,
                "num_local_experts": moe.num_experts,
                "sliding_window": None,
            }
        case "qwen3_moe":
            config |= {
                "intermediate_size": dense,
                "moe_intermediate_size": args.moe_hidden_dim,
                "num_experts": moe.num_experts,
                "norm_topk_prob": moe.route_norm,
                "mlp_only_layers": list(range(args.n_dense_layers)),
                "decoder_sparse_step": 1,
                "attention_bias": False,
            }
        case "olmoe":
            config |= {
                "intermediate_size": args.moe_hidden_dim,
                "num_experts": moe.num_experts,
                "norm_topk_prob": moe.route_norm,
                "clip_qkv": None,
                "attention_bias": False,
            }
        case "glm4_moe":
            config |= {
                "intermediate_size": dense,
                "moe_intermediate_size": args.moe_hidden_dim,
                "n_routed_experts": moe.num_experts,
                "n_shared_experts": moe.num_shared_experts,
                "first_k_dense_replace": args.n_dense_layers,
                "norm_topk_prob": moe.route_norm,
                "routed_scaling_factor": moe.route_scale,
                "n_group": 1,
                "topk_group": 1,
                "use_qk_norm": args.qk_norm == "per_head",
                "partial_rotary_factor": 1.0,
                "num_nextn_predict_layers": 0,
                "attention_bias": False,
            }
    return config


def fields_from_hf_config(config: dict[str, Any]) -> dict[str, Any]:
    """Fields of `MomoeLlamaArgs` that a config.json describes.

    Raises:
        ValueError: names what of it this model does not have.
    """
    name = config.get("model_type")
    if name not in ARCHITECTURES:
        raise ValueError(f"model_type is {name!r}, must be one of {tuple(ARCHITECTURES)}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    dense_layers = config.get("mlp_only_layers") or []
    windowed = config.get("use_sliding_window", name == "mixtral")
    for field, value, allowed in (
        ("hidden_act", config.get("hidden_act", "silu"), ("silu",)),
        ("attention_bias", config.get("attention_bias", False), (False,)),
        ("tie_word_embeddings", config.get("tie_word_embeddings", False), (False,)),
        ("rope type", rope.get("rope_type", rope.get("type", "default")), ("default",)),
        ("sliding_window", config.get("sliding_window") if windowed else None, (None,)),
        ("clip_qkv", config.get("clip_qkv"), (None,)),
        ("decoder_sparse_step", config.get("decoder_sparse_step", 1), (1,)),
        ("mlp_only_layers", dense_layers, (list(range(len(dense_layers))),)),
        ("n_group", config.get("n_group", 1), (1,)),
        (
            "partial_rotary_factor",
            # what transformers takes where none is given
            rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 0.5)) if name == "glm4_moe" else 1.0,
            (1.0,),
        ),
    ):
        if value not in allowed:
            raise ValueError(f"{field} of this {name} model is {value!r}, must be {allowed[0]!r}")
    try:
        rope_theta = rope["rope_theta"] if "rope_theta" in rope else config["rope_theta"]
        moe = {
            "top_k": config["num_experts_per_tok"],
            "num_shared_experts": 0,
            "score_func": "softmax",
            "route_norm": name == "mixtral" or config["norm_topk_prob"],
            "score_before_experts": False,
        }
        shape = {"moe_hidden_dim": config["intermediate_size"]}
        match name:
            case "mixtral":
                moe["num_experts"] = config["num_local_experts"]
            case "qwen3_moe":
                # transformers 5 writes the second name
                moe["num_experts"] = config.get("num_experts") or config["num_local_experts"]
                shape = {
                    "qk_norm": "per_head",
                    "moe_hidden_dim": config["moe_intermediate_size"],
                    "n_dense_layers": len(dense_layers),
                    "dense_hidden_dim": config["intermediate_size"],
                }
            case "olmoe":
                moe["num_experts"] = config["num_experts"]
                shape["qk_norm"] = "full"
            case "glm4_moe":
                moe |= {
                    "num_experts": config["n_routed_experts"],
                    "num_shared_experts": config["n_shared_experts"],
                    "score_func": "sigmoid",
                    "route_scale": config["routed_scaling_factor"],
                }
                shape = {
                    "qk_norm": "per_head" if config["use_qk_norm"] else "none",
                    "moe_hidden_dim": config["moe_intermediate_size"],
                    "n_dense_layers": config["first_k_dense_replace"],
                    "dense_hidden_dim": config["intermediate_size"],
                }
        return dict(
            dim=config["hidden_size"],
            n_layers=config["num_hidden_layers"],
            n_heads=config["num_attention_heads"],
            n_kv_heads=config.get("num_key_value_heads"),
            head_dim=config.get("head_dim"),
            vocab_size=config["vocab_size"],
            max_seq_len=config["max_position_embeddings"],
            norm_eps=config["rms_norm_eps"],
            rope_theta=rope_theta,
            moe_args=MoEArgs(**moe),
            **shape,
        )
    except KeyError as e:
        raise ValueError(f"this {name} model's config.json lacks {e}") from e


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
    """Of the weights in a Hugging Face folder."""
    saved = HuggingFaceStorageReader(folder).read_metadata().state_dict_metadata
    return saved["model.norm.weight"].properties.dtype


def write_hf_config(folder: str, args: ModelArgs, assets: str, dtype: torch.dtype, bias_file: bool = False) -> None:
    """Write config.json and the tokenizer's files, so that transformers' `from_pretrained` loads
    the folder.

    Args:
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
    for name in TOKENIZER_FILES:
        source = os.path.join(assets, name)
        if os.path.isfile(source) and not os.path.samefile(assets, folder):
            shutil.copy(source, folder)
    # Without a class transformers takes the one of the model type, which may split text otherwise.
    path = os.path.join(folder, "tokenizer_config.json")
    tokenizer_config = {}
    if os.path.isfile(path):
        with open(path) as f:
            tokenizer_config = json.load(f)
    if "tokenizer_class" not in tokenizer_config:
        with open(path, "w") as f:
            json.dump({**tokenizer_config, "tokenizer_class": "PreTrainedTokenizerFast"}, f, indent=2)
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(config, f, indent=2)
