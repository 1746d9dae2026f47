"""Samples text from a model, one token at a time, with a cache of keys and values."""

from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from momoe_titan.model.model import MomoeBlock, MomoeLlama


class CachedAttention(nn.Module):
    """TorchTitan's inner attention with a cache of keys and values.

    While the cache is closed it is the plain inner attention.
    """

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.close()

    def open(self, max_len: int) -> None:
        """Begin an answer: the cache is empty, with room for this many positions."""
        self.max_len, self.length = max_len, 0

    def close(self) -> None:
        """Free the cache."""
        self.max_len = self.length = 0
        self.keys = self.values = torch.empty(0)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, enable_gqa: bool = False, **options
    ) -> torch.Tensor:
        """q (B, H, L, d), k and v (B, H', L, d), all after RoPE -> (B, H, L, d)."""
        if not self.max_len:
            return self.inner(q, k, v, enable_gqa=enable_gqa, **options)
        if not self.length:
            B, heads, _, width = k.shape
            self.keys, self.values = k.new_empty(2, B, heads, self.max_len, width)
        end = self.length + k.shape[2]
        self.keys[:, :, self.length : end] = k
        self.values[:, :, self.length : end] = v
        first, self.length = not self.length, end
        k, v = self.keys[:, :, :end], self.values[:, :, :end]
        if first:  # the whole prompt at once
            return self.inner(q, k, v, enable_gqa=enable_gqa, is_causal=True)
        # One more position, which sees all others. Not by cuDNN, which makes a new plan for every length.
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=enable_gqa)


def attention_caches(model: MomoeLlama) -> list[CachedAttention]:
    """The caches of the model's layers. The first call gives each layer one; later calls return the same."""
    caches = []
    for block in model.layers.values():
        attention = cast(MomoeBlock, block).attention
        inner = attention.inner_attention
        if not isinstance(inner, CachedAttention):
            inner = attention.inner_attention = CachedAttention(inner)
        caches.append(inner)
    return caches


@torch.no_grad()
def generate(
    model: MomoeLlama,
    prompt: list[int],
    max_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    eos_id: int | None = None,
) -> Iterator[int]:
    """Sample what follows a prompt, one token at a time.

    Args:
        model: from `load_model`; its max_seq_len must cover prompt and answer. One answer at a time.
        prompt: at least one token.
        max_tokens: the most that are sampled.
        temperature: divides the logits; 0 always takes the likeliest token.
        top_k: sample from the k likeliest tokens only; 0 for all.
        top_p: sample only from the likeliest tokens, as many as together reach this probability.
        seed: makes the answer repeatable; None for another answer each time.
        eos_id: a token that ends the answer and is not part of it.

    Raises:
        ValueError: names the argument and its value.
    """
    _check_sampling(model, prompt, max_tokens, temperature, top_k, top_p)
    length = len(prompt) + max_tokens
    device = model.freqs_cis.device
    generator = torch.Generator(device)
    generator.seed() if seed is None else generator.manual_seed(seed)
    caches = attention_caches(model)
    for cache in caches:
        cache.open(length)
    try:
        tokens = torch.tensor([prompt], device=device)
        position = torch.arange(len(prompt), device=device)
        for _ in range(max_tokens):
            logits_V = model(tokens, positions=position[None])[0, -1].float()
            token = _sample(logits_V, temperature, top_k, top_p, generator)
            if token == eos_id:
                return
            yield token
            tokens = torch.tensor([[token]], device=device)
            position = position[-1:] + 1
    finally:
        for cache in caches:
            cache.close()


def _check_sampling(
    model: MomoeLlama, prompt: list[int], max_tokens: int, temperature: float, top_k: int, top_p: float
) -> None:
    if not prompt:
        raise ValueError("the prompt is empty, and the tokenizer has no token that begins a text")
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}, must be at least 1")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}, must be finite and >= 0")
    if top_k < 0:
        raise ValueError(f"top_k is {top_k}, must be >= 0")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}, must be above 0 and at most 1")
    length = len(prompt) + max_tokens
    if length > model.freqs_cis.shape[0]:
        raise ValueError(
            f"prompt and answer are {length} tokens, the model has positions for {model.freqs_cis.shape[0]}"
        )
    if max(prompt) >= model.vocab_size:
        raise ValueError(
            f"the prompt has token {max(prompt)}, the model embeds {model.vocab_size}: this is "
            "another model's tokenizer"
        )


def _sample(
    logits_V: torch.Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    generator: torch.Generator,
) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    probs_V, ids_V = (logits_V / temperature).softmax(0).sort(descending=True, stable=True)
    if top_k:
        probs_V = probs_V[:top_k]
    # the first is kept whatever its probability
    probs_V = probs_V[probs_V.cumsum(0) - probs_V < top_p * probs_V.sum()]
    return int(ids_V[torch.multinomial(probs_V, 1, generator=generator)])


def stream_text(tokenizer: HuggingFaceTokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """The text of tokens in pieces, as they come. No piece ends within a character."""
    ids: list[int] = []
    start = done = 0  # the text of ids[:done] is out; decoding begins at ids[start], which shows the spaces between
    for token in tokens:
        ids.append(token)
        before, now = tokenizer.decode(ids[start:done]), tokenizer.decode(ids[start:])
        if len(now) > len(before) and not now.endswith("\ufffd"):
            yield now[len(before) :]
            start, done = done, len(ids)
    if rest := tokenizer.decode(ids[start:])[len(tokenizer.decode(ids[start:done])) :]:
        yield rest
