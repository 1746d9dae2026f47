"""Names and shapes of the weights in a Hugging Face folder."""

from momoe_titan.config.hugging_face import FORMATS_WITH_BIAS
from momoe_titan.config.model_args import ModelArgs
from momoe_titan.model.hugging_face.config import hf_format

INDEX_FILE = "model.safetensors.index.json"
# Ours, and Hugging Face's
TOP_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "moe.router.gate.weight": "mlp.gate.weight",
    "moe.expert_bias": "mlp.gate.e_score_correction_bias",
    "moe.shared_experts.w1.weight": "mlp.shared_experts.gate_proj.weight",
    "moe.shared_experts.w2.weight": "mlp.shared_experts.down_proj.weight",
    "moe.shared_experts.w3.weight": "mlp.shared_experts.up_proj.weight",
}
EXPERT_NAME = "mlp.experts.{}.{}.weight"
# Mixtral's own names for the parts of a layer
MIXTRAL_NAMES = (
    ("mlp.gate.", "block_sparse_moe.gate."),
    ("mlp.experts.", "block_sparse_moe.experts."),
    (".gate_proj.", ".w1."),
    (".down_proj.", ".w2."),
    (".up_proj.", ".w3."),
)


def hf_key(name: str, layer: int | str, part: str) -> str:
    """The name of a part of a layer in this format.

    Args:
        name: the format.
        layer: id of the layer.
        part: as in `LAYER_NAMES`, or an expert's.
    """
    if name == "mixtral" and part.startswith("mlp."):
        for plain, mixtral in MIXTRAL_NAMES:
            part = part.replace(plain, mixtral)
    return f"model.layers.{layer}.{part}"


def plain_key(name: str, key: str) -> str:
    """The inverse of `hf_key`: "layers.LAYER.PART"."""
    if name == "mixtral" and ".block_sparse_moe." in key:
        for plain, mixtral in MIXTRAL_NAMES:
            key = key.replace(mixtral, plain)
    return key.removeprefix("model.")


def hf_shapes(args: ModelArgs) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights of the model in its Hugging Face folder, by their names there.

    Raises:
        ValueError: no format holds the model.
    """
    name, D = hf_format(args), args.dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (args.vocab_size, D),
        "model.norm.weight": (D,),
    }
    if not args.tie_word_embeddings:
        shapes["lm_head.weight"] = (args.vocab_size, D)
    moe_layers = set(args.moe_layer_ids)
    for layer in range(args.n_layers):
        parts = _attention_shapes(args)
        if layer in moe_layers:
            parts |= _moe_shapes(args, name)
        else:
            parts |= _feed_forward_shapes("mlp", args.dense_hidden_dim, D)
        shapes |= {hf_key(name, layer, part): shape for part, shape in parts.items()}
    return shapes


def _attention_shapes(args: ModelArgs) -> dict[str, tuple[int, ...]]:
    D, width, kv_heads = args.dim, args.attention_head_dim, args.n_kv_heads or args.n_heads
    q, kv = args.n_heads * width, kv_heads * width
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (D,),
        "self_attn.q_proj.weight": (q, D),
        "self_attn.k_proj.weight": (kv, D),
        "self_attn.v_proj.weight": (kv, D),
        "self_attn.o_proj.weight": (D, q),
        "post_attention_layernorm.weight": (D,),
    }
    if args.qk_norm != "none":
        per_head = args.qk_norm == "per_head"
        shapes["self_attn.q_norm.weight"] = (width if per_head else q,)
        shapes["self_attn.k_norm.weight"] = (width if per_head else kv,)
    return shapes


def _moe_shapes(args: ModelArgs, name: str) -> dict[str, tuple[int, ...]]:
    D, F, E = args.dim, args.moe_hidden_dim, args.moe_args.num_experts
    shapes: dict[str, tuple[int, ...]] = {"mlp.gate.weight": (E, D)}
    if name in FORMATS_WITH_BIAS:
        shapes[LAYER_NAMES["moe.expert_bias"]] = (E,)
        # which always has shared experts: of width 0 where we have none
        shapes |= _feed_forward_shapes("mlp.shared_experts", args.moe_args.num_shared_experts * F, D)
    for expert in range(E):
        shapes |= _feed_forward_shapes(f"mlp.experts.{expert}", F, D)
    return shapes


def _feed_forward_shapes(prefix: str, width: int, dim: int) -> dict[str, tuple[int, ...]]:
    ins = {f"{prefix}.{projection}_proj.weight": (width, dim) for projection in ("gate", "up")}
    return {**ins, f"{prefix}.down_proj.weight": (dim, width)}
