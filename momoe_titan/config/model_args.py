"""What the checks of a job read of its model's arguments."""

from typing import Any, Protocol


class ModelArgs(Protocol):
    """The part of `momoe_titan.model.args.MomoeLlamaArgs` that the checks need."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int | None
    n_dense_layers: int
    dense_hidden_dim: int
    moe_hidden_dim: int
    attn_type: str
    qk_norm: str
    backend: str
    moe_args: Any

    @property
    def moe_layer_ids(self) -> range: ...

    def layer_load_balance_rate(self, layer_id: int) -> float: ...

    def hf_format(self) -> str: ...

    def differences_from_hf(self, folder: str) -> list[tuple[str, Any, Any]]: ...
