"""The arguments of a model, as far as the checks of a job and Hugging Face's formats read them."""

from typing import Any, Protocol

from torchtitan.config import JobConfig


class ModelArgs(Protocol):
    """The part of `momoe_titan.model.args.MomoeLlamaArgs` that others read without importing the model."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int | None
    head_dim: int | None
    n_dense_layers: int
    other_dense_layers: list[int]
    dense_hidden_dim: int
    moe_hidden_dim: int
    vocab_size: int
    max_seq_len: int
    norm_eps: float
    rope_theta: float
    rope_scaling_args: Any
    yarn_args: Any
    tie_word_embeddings: bool
    attn_type: str
    qk_norm: str
    moe_args: Any
    save_percent: list[float]
    backend: str
    load_balance_rate: float
    load_balance_rule: str
    load_balance_average: float
    aux_loss_weight: float
    aux_loss_scope: str
    router_z_loss_weight: float
    load_balance_off_layers: list[int]
    check_ids: bool
    document_mask: bool
    hf_fields: dict[str, Any]

    @property
    def attention_head_dim(self) -> int: ...

    @property
    def moe_layer_ids(self) -> list[int]: ...

    @property
    def has_dense_layers(self) -> bool: ...

    def take_settings(self, job_config: JobConfig) -> None: ...

    def layer_load_balance_rate(self, layer_id: int) -> float: ...

    def hf_format(self) -> str: ...

    def differences_from_hf(self, folder: str) -> list[tuple[str, Any, Any]]: ...
