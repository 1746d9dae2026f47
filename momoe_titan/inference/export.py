"""Converts a TorchTitan checkpoint into weights that Hugging Face's libraries read, layer by layer."""

import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_checkpoint

from momoe_titan.config.hugging_face import FORMATS_WITH_BIAS
from momoe_titan.inference.load import saved_tensors
from momoe_titan.model import MomoeLlamaArgs, MomoeStateDictAdapter
from momoe_titan.model.hugging_face.config import BIAS_FILE, hf_format
from momoe_titan.model.hugging_face.names import INDEX_FILE


def convert(
    path: str, out: str, args: MomoeLlamaArgs, dtype: torch.dtype | None, shard_bytes: int
) -> tuple[bool, torch.dtype]:
    """Write the weights and their index, and the balancing biases beside them if the format cannot hold them.

    Reads and writes layer by layer: takes the memory of about three layers and one file.

    Args:
        path: the torch.distributed checkpoint.
        out: an empty folder.
        args: of the model.
        dtype: of the written weights; None for the dtype that they were saved in.
        shard_bytes: the size of a file at most; a single larger weight has a file of its own.

    Returns:
        Whether a file of biases was written, and the dtype of the weights.
    """
    adapter = MomoeStateDictAdapter(args, None)
    saved = saved_tensors(path, args)
    checkpoint = _Checkpoint(path, saved, dtype or saved["norm.weight"].properties.dtype)
    layers: dict[str, list[str]] = {}
    biases = []
    for key in saved:
        if key.endswith("expert_bias") and hf_format(args) not in FORMATS_WITH_BIAS:
            biases.append(key)
        else:
            layers.setdefault(".".join(key.split(".")[:2]), []).append(key)
    writer = ShardWriter(out, shard_bytes)
    for keys in layers.values():
        for key, tensor in adapter.to_hf(checkpoint.read(keys)).items():
            writer.add(key, tensor)
    writer.finish()

    bias_tensors = checkpoint.read(biases)
    adapter.to_hf(bias_tensors)  # warns where a bias is lost
    any_lost = any(bias.any() for bias in bias_tensors.values())
    if any_lost:
        _save_file(bias_tensors, os.path.join(out, BIAS_FILE))
    return any_lost, checkpoint.dtype


@dataclass
class _Checkpoint:
    """A torch.distributed checkpoint of which some tensors at a time are read."""

    path: str
    saved: Mapping[str, TensorStorageMetadata]
    dtype: torch.dtype

    def read(self, keys: Iterable[str]) -> dict[str, torch.Tensor]:
        """These tensors: biases in float32, all others in `dtype`."""
        tensors = {
            key: torch.empty(self.saved[key].size, dtype=torch.float32 if key.endswith("expert_bias") else self.dtype)
            for key in keys
        }
        load_checkpoint(tensors, storage_reader=FileSystemReader(self.path), no_dist=True)
        return tensors


class ShardWriter:
    """Writes tensors into safetensors files of a bounded size, in the order in which they are added.

    The files get their names in the end, when their number is known.
    """

    def __init__(self, folder: str, shard_bytes: int):
        self.folder, self.shard_bytes = folder, shard_bytes
        self.shard: dict[str, torch.Tensor] = {}
        self.bytes_of_files: list[dict[str, int]] = []  # of every tensor in each file

    def add(self, key: str, tensor: torch.Tensor) -> None:
        if self.shard and sum(t.nbytes for t in self.shard.values()) + tensor.nbytes > self.shard_bytes:
            self._write()
        self.shard[key] = tensor

    def finish(self) -> None:
        """Write the last file, and an index where there are several."""
        self._write()
        number = len(self.bytes_of_files)
        weight_map: dict[str, str] = {}
        for i, keys in enumerate(self.bytes_of_files, start=1):
            name = f"model-{i:05}-of-{number:05}.safetensors" if number > 1 else "model.safetensors"
            file = os.path.join(self.folder, name)
            os.rename(os.path.join(self.folder, f"{i}.part"), file)
            os.chmod(file, 0o644)  # safetensors lets nobody else read them
            weight_map.update(dict.fromkeys(keys, name))
        if number > 1:
            size = sum(sum(keys.values()) for keys in self.bytes_of_files)
            with open(os.path.join(self.folder, INDEX_FILE), "w") as f:
                json.dump({"metadata": {"total_size": size}, "weight_map": weight_map}, f, indent=2)

    def _write(self) -> None:
        number = len(self.bytes_of_files) + 1
        _save_file(self.shard, os.path.join(self.folder, f"{number}.part"))
        keys = {key: tensor.nbytes for key, tensor in self.shard.items()}
        self.bytes_of_files.append(keys)
        print(f"file {number}: {sum(keys.values()) / 2**30:.2f} GiB", file=sys.stderr)
        self.shard.clear()


def _save_file(tensors: dict[str, torch.Tensor], file: str) -> None:
    from safetensors.torch import save_file  # of the extra "hf"

    save_file(tensors, file, {"format": "pt"})
