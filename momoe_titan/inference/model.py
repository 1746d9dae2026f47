"""Trained models outside of training: finding and loading checkpoints, sampling text.

One process, no process group. Checkpoints are TorchTitan's (torch.distributed.checkpoint, from any
number of ranks) or Hugging Face folders.
"""

import copy
import importlib
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.config import ConfigManager, Parallelism

from momoe_titan.components.checkpoint import (
    CheckpointError,
    read_metadata,
    saved_steps,
    step_folder,
)
from momoe_titan.config.command_line import missing_section_option
from momoe_titan.data.tokenizer import build_tokenizer
from momoe_titan.model import MomoeLlama, MomoeLlamaArgs, MomoeStateDictAdapter, flavors
from momoe_titan.model.args import read_hf_args
from momoe_titan.model.moe import BalancedMoE


def find_checkpoint(folder: str) -> tuple[str, bool]:
    """A checkpoint in `folder`, or the latest in its step-* folders: its path, and whether it is
    in Hugging Face's format.

    Raises:
        ValueError: there is none.
    """
    if os.path.isfile(os.path.join(folder, ".metadata")):
        return folder, False
    if os.path.isdir(folder):
        if any(name.endswith(".safetensors") for name in os.listdir(folder)):
            return folder, True
        for step in sorted(saved_steps(folder), reverse=True):
            try:
                return find_checkpoint(step_folder(folder, step))
            except ValueError:  # not written to its end
                continue
    raise ValueError(
        f"{folder!r} holds no checkpoint: neither .metadata (TorchTitan's), nor *.safetensors "
        "(Hugging Face's), nor a folder step-N with one of them"
    )


def read_job(options: list[str]) -> tuple[MomoeLlamaArgs, str]:
    """Model arguments, and the tokenizer's folder, of the job that these options of
    `momoe_titan.train` describe.

    Raises:
        ValueError: an unusable configuration; names the field.
    """
    config = ConfigManager().parse_args([*options, *missing_section_option(options)])
    if config.model.name != "momoe_llama":
        raise ValueError(f"model.name is {config.model.name!r}, must be 'momoe_llama'")
    if module := config.experimental.custom_import:  # which may add a flavor
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as e:
            raise ValueError(
                f"experimental.custom_import {module!r}: {e}; a script does not look in the current "
                "folder: add it to PYTHONPATH"
            ) from e
    if config.model.flavor not in flavors:
        raise ValueError(f"model.flavor {config.model.flavor!r} is none of {', '.join(flavors)}")
    # What the job loads or saves, how it trains and over how many ranks, is not asked for here.
    config.checkpoint.enable = config.validation.enable = False
    config.training.global_batch_size, config.parallelism = -1, Parallelism()
    config.activation_checkpoint.debug = False
    args = flavors[config.model.flavor]
    args.update_from_config(config)
    build_tokenizer(config)
    return args, config.model.hf_assets_path


def saved_tensors(path: str, args: MomoeLlamaArgs) -> dict[str, TensorStorageMetadata]:
    """What a torch.distributed checkpoint holds of the weights and biases of this model.

    Raises:
        ValueError: a weight is missing or has another shape, or the checkpoint is damaged.
    """
    try:
        saved = read_metadata(path).state_dict_metadata
    except CheckpointError as e:
        raise ValueError(f"the checkpoint {path!r} cannot be read: {e}") from e
    with torch.device("meta"):
        wanted = MomoeLlama(args).state_dict()
    tensors = {}
    for key, tensor in wanted.items():
        if key.endswith("moe.tokens_per_expert"):
            continue
        if key not in saved and key.endswith("moe.expert_bias"):
            continue
        if key not in saved:
            raise ValueError(f"the checkpoint in {path!r} is of another model: it lacks {key}")
        if saved[key].size != tensor.shape:
            raise ValueError(
                f"the checkpoint in {path!r} is of another model: its {key} is "
                f"{tuple(saved[key].size)}, the model's is {tuple(tensor.shape)}"
            )
        tensors[key] = saved[key]
    return tensors


def load_model(path: str, args: MomoeLlamaArgs, device: torch.device | str, dtype: torch.dtype) -> MomoeLlama:
    """The model in evaluation mode, with weights of `dtype`, from either kind of checkpoint.

    Raises:
        ValueError: the checkpoint is of another model.
    """
    with torch.device("meta"):
        model = MomoeLlama(args)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.to_empty(device=device)
    with torch.device(device):
        model.freqs_cis = model._precompute_freqs_cis()
    for module in model.modules():
        if isinstance(module, BalancedMoE):
            module.reset_balance_state(torch.device(device))
    state_dict: dict[str, Any] = model.state_dict()
    if find_checkpoint(path)[1]:
        adapter = MomoeStateDictAdapter(args, None)
        hf_state_dict = adapter.to_hf(state_dict)
        reader = adapter.get_hf_storage_reader(path)
        dcp.load(hf_state_dict, storage_reader=reader, no_dist=True)
        model.load_state_dict(adapter.from_hf(hf_state_dict))
    else:
        tensors = {key: state_dict[key] for key in saved_tensors(path, args)}
        dcp.load(tensors, storage_reader=FileSystemReader(path), no_dist=True)
    return model.eval().requires_grad_(False)


def args_and_tokenizer(path: str, options: list[str], assets: str | None = None) -> tuple[MomoeLlamaArgs, str]:
    """Model arguments and tokenizer folder for a checkpoint: from config.json where it has one,
    else from the options of its training job.

    Args:
        assets: tokenizer folder to take in place of the one found.

    Raises:
        ValueError: neither is there, or they are unusable.
    """
    if not options and os.path.isfile(os.path.join(path, "config.json")):
        args, found = read_hf_args(path), path
    elif options:
        args, found = read_job(options)
    else:
        raise ValueError(
            f"{path!r} has no config.json: say by --job.config_file, and what else was on the "
            "command line, how the model was trained"
        )
    return args, assets or found


class _CachedAttention(nn.Module):
    """Takes the place of TorchTitan's inner attention: keeps keys and values of earlier calls."""

    def __init__(self, inner: nn.Module, max_len: int):
        super().__init__()
        self.inner, self.max_len, self.length = inner, max_len, 0

    def forward(self, q, k, v, *, enable_gqa: bool = False) -> torch.Tensor:
        """q (B, H, L, d), k and v (B, H', L, d), all after RoPE -> (B, H, L, d)."""
        if not self.length:
            B, heads, _, width = k.shape
            self.keys, self.values = k.new_empty(2, B, heads, self.max_len, width)
        end = self.length + k.shape[2]
        self.keys[:, :, self.length : end] = k
        self.values[:, :, self.length : end] = v
        first, self.length = not self.length, end
        k, v = self.keys[:, :, :end], self.values[:, :, :end]
        if first:  # all positions at once
            return self.inner(q, k, v, enable_gqa=enable_gqa, is_causal=True)
        # One more, which sees all. Without cuDNN, which makes a plan for every new length.
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=enable_gqa)


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
        model: from `load_model`; its max_seq_len must cover prompt and answer.
        prompt: at least one token.
        max_tokens: how many to sample at most.
        temperature: divides the logits; 0 always takes the likeliest token.
        top_k: sample from the k likeliest only; 0 for all.
        top_p: sample from the likeliest only, as many as together reach this probability.
        seed: of the sampling; None for another answer each time.
        eos_id: ends the answer, and is not part of it.

    Raises:
        ValueError: names the argument and its value.
    """
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
    device = model.freqs_cis.device
    generator = torch.Generator(device)
    generator.seed() if seed is None else generator.manual_seed(seed)
    attentions = [block.attention for block in model.layers.values()]
    inner = [attention.inner_attention for attention in attentions]
    try:
        for attention in attentions:
            attention.inner_attention = _CachedAttention(attention.inner_attention, length)
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
        for attention, original in zip(attentions, inner):
            attention.inner_attention = original


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
    """The text of tokens as they come, in pieces; a character of several tokens in one piece."""
    ids: list[int] = []
    start = done = 0  # text up to `done` is out; decoding starts earlier, to see its spaces
    for token in tokens:
        ids.append(token)
        before, now = tokenizer.decode(ids[start:done]), tokenizer.decode(ids[start:])
        if len(now) > len(before) and not now.endswith("\ufffd"):
            yield now[len(before) :]
            start, done = done, len(ids)
    if rest := tokenizer.decode(ids[start:])[len(tokenizer.decode(ids[start:done])) :]:
        yield rest


def with_positions(args: MomoeLlamaArgs, length: int) -> MomoeLlamaArgs:
    """The same model for sequences of this length."""
    return replace(copy.deepcopy(args), max_seq_len=length)
