"""The llama-MoE transformer: TorchTitan's llama 3 with MoE feed-forwards."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypedDict, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.models.llama3.model.model import (
    Attention,
    Transformer,
    precompute_freqs_cis,
)
from torchtitan.models.moe import FeedForward
from torchtitan.protocols.model import AttentionMasksType

from momoe_titan.config.section import STOCK_BACKEND
from momoe_titan.model.args import MomoeLlamaArgs
from momoe_titan.model.attention import DocumentAttention, document_mask, number_documents
from momoe_titan.model.moe import BalancedMoE, MomoeMoE
from momoe_titan.model.output import OutputLayer
from momoe_titan.model.rope import precompute_yarn_freqs_cis, rotate
from momoe_titan.model.stock_moe import StockMoE


class MomoeAttention(Attention):
    """TorchTitan's llama-3 attention with heads of any even width and optional QK-norm.

    Attributes:
        q_norm, k_norm: by `model_args.qk_norm`, None ("none"), an RMSNorm over each head
            ("per_head"), or an RMSNorm over all heads together ("full"): n_heads * head_dim wide for
            the queries, n_kv_heads * head_dim for the keys.
    """

    q_norm: nn.RMSNorm | None
    k_norm: nn.RMSNorm | None

    def __init__(self, model_args: MomoeLlamaArgs):
        super().__init__(model_args)
        if model_args.document_mask:
            self.attn_type, self.inner_attention = "sdpa", DocumentAttention()
        head_dim, dim = model_args.attention_head_dim, model_args.dim
        if head_dim != self.head_dim:
            self.head_dim = head_dim
            self.wq = nn.Linear(dim, self.n_heads * head_dim, bias=False)
            self.wk = nn.Linear(dim, self.n_kv_heads * head_dim, bias=False)
            self.wv = nn.Linear(dim, self.n_kv_heads * head_dim, bias=False)
            self.wo = nn.Linear(self.n_heads * head_dim, dim, bias=False)
        self.qk_norm = model_args.qk_norm
        self.q_norm = self.k_norm = None
        if self.qk_norm != "none":
            n_q, n_k = (1, 1) if self.qk_norm == "per_head" else (self.n_heads, self.n_kv_heads)
            self.q_norm = nn.RMSNorm(n_q * head_dim, eps=model_args.norm_eps)
            self.k_norm = nn.RMSNorm(n_k * head_dim, eps=model_args.norm_eps)

    def init_weights(self, init_std: float) -> None:
        super().init_weights(init_std)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.reset_parameters()

    def forward(
        self,
        x_BLD: torch.Tensor,
        freqs_cis: torch.Tensor,
        attention_masks: AttentionMasksType | None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x (B, L, D) -> (B, L, D); the other arguments are those of the base class.

        With scaled dot-product attention this repeats the base class's forward, which has no place for the norms, and
        multiplies complex numbers.
        """
        if self.attn_type != "sdpa":
            return super().forward(x_BLD, freqs_cis, attention_masks, positions)
        xq, xk, xv = self.wq(x_BLD), self.wk(x_BLD), self.wv(x_BLD)
        if self.qk_norm == "full" and self.q_norm is not None and self.k_norm is not None:
            xq, xk = self.q_norm(xq), self.k_norm(xk)
        # (B, L, heads, head_dim); heads is -1, because under tensor parallelism a rank has some of them
        xq, xk, xv = (x.unflatten(-1, (-1, self.head_dim)) for x in (xq, xk, xv))
        if self.qk_norm == "per_head" and self.q_norm is not None and self.k_norm is not None:
            xq, xk = self.q_norm(xq), self.k_norm(xk)
        xq, xk = rotate(xq, xk, freqs_cis, positions)
        options = {} if attention_masks is None else {"mask": attention_masks}
        xq, xk, xv = (x.transpose(1, 2) for x in (xq, xk, xv))
        out_BHLd = self.inner_attention(xq, xk, xv, enable_gqa=self.enable_gqa, **options)
        return self.wo(out_BHLd.transpose(1, 2).flatten(-2))


class MomoeBlock(nn.Module):
    """Pre-norm transformer block.

    `moe_enabled` says whether its second half is `moe` or `feed_forward`, as in TorchTitan's MoE
    models. `compiled_parts`, after `compile_parts`, are what comes before and after the experts.
    """

    moe: BalancedMoE
    feed_forward: FeedForward

    def __init__(self, layer_id: int, model_args: MomoeLlamaArgs):
        super().__init__()
        dim = model_args.dim
        self.attention = MomoeAttention(model_args)
        self.attention_norm = nn.RMSNorm(dim, eps=model_args.norm_eps)
        self.ffn_norm = nn.RMSNorm(dim, eps=model_args.norm_eps)
        self.moe_enabled = layer_id in model_args.moe_layer_ids
        if self.moe_enabled:
            self.moe = build_moe(layer_id, model_args)
        else:
            self.feed_forward = FeedForward(dim, model_args.dense_hidden_dim)
        self.compiled_parts: tuple[Callable, Callable] | None = None
        depth = layer_id + 1 if model_args.depth_init else model_args.n_layers
        self.weight_init_std = 0.02 / (2 * depth) ** 0.5

    def forward(
        self,
        x_BLD: torch.Tensor,
        freqs_cis: torch.Tensor,
        attention_masks: AttentionMasksType | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x (B, L, D) -> (B, L, D); the other arguments are those of TorchTitan's Attention."""
        if self.compiled_parts is not None:
            before_experts, after_experts = self.compiled_parts
            h_BLD, x_TD, *under_way = before_experts(x_BLD, freqs_cis, attention_masks, positions)
            return after_experts(h_BLD, x_TD, cast(MomoeMoE, self.moe).run_experts(*under_way))
        h_BLD = x_BLD + self.attention(self.attention_norm(x_BLD), freqs_cis, attention_masks, positions)
        feed_forward = self.moe if self.moe_enabled else self.feed_forward
        return h_BLD + feed_forward(self.ffn_norm(h_BLD))

    def compile_parts(self, backend: str) -> None:
        """Compile what comes before the experts, and what comes after them, each as a whole.

        For a layer with a gatherer: its experts are an FSDP module of their own, whose hooks no graph can hold.
        """
        # In the order of the program, which begins a transfer ahead of the work that it is to be hidden behind. By
        # default Inductor moves transfers to the end, where their results take the least memory.
        options: Any = {"reorder_for_peak_memory": False} if backend == "inductor" else None
        before_experts, after_experts = (
            torch.compile(part, backend=backend, fullgraph=True, options=options)
            for part in (self._before_experts, self._after_experts)
        )
        self.compiled_parts = before_experts, after_experts

    def _before_experts(self, x_BLD, freqs_cis, attention_masks, positions):
        h_BLD = x_BLD + self.attention(self.attention_norm(x_BLD), freqs_cis, attention_masks, positions)
        return h_BLD, *cast(MomoeMoE, self.moe).route_and_gather(self.ffn_norm(h_BLD))

    def _after_experts(self, h_BLD, x_TD, y_MD):
        moe = cast(MomoeMoE, self.moe)
        # The shared experts while results are under way, and so in the backward.
        return h_BLD + moe.add_results(y_MD, moe.run_shared_experts(x_TD)).view(h_BLD.shape)

    @torch.no_grad()
    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        with whole_parameters(self):
            self.attention_norm.reset_parameters()
            self.ffn_norm.reset_parameters()
            self.attention.init_weights(self.weight_init_std)
            if self.moe_enabled:
                device = buffer_device or self.moe.expert_bias.device
                self.moe.init_weights(self.weight_init_std, device)
            else:
                self.feed_forward.init_weights(self.weight_init_std)


def blocks_of(model: nn.Module) -> list[MomoeBlock]:
    """The blocks of a model, or of a pipeline stage of it.

    Activation checkpointing and torch.compile wrap blocks in modules that pass attributes on.
    """
    return cast(list[MomoeBlock], list(model.get_submodule("layers").children()))


class BalancingArgs(TypedDict):
    load_balance_rate: float
    load_balance_rule: str
    load_balance_average: float


def build_moe(layer_id: int, model_args: MomoeLlamaArgs) -> BalancedMoE:
    """The MoE layer that `model_args.backend` asks for."""
    balancing: BalancingArgs = {
        "load_balance_rate": model_args.layer_load_balance_rate(layer_id),
        "load_balance_rule": model_args.load_balance_rule,
        "load_balance_average": model_args.load_balance_average,
    }
    widths = model_args.moe_args, model_args.dim, model_args.moe_hidden_dim
    if model_args.backend == STOCK_BACKEND:
        moe = StockMoE(*widths, **balancing)
    else:
        moe = MomoeMoE(
            *widths,
            **balancing,
            save_percent=model_args.layer_save_percent(layer_id),
            backend=model_args.backend,
            check_ids=model_args.check_ids,
        )
    moe.router.aux_loss_weight = model_args.aux_loss_weight
    moe.router.aux_loss_scope = model_args.aux_loss_scope
    moe.router.z_loss_weight = model_args.router_z_loss_weight
    if model_args.aux_loss_weight and model_args.aux_loss_scope == "global":
        moe.router.record_shares()
    return moe


class MomoeLlama(Transformer):
    """Llama 3 with `MomoeBlock` layers.

    Raises:
        ValueError: arguments that do not fit together.
    """

    model_args: MomoeLlamaArgs

    def __init__(self, model_args: MomoeLlamaArgs):
        model_args.validate()
        # The base class would fill the layers with dense blocks: it gets none.
        super().__init__(dataclasses.replace(model_args, n_layers=0))
        self.model_args = model_args
        self.n_layers = model_args.n_layers
        for layer_id in range(model_args.n_layers):
            self.layers[str(layer_id)] = MomoeBlock(layer_id, model_args)
        self.output = OutputLayer(model_args.dim, model_args.vocab_size, model_args.loss_chunk_mib)
        self.tie_weights()

    def forward(
        self,
        tokens: torch.Tensor,
        attention_masks: Any = None,
        positions: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """TorchTitan's, and where labels are given the loss in place of the logits.

        Args:
            tokens: (B, L) int64; of later pipeline stages the hidden states (B, L, D).
            attention_masks: from `get_attention_masks`; None for attention to all tokens before.
            positions: as in the base class.
            labels: see `OutputLayer.forward`; only the last pipeline stage reads them.

        Returns:
            What `OutputLayer.forward` does; of earlier pipeline stages (B, L, D).
        """
        if isinstance(attention_masks, torch.Tensor):
            attention_masks = document_mask(attention_masks)
        h_BLD = tokens if self.tok_embeddings is None else self.tok_embeddings(tokens)
        for layer in self.layers.values():
            h_BLD = layer(h_BLD, self.freqs_cis, attention_masks=attention_masks, positions=positions)
        if self.norm is not None:
            h_BLD = self.norm(h_BLD)
        if self.output is None:
            return h_BLD
        # By keyword: hooks of the module may replace its positional arguments.
        return self.output(h_BLD) if labels is None else self.output(h_BLD, labels=labels)

    def tie_weights(self) -> None:
        """Give the output layer the embedding's weight if the model has one for both.

        To call again whenever the modules' parameters were replaced, as `to_empty` does.
        """
        if self.model_args.tie_word_embeddings:
            self.output.weight = self.tok_embeddings.weight

    @torch.no_grad()
    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Draw all weights, and set the load-balancing state to zero.

        One seed gives the same weights on any number of FSDP ranks and with either MoE layer.

        Args:
            buffer_device: where buffers go; None for where they are.
        """
        buffer_device = buffer_device or self.freqs_cis.device
        ends = [m for m in (self.tok_embeddings, self.norm, self.output) if m is not None]
        with whole_parameters(*ends):
            super().init_weights(buffer_device)
            if self.model_args.tie_word_embeddings:
                # the output's smaller values, as TorchTitan's Qwen3 does
                self.tok_embeddings.weight.copy_(self.output.weight)
        self.tie_weights()
        for module in self.modules():
            if isinstance(module, BalancedMoE):
                module.reset_balance_state(buffer_device)

    def get_attention_masks(
        self,
        input_batch: torch.Tensor,
        tokenizer: BaseTokenizer,
        extra_inputs: dict[str, torch.Tensor] | None = None,
    ) -> Any:
        """As the base class's; with `document_mask` what `forward` takes as attention_masks.

        Args:
            extra_inputs: "positions" is taken out of it. RoPE tells distances between tokens only, which are the same
                whether positions begin anew in each document or not.

        Returns:
            (B, L) int32, which pipeline schedules cut into microbatches: see `number_documents`.
        """
        if not self.model_args.document_mask:
            return super().get_attention_masks(input_batch, tokenizer, extra_inputs)
        positions_BL = None if extra_inputs is None else extra_inputs.pop("positions", None)
        return number_documents(input_batch, positions_BL, tokenizer.eos_id)

    def _precompute_freqs_cis(self) -> torch.Tensor:
        args = self.model_args
        if args.yarn_args is not None:
            return precompute_yarn_freqs_cis(args.attention_head_dim, args.max_seq_len, args.rope_theta, args.yarn_args)
        return precompute_freqs_cis(
            self.model_args.attention_head_dim,
            self.model_args.max_seq_len,
            self.model_args.rope_theta,
            self.model_args.rope_scaling_args,
        )


@contextlib.contextmanager
def whole_parameters(*modules: nn.Module) -> Iterator[None]:
    """Let code that initialises parameters see whole tensors where FSDP left shards.

    Every rank then draws the whole tensor from the same generator state and keeps its shard.
    Drawing shards instead would give other weights on every number of ranks. On a CPU, where DTensor
    does not manage the generator, all ranks would even draw the same values: experts would start
    equal, with equal router rows, and stay equal. Within the block the modules' whole parameters
    take memory.
    """
    shards: list[tuple[nn.Module, str, DTensor]] = []
    for root in modules:
        for module in root.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if isinstance(parameter, DTensor):
                    shards.append((module, name, parameter))
                    local = parameter.to_local()
                    whole = torch.empty(parameter.shape, dtype=local.dtype, device=local.device)
                    setattr(module, name, nn.Parameter(whole))
    try:
        yield
        for module, name, shard in shards:
            whole = module.get_parameter(name).detach()
            # src_data_rank=None: all ranks hold the same tensor, so that nothing is sent
            new = distribute_tensor(whole, shard.device_mesh, shard.placements, src_data_rank=None)
            shard.to_local().copy_(new.to_local())
    finally:
        for module, name, shard in shards:
            setattr(module, name, shard)
