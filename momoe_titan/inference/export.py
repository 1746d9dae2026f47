#!/usr/bin/env python
"""Convert a checkpoint of TorchTitan's into a folder that transformers loads.

    python -m momoe_titan.export outputs/debug_model/checkpoint exported/ \\
        --job.config_file train_configs/debug_model.toml
    python -c 'from transformers import AutoModelForCausalLM as M; M.from_pretrained("exported/")'

CHECKPOINT is a folder of torch.distributed.checkpoint, from any number of ranks, or the one above,
for the latest step. Weights are read and written layer by layer: it takes the memory of about
three layers and of a file, and no GPU. Which format it becomes follows from the model
(docs/interop.md). A load-balancing bias that the format cannot hold is written beside the weights
and said loudly. A folder that checkpoint.last_save_in_hf left, given without OUT, gets the
config.json and tokenizer that it lacks.
"""

import argparse
import json
import os
import sys
import warnings

import torch


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog=__doc__.partition("\n\n")[2]
        + "Options --section.field are those of momoe_titan.train: how the checkpoint was trained.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("out", metavar="OUT", nargs="?", help="a new or an empty folder")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of the weights (as they were saved); a bias stays float32",
    )
    parser.add_argument("--shard_gib", type=float, default=5.0, help="size of a file at most (%(default)s)")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="in place of the job's")
    return parser.parse_known_args(argv)


def main(argv: list[str]) -> None:
    options, job = parse(argv)
    try:
        import safetensors  # noqa: F401
    except ModuleNotFoundError as e:
        raise ValueError(f"{e}: pip install 'momoe_titan[hf]'") from e
    from momoe_titan.inference.model import args_and_tokenizer, find_checkpoint
    from momoe_titan.model.hugging_face.config import (
        hf_format,
        saved_dtype,
        write_hf_config,
    )

    path, is_hf = find_checkpoint(options.checkpoint)
    args, assets = args_and_tokenizer(path, job, options.tokenizer)
    name = hf_format(args)
    if is_hf:
        if options.out or options.dtype:
            raise ValueError(f"{path!r} is in Hugging Face's format already: OUT has no meaning")
        write_hf_config(path, args, assets, saved_dtype(path))
        print(f"{path}: config.json and tokenizer written ({name})")
        return
    if not options.out:
        raise ValueError("OUT is missing: where to write to")
    if os.path.isdir(options.out) and os.listdir(options.out):
        raise ValueError(f"OUT {options.out!r} is not empty")
    if not options.shard_gib > 0:
        raise ValueError(f"--shard_gib is {options.shard_gib}, must be above 0")
    dtype = getattr(torch, options.dtype) if options.dtype else None
    os.makedirs(options.out, exist_ok=True)
    bias_file, dtype = convert(path, options.out, args, dtype, int(options.shard_gib * 2**30))
    write_hf_config(options.out, args, assets, dtype, bias_file)
    print(f"{options.out}: {name}, {str(dtype).removeprefix('torch.')}")


def convert(path, out, args, dtype, shard_bytes) -> tuple[bool, torch.dtype]:
    """Write the weights and their index.

    Args:
        path: the torch.distributed checkpoint.
        out: an empty folder.
        args: of the model.
        dtype: of the weights; None for what they were saved in.
        shard_bytes: size of a file at most, single larger weights excepted.

    Returns:
        Whether a file of biases was written, and the dtype of the weights.
    """
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import save_file
    from torch.distributed.checkpoint import FileSystemReader

    from momoe_titan.config.hugging_face import FORMATS_WITH_BIAS
    from momoe_titan.inference.model import saved_tensors
    from momoe_titan.model import MomoeStateDictAdapter
    from momoe_titan.model.hugging_face.config import BIAS_FILE, hf_format
    from momoe_titan.model.hugging_face.weights import INDEX_FILE

    adapter = MomoeStateDictAdapter(args, None)
    saved = saved_tensors(path, args)
    dtype = dtype or saved["norm.weight"].properties.dtype

    def read(keys):
        tensors = {
            key: torch.empty(
                saved[key].size,
                dtype=torch.float32 if key.endswith("expert_bias") else dtype,
            )
            for key in keys
        }
        dcp.load(tensors, storage_reader=FileSystemReader(path), no_dist=True)
        return tensors

    groups: dict[str, list[str]] = {}
    biases = []
    for key in saved:
        if key.endswith("expert_bias") and hf_format(args) not in FORMATS_WITH_BIAS:
            biases.append(key)
        else:
            groups.setdefault(".".join(key.split(".")[:2]), []).append(key)

    files: list[dict[str, int]] = []  # of each, the bytes of its weights
    shard: dict[str, torch.Tensor] = {}

    def write_shard():
        save_file(shard, os.path.join(out, f"{len(files) + 1}.part"), {"format": "pt"})
        files.append({key: tensor.nbytes for key, tensor in shard.items()})
        print(f"{len(files)}: {sum(files[-1].values()) / 2**30:.2f} GiB", file=sys.stderr)
        shard.clear()

    for keys in groups.values():
        for key, tensor in adapter.to_hf(read(keys)).items():
            if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > shard_bytes:
                write_shard()
            shard[key] = tensor
    write_shard()
    weight_map, size = {}, 0
    for i, keys in enumerate(files, start=1):
        name = "model.safetensors"
        if len(files) > 1:
            name = f"model-{i:05}-of-{len(files):05}.safetensors"
        os.rename(os.path.join(out, f"{i}.part"), os.path.join(out, name))
        os.chmod(os.path.join(out, name), 0o644)  # safetensors lets nobody else read them
        weight_map.update(dict.fromkeys(keys, name))
        size += sum(keys.values())
    if len(files) > 1:
        with open(os.path.join(out, INDEX_FILE), "w") as f:
            json.dump({"metadata": {"total_size": size}, "weight_map": weight_map}, f, indent=2)

    bias_tensors = read(biases)
    adapter.to_hf(bias_tensors)  # warns if there is something to lose
    lost = any(bias.any() for bias in bias_tensors.values())
    if lost:
        save_file(bias_tensors, os.path.join(out, BIAS_FILE))
    return lost, dtype


def command() -> None:
    """The command line; exit status 2 for what cannot be exported."""
    warnings.filterwarnings("ignore", category=UserWarning)
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as e:
        print(f"{os.path.basename(sys.argv[0])}: error: {e}", file=sys.stderr)
        sys.exit(2)
