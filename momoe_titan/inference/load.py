"""Finds a checkpoint and loads its model, for sampling and export.

One process, no process group. A checkpoint is TorchTitan's (torch.distributed.checkpoint, from any number of ranks) or
a Hugging Face folder.
"""

import copy
import importlib
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_checkpoint
from torchtitan.tools.logging import logger

from momoe_titan.components.checkpoint import CheckpointError, read_metadata, saved_steps, step_folder
from momoe_titan.components.checksums import find_changed_bytes
from momoe_titan.config.flavor import MODEL_NAME
from momoe_titan.config.reading import read_job as read_configuration
from momoe_titan.config.suggestions import did_you_mean
from momoe_titan.data.tokenizer import build_tokenizer
from momoe_titan.model import MomoeLlama, MomoeLlamaArgs, MomoeStateDictAdapter, flavors
from momoe_titan.model.args import read_hf_args
from momoe_titan.model.hugging_face.files import check_hf_files, stored_tensors
from momoe_titan.model.moe import BalancedMoE


def find_checkpoint(folder: str) -> tuple[str, bool]:
    """The checkpoint in `folder`, or the latest whole one in its step-* folders; warns of later ones.

    Returns:
        Its path, and whether it is in Hugging Face's format.

    Raises:
        ValueError: there is none.
    """
    if os.path.isfile(os.path.join(folder, ".metadata")):
        return folder, False
    if os.path.isdir(folder):
        if any(name.endswith(".safetensors") for name in os.listdir(folder)):
            return folder, True
        faults = []
        for step in sorted(saved_steps(folder), reverse=True):
            path = step_folder(folder, step)
            try:
                found, is_hf = find_checkpoint(path)
                stored_tensors(found) if is_hf else read_metadata(found)
            except ValueError as e:
                faults.append((path, e))
                continue
            for passed, fault in faults:
                logger.warning(f"PASSED OVER the checkpoint {passed}: {fault}")
            return found, is_hf
        if faults:
            said = (f"{passed!r} cannot be read: {fault}" for passed, fault in faults)
            raise ValueError(f"{folder!r} holds no whole checkpoint: {'; '.join(said)}")
    raise ValueError(
        f"{folder!r} holds no checkpoint: neither .metadata (TorchTitan's), nor *.safetensors "
        "(Hugging Face's), nor a folder step-N with one of them"
    )


def read_job(options: Sequence[str]) -> tuple[MomoeLlamaArgs, str]:
    """Model arguments and tokenizer folder of the job that these options of `momoe_titan.train` describe.

    Raises:
        ValueError: an unusable configuration; names the field.
    """
    config = read_configuration(options)
    if config.model.name != MODEL_NAME:
        raise ValueError(f"model.name is {config.model.name!r}, must be {MODEL_NAME!r}")
    if module := config.experimental.custom_import:  # which may add a flavor
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as e:
            raise ValueError(
                f"experimental.custom_import {module!r}: {e}; a script does not look in the current "
                "folder: add it to PYTHONPATH"
            ) from e
    if config.model.flavor not in flavors:
        hint = did_you_mean(config.model.flavor, flavors)
        raise ValueError(f"model.flavor {config.model.flavor!r} is none of {', '.join(flavors)}{hint}")
    # The model's own settings only: how the job trains, on how many ranks, and what it saves, does not matter here.
    args = copy.deepcopy(flavors[config.model.flavor])
    args.take_settings(config)
    args.validate(section="momoe.")
    build_tokenizer(config)
    return args, config.model.hf_assets_path


def saved_tensors(path: str, args: MomoeLlamaArgs) -> dict[str, TensorStorageMetadata]:
    """The weights and balancing biases of this model that a torch.distributed checkpoint holds.

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
        found = saved.get(key)
        if not isinstance(found, TensorStorageMetadata):
            raise ValueError(f"the checkpoint in {path!r} is of another model: it lacks {key}")
        if found.size != tensor.shape:
            raise ValueError(
                f"the checkpoint in {path!r} is of another model: its {key} is "
                f"{tuple(found.size)}, the model's is {tuple(tensor.shape)}"
            )
        tensors[key] = found
    return tensors


def load_model(path: str, args: MomoeLlamaArgs, device: torch.device | str, dtype: torch.dtype) -> MomoeLlama:
    """The model in evaluation mode, with weights of `dtype`, from either kind of checkpoint.

    Raises:
        ValueError: the checkpoint is of another model, or bytes of it have changed since they were written.
    """
    is_hf = find_checkpoint(path)[1]
    if is_hf:
        check_hf_files(path, args)
    with torch.device("meta"):
        model = MomoeLlama(args)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.to_empty(device=device)
    model.tie_weights()
    with torch.device(device):
        model.freqs_cis = model._precompute_freqs_cis()
    for module in model.modules():
        if isinstance(module, BalancedMoE):
            module.reset_balance_state(torch.device(device))
    state_dict: dict[str, Any] = model.state_dict()
    if is_hf:
        adapter = MomoeStateDictAdapter(args, None)
        hf_state_dict = adapter.to_hf(state_dict)
        reader = adapter.get_hf_storage_reader(path)
        load_checkpoint(hf_state_dict, storage_reader=reader, no_dist=True)
        model.load_state_dict(adapter.from_hf(hf_state_dict))
    else:
        tensors = {key: state_dict[key] for key in saved_tensors(path, args)}
        if (fault := find_changed_bytes(path, read_metadata(path), tensors)) is not None:
            raise ValueError(f"the checkpoint {path!r} cannot be loaded: {fault}")
        load_checkpoint(tensors, storage_reader=FileSystemReader(path), no_dist=True)
    return model.eval().requires_grad_(False)


def args_and_tokenizer(path: str, options: Sequence[str], assets: str | None = None) -> tuple[MomoeLlamaArgs, str]:
    """Model arguments and tokenizer folder for a checkpoint.

    They come from its config.json if it has one and there are no options, else from the options of its training job.

    Args:
        assets: a tokenizer folder to use in place of the one found.

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


def with_positions(args: MomoeLlamaArgs, length: int) -> MomoeLlamaArgs:
    """The same model for sequences of this length."""
    return replace(copy.deepcopy(args), max_seq_len=length)
