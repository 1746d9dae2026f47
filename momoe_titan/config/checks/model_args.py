"""Checks that the arguments of a model fit each other."""

from typing import Any

from momoe_titan.config.model_args import ModelArgs
from momoe_titan.config.section import BACKENDS, BALANCE_RULES
from momoe_titan.save_percent import check_num_layers, validate_save_percent

QK_NORMS = ("none", "per_head", "full")
SCORE_FUNCS = ("softmax", "sigmoid")


def check_model_args(args: ModelArgs, section: str = "") -> None:
    """Refuse arguments with which no model can be built.

    Args:
        args: of the model, also of one that no job has configured.
        section: put before the names of fields that a job sets in a section of its own.

    Raises:
        ValueError: names the field and its value.
    """
    _check_sizes(args)
    _check_attention(args)
    _check_moe(args.moe_args)
    _check_experts(args, section)


def _check_sizes(args: ModelArgs) -> None:
    for name in ("dim", "n_heads", "vocab_size", "moe_hidden_dim", "max_seq_len"):
        _check_count(name, getattr(args, name), 1)
    for name in ("num_experts", "top_k"):
        _check_count(f"moe_args.{name}", getattr(args.moe_args, name), 1)
    _check_count("n_layers", args.n_layers, 0)
    _check_count("n_dense_layers", args.n_dense_layers, 0)
    _check_count("moe_args.num_shared_experts", args.moe_args.num_shared_experts, 0)
    if args.n_dense_layers > args.n_layers:
        raise ValueError(f"n_dense_layers is {args.n_dense_layers}, more than n_layers, {args.n_layers}")
    if others := [i for i in args.other_dense_layers if i not in range(args.n_dense_layers, args.n_layers)]:
        raise ValueError(
            f"other_dense_layers names {others}, must name layers from n_dense_layers, {args.n_dense_layers}, "
            f"to {args.n_layers - 1}"
        )
    if args.has_dense_layers:
        _check_count("dense_hidden_dim", args.dense_hidden_dim, 1)


def _check_attention(args: ModelArgs) -> None:
    if args.n_kv_heads is not None:
        _check_count("n_kv_heads", args.n_kv_heads, 1)
        if args.n_heads % args.n_kv_heads:
            raise ValueError(f"n_heads is {args.n_heads}, must be a multiple of n_kv_heads, {args.n_kv_heads}")
    if args.head_dim is None and args.dim % args.n_heads:
        raise ValueError(
            f"dim is {args.dim}, must be a multiple of n_heads, {args.n_heads}, where head_dim is not given"
        )
    # RoPE turns pairs of columns.
    if args.attention_head_dim < 2 or args.attention_head_dim % 2:
        raise ValueError(f"head_dim is {args.attention_head_dim}, must be even and positive")
    if args.yarn_args is not None and args.rope_scaling_args.scaling_factor != 1:
        raise ValueError(
            f"yarn_args is given and rope_scaling_args.scaling_factor is {args.rope_scaling_args.scaling_factor}: "
            "RoPE is rescaled by one rule"
        )
    if args.qk_norm not in QK_NORMS:
        raise ValueError(f"qk_norm is {args.qk_norm!r}, must be one of {QK_NORMS}")
    if args.qk_norm != "none" and args.attn_type != "sdpa" and not args.document_mask:
        raise ValueError(
            f"qk_norm is {args.qk_norm!r} and attn_type is {args.attn_type!r}: normalised "
            "queries and keys need attn_type 'sdpa'"
        )


def _check_moe(moe: Any) -> None:
    if moe.top_k > moe.num_experts:
        raise ValueError(f"moe_args.top_k is {moe.top_k}, more than moe_args.num_experts, {moe.num_experts}")
    if moe.score_func not in SCORE_FUNCS:
        raise ValueError(f"moe_args.score_func is {moe.score_func!r}, must be one of {SCORE_FUNCS}")
    if moe.top_k == 1 < moe.num_experts and moe.route_norm:
        raise ValueError(
            "moe_args.route_norm is True, must be False where moe_args.top_k is 1: one score divided by itself is "
            "always 1, and the router would get no gradient"
        )
    if moe.score_before_experts:
        raise ValueError("moe_args.score_before_experts is True, must be False: scores multiply the experts' outputs")
    if moe.num_expert_groups is not None:
        raise ValueError(
            f"moe_args.num_expert_groups is {moe.num_expert_groups}, must be None: "
            "node-limited routing is not supported"
        )


def _check_experts(args: ModelArgs, section: str) -> None:
    """The fields that a job sets in the section `[momoe]`."""
    layers = args.moe_layer_ids
    check_num_layers(args.save_percent, len(layers), f"{section}save_percent")
    for i, percent in enumerate(args.save_percent):
        validate_save_percent(percent, f"{section}save_percent[{i}]")
    for name, allowed in (("backend", BACKENDS), ("load_balance_rule", BALANCE_RULES)):
        if (value := getattr(args, name)) not in allowed:
            raise ValueError(f"{section}{name} is {value!r}, must be one of {allowed}")
    rate = args.load_balance_rate
    if type(rate) not in (int, float) or not 0 <= rate < float("inf"):
        raise ValueError(f"{section}load_balance_rate is {rate!r}, must be finite and at least 0")
    if others := [i for i in args.load_balance_off_layers if i not in layers]:
        raise ValueError(f"{section}load_balance_off_layers names {others}, but the MoE layers are {layers}")


def _check_count(name: str, value: Any, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} is {value!r}, must be an integer of at least {minimum}")
