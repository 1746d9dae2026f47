"""Checks, from file headers alone, that a Hugging Face folder holds the weights of a model."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from torchtitan.tools.logging import logger

from momoe_titan.config.model_args import ModelArgs
from momoe_titan.model.hugging_face.config import BIAS_FILE
from momoe_titan.model.hugging_face.names import INDEX_FILE, hf_shapes

DTYPES = ("F64", "F32", "F16", "BF16")
FUSED_EXPERTS = re.compile(r"experts\.(gate_up_proj|down_proj)$")  # names of transformers 5 in memory
# Stored by some, and of no effect on what a model computes
WITHOUT_EFFECT = re.compile(r"rotary_emb\.inv_freq$|^lm_head\.weight$")


@dataclass
class StoredTensor:
    """A tensor in a file."""

    file: str
    dtype: str
    shape: tuple[int, ...]


def check_hf_files(folder: str, args: ModelArgs) -> None:
    """Refuse a folder that does not hold all weights of the model; warn of what it holds beside them.

    Raises:
        ValueError: names the file, the tensor, its shape, and the one that config.json means.
    """
    shapes, stored = hf_shapes(args), stored_tensors(folder)
    for file, tensors in _files_by_index(folder).items():
        if not os.path.isfile(os.path.join(folder, file)):
            shape = shapes.get(tensors[0], "unknown")
            raise ValueError(
                f"{os.path.join(folder, file)} is missing: by {INDEX_FILE} it holds {tensors[0]}, of shape {shape}, "
                f"and {len(tensors) - 1} more"
            )
    for key, shape in shapes.items():
        found = stored.get(key)
        if found is None:
            raise ValueError(_why_missing(folder, key, shape, stored))
        if found.shape != shape:
            raise ValueError(f"{found.file}: {key} has shape {found.shape}, but by config.json it is {shape}")
        if found.dtype not in DTYPES:
            raise ValueError(
                f"{found.file}: {key} is of dtype {found.dtype}, must be one of {DTYPES}: quantized weights are not "
                "loaded"
            )
    others = [key for key in stored.keys() - shapes.keys() if not WITHOUT_EFFECT.search(key)]
    if others:
        logger.warning(
            f"{folder}: {len(others)} TENSORS ARE NOT PART OF THIS MODEL AND ARE LEFT OUT: "
            + ", ".join(sorted(others)[:4])
            + (" ..." if len(others) > 4 else "")
        )


def stored_tensors(folder: str) -> dict[str, StoredTensor]:
    """The tensors in all *.safetensors of a folder, but for the biases beside the weights.

    Raises:
        ValueError: there are none, or a file is damaged; names it.
    """
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    files = [name for name in names if name.endswith(".safetensors") and name != BIAS_FILE]
    if not files:
        raise ValueError(f"{folder!r} holds no *.safetensors, from which weights are loaded")
    return {key: tensor for file in files for key, tensor in _read_header(os.path.join(folder, file)).items()}


def _read_header(path: str) -> dict[str, StoredTensor]:
    """The format: the header's length in 8 bytes, the header in JSON, the tensors' bytes."""
    size = os.path.getsize(path)
    try:
        with open(path, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(length if length < size else 0))
        header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        tensors = {key: StoredTensor(path, e["dtype"], tuple(e["shape"])) for key, e in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path} is damaged, or no safetensors file: {e}") from e
    if size < end:
        raise ValueError(f"{path} is damaged: it has {size} of {end} bytes")
    return tensors


def _files_by_index(folder: str) -> dict[str, list[str]]:
    """The tensors of each file that the index lists; none without an index."""
    path = os.path.join(folder, INDEX_FILE)
    if not os.path.isfile(path):
        return {}
    try:
        with open(path, encoding="utf-8") as f:
            weight_map = json.load(f)["weight_map"]
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path} is damaged: {e!r}") from e
    files: dict[str, list[str]] = {}
    for tensor, file in weight_map.items():
        files.setdefault(file, []).append(tensor)
    return files


def _why_missing(folder: str, key: str, shape: tuple[int, ...], stored: Mapping[str, StoredTensor]) -> str:
    layer = key.partition(".mlp.")[0].partition(".block_sparse_moe.")[0]
    fused = [name for name in stored if name.startswith(f"{layer}.") and FUSED_EXPERTS.search(name)]
    if ".experts." in key and fused:
        name = max(fused)  # gate_up_proj, whose matrices are the first to be missed
        found = stored[name]
        return (
            f"{found.file}: {name}, of shape {found.shape}, holds all experts of a layer in one tensor. Expected "
            f"is one matrix per expert, as {key} of shape {shape}: transformers' save_pretrained writes these"
        )
    return f"{folder}: no file holds {key}, which by config.json has shape {shape}"
