"""Arguments of the llama-MoE model, and how they are set from a job's configuration."""

import contextlib
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torchtitan.config import JobConfig
from torchtitan.models.llama3.model.args import RoPEScalingArgs, TransformerModelArgs
from torchtitan.models.moe import MoEArgs
from torchtitan.models.utils import get_moe_model_nparams_and_flops

from momoe_titan.config.checks.job import configure
from momoe_titan.config.checks.model_args import check_model_args
from momoe_titan.config.hugging_face import folder_to_load
from momoe_titan.config.section import Momoe
from momoe_titan.model.hugging_face.config import (
    fields_from_hf_config,
    hf_format,
    read_config,
    read_hf_fields,
    rope_scaling_fields,
)
from momoe_titan.model.rope import YarnArgs
from momoe_titan.save_percent import AUTO, parse_save_percent


@dataclass
class MomoeLlamaArgs(TransformerModelArgs):
    """A llama-3 transformer whose feed-forward blocks, after `n_dense_layers`, are MoE layers.

    Of the inherited fields, `multiple_of` and `ffn_dim_multiplier` have no effect: the hidden
    widths are given as they are. RoPE is not rescaled unless `rope_scaling_args` (llama 3's rule) or `yarn_args`
    says so.

    Args:
        head_dim: width of an attention head; None for dim // n_heads.
        qk_norm: RMSNorm of queries and keys before RoPE: "none", "per_head" (over each head, as
            in Qwen3) or "full" (over all heads together, as in OLMoE).
        tie_word_embeddings: the output layer's weight is that of the embedding.
        yarn_args: rescales RoPE by YaRN.
        n_dense_layers: how many of the first layers have a dense feed-forward.
        other_dense_layers: ids of further layers that have one.
        dense_hidden_dim: hidden width of those.
        moe_hidden_dim: F, hidden width of one expert. Shared experts together are one
            feed-forward of width num_shared_experts * F.
        moe_args: TorchTitan's MoE arguments. `score_before_experts` has to be False (scores
            multiply the experts' outputs) and `load_balance_coeff` is not read.
        save_percent: one number for all MoE layers, or one per MoE layer (0 to 100).
        backend: "auto", "triton", "torch" (see `momoe_titan.kernels.momoe_mlp`), or
            "torchtitan" for TorchTitan's own MoE from the same initial weights.
        load_balance_rate, load_balance_rule, load_balance_average: see `moe.balancing`; rate 0
            turns balancing off.
        aux_loss_weight, aux_loss_scope, router_z_loss_weight: see `moe.router_losses`.
        load_balance_off_layers: ids of MoE layers whose bias stays as it is.
        expert_dispatch: "auto", "all_ranks" or "chosen_ranks": see `model.parallel.gathered`.
        check_ids: debug flag of `momoe_mlp`.
        document_mask: attention stays inside documents; sets `attn_type` and `attn_mask_type`.
        loss_chunk_mib: MiB of logits that the loss holds at a time; see `model.output`.
        from_hf: take the shape from the config.json of the Hugging Face folder that the job loads
            (checkpoint.initial_load_path or model.hf_assets_path), in place of what stands here.
        hf_fields: the config.json that the model's weights come with. An export keeps what of it this package
            does not set.
    """

    rope_scaling_args: RoPEScalingArgs = field(default_factory=lambda: RoPEScalingArgs(scaling_factor=1.0))
    head_dim: int | None = None
    qk_norm: str = "none"
    tie_word_embeddings: bool = False
    yarn_args: YarnArgs | None = None
    n_dense_layers: int = 0
    other_dense_layers: list[int] = field(default_factory=list)
    dense_hidden_dim: int = 0
    moe_hidden_dim: int = 256
    moe_args: MoEArgs = field(default_factory=lambda: MoEArgs(score_before_experts=False))
    save_percent: list[float] = field(default_factory=lambda: [0.0])
    backend: str = "auto"
    load_balance_rate: float = Momoe.load_balance_rate
    load_balance_rule: str = Momoe.load_balance_rule
    load_balance_average: float = Momoe.load_balance_average
    aux_loss_weight: float = 0.0
    aux_loss_scope: str = "global"
    router_z_loss_weight: float = 0.0
    load_balance_off_layers: list[int] = field(default_factory=list)
    expert_dispatch: str = "auto"
    check_ids: bool = False
    document_mask: bool = False
    loss_chunk_mib: float = Momoe.loss_chunk_mib
    from_hf: bool = False
    hf_fields: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def attention_head_dim(self) -> int:
        return self.dim // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def moe_layer_ids(self) -> list[int]:
        return [i for i in range(self.n_dense_layers, self.n_layers) if i not in self.other_dense_layers]

    @property
    def has_dense_layers(self) -> bool:
        return len(self.moe_layer_ids) < self.n_layers

    def layer_save_percent(self, layer_id: int) -> float:
        """save_percent of the MoE layer with this id, among all layers."""
        if len(self.save_percent) == 1:
            return self.save_percent[0]
        return self.save_percent[self.moe_layer_ids.index(layer_id)]

    def layer_load_balance_rate(self, layer_id: int) -> float:
        """The rate by which a step moves the bias of this layer; 0 if balancing is off."""
        return 0.0 if layer_id in self.load_balance_off_layers else self.load_balance_rate

    def update_from_config(self, job_config: JobConfig, **kwargs) -> None:
        """Take over what the job sets, and refuse a job that cannot work; see `configure`.

        Raises:
            ValueError: names the field, as written in TOML, and its value.
        """
        configure(self, job_config)

    def take_settings(self, job_config: JobConfig) -> None:
        """Take over what the job sets, unchecked.

        Reads the `[momoe]` section where `job.custom_config_module = "momoe_titan.job_config"`
        has added one, and keeps this object's values otherwise.

        Raises:
            ValueError: `from_hf` is set, and the job's Hugging Face folder describes no such model.
        """
        if self.from_hf:
            hf_args = read_hf_args(folder_to_load(job_config))
            self.__dict__.update(vars(hf_args), from_hf=True)
        elif job_config.checkpoint.enable and job_config.checkpoint.initial_load_in_hf:
            # A run that resumes needs the folder no more; `check_hugging_face` refuses a new one without it.
            with contextlib.suppress(ValueError):
                self.hf_fields = read_config(folder_to_load(job_config))
        self.max_seq_len = job_config.training.seq_len
        self.moe_args._debug_force_load_balance = job_config.debug.moe_force_load_balance
        momoe = getattr(job_config, "momoe", None)
        if momoe is None:
            return
        given = parse_save_percent(momoe.save_percent, "momoe.save_percent")
        # For "auto", set_up_auto_save_percent chooses when the layers are built.
        self.save_percent = [0.0] if given == AUTO else given
        self.backend = momoe.backend
        self.load_balance_rate = momoe.load_balance_rate
        self.load_balance_rule = momoe.load_balance_rule
        self.load_balance_average = momoe.load_balance_average
        self.aux_loss_weight = momoe.aux_loss_weight
        self.aux_loss_scope = momoe.aux_loss_scope
        self.router_z_loss_weight = momoe.router_z_loss_weight
        self.load_balance_off_layers = list(momoe.load_balance_off_layers)
        self.expert_dispatch = momoe.expert_dispatch
        self.check_ids = momoe.check_ids
        if momoe.document_mask:
            # TorchTitan's trainer asks the model for masks.
            self.document_mask, self.attn_type, self.attn_mask_type = True, "flex", "block_causal"
        self.loss_chunk_mib = momoe.loss_chunk_mib
        self.vocab_size = momoe.vocab_size or self.vocab_size

    def validate(self, section: str = "") -> None:
        """Check the fields against each other.

        Args:
            section: put before the names of fields that a job sets in a section of its own.

        Raises:
            ValueError: names the field and its value.
        """
        check_model_args(self, section)
        self.save_percent = [float(percent) for percent in self.save_percent]

    def hf_format(self) -> str:
        """transformers' `model_type` of the class that computes what this model computes.

        Raises:
            ValueError: there is none; says why.
        """
        return hf_format(self)

    def differences_from_hf(self, folder: str) -> list[tuple[str, Any, Any]]:
        """(field, value in the folder's config.json, value here) for every field that the outputs depend on."""
        theirs, ours = _computed(read_hf_args(folder)), _computed(self)
        return [(field, theirs[field], value) for field, value in ours.items() if theirs[field] != value]

    def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
        """Parameters, and FLOPs per token by TorchTitan's count (active parameters only)."""
        return get_moe_model_nparams_and_flops(self, model, 2 * self.attention_head_dim, seq_len)


def args_from_hf_config(config: dict[str, Any]) -> MomoeLlamaArgs:
    """Arguments of the model that a config.json describes.

    Raises:
        ValueError: names what of it this model does not have.
    """
    return MomoeLlamaArgs(**fields_from_hf_config(config))


def read_hf_args(folder: str) -> MomoeLlamaArgs:
    """Arguments of the model in a Hugging Face folder.

    Raises:
        ValueError: no readable config.json, or another kind of model; names the file.
    """
    return MomoeLlamaArgs(**read_hf_fields(folder))


def _computed(args: MomoeLlamaArgs) -> dict[str, Any]:
    """The arguments on which the model's outputs depend."""
    fields = {
        name: getattr(args, name)
        for name in (
            "dim",
            "n_layers",
            "n_heads",
            "qk_norm",
            "vocab_size",
            "norm_eps",
            "rope_theta",
            "tie_word_embeddings",
            "moe_hidden_dim",
        )
    }
    fields["n_kv_heads"] = args.n_kv_heads or args.n_heads
    fields["head_dim"] = args.attention_head_dim
    fields["dense layers"] = [i for i in range(args.n_layers) if i not in args.moe_layer_ids]
    fields["dense_hidden_dim"] = args.dense_hidden_dim if args.has_dense_layers else 0
    fields["rope_scaling"] = rope_scaling_fields(args)
    for name in (
        "num_experts",
        "top_k",
        "num_shared_experts",
        "score_func",
        "route_norm",
        "route_scale",
    ):
        fields[f"moe_args.{name}"] = getattr(args.moe_args, name)
    return fields
