"""Attention that stays inside documents, so that a packed document gets what it would get alone."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torchtitan.models.attention import ScaledDotProductAttentionWrapper

BLOCK = 128  # tokens by tokens that flex attention computes or leaves out


class DocumentAttention(ScaledDotProductAttentionWrapper):
    """TorchTitan's causal attention; with a mask of `document_mask`, flex attention on a GPU."""

    _flex_attention: ClassVar[Callable[..., Any]] = torch.compile(
        # Lets activation checkpointing, which sees each op, take the compiled region for one.
        flex_attention,
        options={"wrap_inductor_compiled_regions": True},
    )

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: BlockMask | Tensor | None = None,
        enable_gqa: bool = False,
        **options: Any,
    ) -> Tensor:
        """q (B, H, L, d), k and v (B, H', L, d), all after RoPE -> (B, H, L, d).

        Args:
            mask: from `document_mask`; None for attention to all tokens before.
            options: of the base class, for attention without a mask.
        """
        if mask is None:
            return super().forward(q, k, v, enable_gqa=enable_gqa, **options)
        if isinstance(mask, BlockMask):
            # Under autocast, norms of queries and keys give float32.
            q, k = q.to(v.dtype), k.to(v.dtype)
            # Not through self, which torch.compile would take for an argument.
            return DocumentAttention._flex_attention(q, k, v, block_mask=mask, enable_gqa=enable_gqa)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=enable_gqa)


def number_documents(tokens_BL: Tensor, positions_BL: Tensor | None, eos_id: int | None) -> Tensor:
    """The number of each token's document in its sequence, (B, L) int32, which grows along the sequence.

    Args:
        tokens_BL: of the model's input.
        positions_BL: place of each token in its document, 0 where one begins, as our loader gives it. None for
            TorchTitan's loaders: a document begins behind each EOS.
    """
    if positions_BL is not None:
        return (positions_BL == 0).cumsum(1, dtype=torch.int32)
    ends_BL = (tokens_BL == eos_id).int()
    return ends_BL.cumsum(1, dtype=torch.int32) - ends_BL


def document_mask(documents_BL: Tensor) -> BlockMask | Tensor:
    """What `DocumentAttention` takes: each token attends to itself and to those before it in its document.

    Args:
        documents_BL: from `number_documents`.

    Returns:
        On a GPU a `BlockMask`, made without waiting for it; elsewhere, where flex attention has no backward,
        (B, 1, L, L) bool.
    """
    if documents_BL.device.type == "cuda":
        return block_mask(documents_BL)
    L = documents_BL.shape[1]
    causal_LL = torch.ones(L, L, dtype=torch.bool, device=documents_BL.device).tril()
    return ((documents_BL[:, :, None] == documents_BL[:, None, :]) & causal_LL)[:, None]


def block_mask(documents_BL: Tensor) -> BlockMask:
    """The mask of `document_mask` for flex attention.

    Documents are stretches of a sequence. The first and the last document of a block of tokens therefore say all about
    it, which is some thousand times less than `create_block_mask` computes.
    """
    L = documents_BL.shape[1]
    first_BN = documents_BL[:, ::BLOCK]
    last_BN = documents_BL[:, BLOCK - 1 :: BLOCK]
    if L % BLOCK:
        last_BN = torch.cat((last_BN, documents_BL[:, -1:]), dim=1)
    # (B, blocks of queries, blocks of keys)
    causal_NN = torch.ones(first_BN.shape[1], first_BN.shape[1], dtype=torch.bool, device=documents_BL.device).tril()
    seen_BNN = (last_BN[:, None, :] >= first_BN[:, :, None]) & causal_NN
    full_BNN = (first_BN[:, None, :] == last_BN[:, :, None]) & causal_NN.tril(-1)
    if L % BLOCK:
        full_BNN[:, -1] = False

    def is_seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (documents_BL[b, q] == documents_BL[b, k])

    return BlockMask.from_kv_blocks(
        *_listed(seen_BNN & ~full_BNN),
        *_listed(full_BNN),
        BLOCK_SIZE=BLOCK,
        mask_mod=is_seen,
        seq_lengths=(L, L),
    )


def _listed(wanted_BNN: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, (B, 1, N), and which, the others behind, (B, 1, N, N)."""
    chosen = wanted_BNN[:, None].int()
    return chosen.sum(-1, dtype=torch.int32), torch.argsort(chosen, dim=-1, descending=True, stable=True).int()
