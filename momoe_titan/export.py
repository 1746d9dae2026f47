"""Convert a checkpoint of TorchTitan's into a folder that transformers loads.

    python -m momoe_titan.export outputs/debug_model/checkpoint exported/ \\
        --job.config_file train_configs/debug_model.toml
    python -c 'from transformers import AutoModelForCausalLM as M; M.from_pretrained("exported/")'

CHECKPOINT is a folder of torch.distributed.checkpoint, written by any number of ranks, or the folder above it, for the
latest step. Weights are read and written layer by layer: this takes the memory of about three layers and one file, and
no GPU. The model decides which format it becomes (docs/hugging_face.md). If the format cannot hold the load-balancing
bias, the bias is written beside the weights, with a warning. Without OUT, a folder that checkpoint.last_save_in_hf
wrote gets the config.json and tokenizer that it lacks.

--verify then compares the logits of a text with those of transformers, which must be installed. Exit status: 0, 1 where
they differ by more than rounding, 2 for what cannot be exported.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

# Before torch loads its OpenMP runtime: threads that wait for one another asleep, as in training. Spinning on cores
# shared with other work, they make a token of a small model take fifty times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from momoe_titan.config.command_line import install_command
from momoe_titan.inference.export import convert
from momoe_titan.inference.load import args_and_tokenizer, find_checkpoint
from momoe_titan.inference.verify import compare
from momoe_titan.model import MomoeLlamaArgs
from momoe_titan.model.hugging_face.config import BIAS_FILE, hf_format, saved_dtype, write_hf_config


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of this command, and those of the job."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary,
        epilog=rest + "Options --section.field are those of momoe_titan.train: how the checkpoint was trained.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("out", metavar="OUT", nargs="?", help="a new or an empty folder")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="dtype of the weights (default: as they were saved); a bias stays float32",
    )
    parser.add_argument("--shard_gib", type=float, default=5.0, help="largest size of a file (default: %(default)s)")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="in place of the job's")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare with transformers, in float32 on the CPU; an OUT that was exported before is left as it is",
    )
    return parser.parse_known_args(argv)


def main(argv: Sequence[str]) -> int:
    """Export as these arguments say. Returns the exit status: 1 where --verify finds another model.

    Raises:
        ValueError: names what cannot be exported, and why.
    """
    options, job = parse(argv)
    try:
        import safetensors  # noqa: F401
    except ModuleNotFoundError as e:
        raise ValueError(f"{e}: {install_command('hf')}") from e
    path, is_hf = find_checkpoint(options.checkpoint)
    args, assets = args_and_tokenizer(path, job, options.tokenizer)
    name = hf_format(args)
    if is_hf:
        if options.out or options.dtype:
            raise ValueError(f"{path!r} is in Hugging Face's format already: OUT has no meaning")
        if job or not options.verify:
            write_hf_config(path, args, assets, saved_dtype(path))
            print(f"{path}: config.json and tokenizer written ({name})")
    elif options.verify and options.out and os.path.isfile(os.path.join(options.out, "config.json")):
        print(f"{options.out}: was exported before, and is left as it is; compared with {path}")
    else:
        _export(path, args, assets, options)
    return _verify(path, args, assets, path if is_hf else options.out) if options.verify else 0


def _export(path: str, args: MomoeLlamaArgs, assets: str, options: argparse.Namespace) -> None:
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
    name = str(dtype).removeprefix("torch.")
    print(f"{options.out}: {path}, written as {name}, to be loaded by transformers as model_type {hf_format(args)!r}")


def _verify(path: str, args: MomoeLlamaArgs, assets: str, folder: str) -> int:
    """The exit status."""
    comparison = compare(path, args, assets, folder, saved_dtype(folder))
    print(comparison)
    if comparison.is_equal:
        print(f"{folder}: transformers computes the same model")
        return 0
    reason = ""
    if os.path.isfile(os.path.join(folder, BIAS_FILE)):
        reason = f": the format cannot hold the load-balancing bias, which is in {BIAS_FILE}"
    elif folder != path and _is_older(folder, path):
        reason = f": {folder} was exported before {path} was saved; export that into another folder"
    print(f"{folder}: TRANSFORMERS COMPUTES ANOTHER MODEL{reason}", file=sys.stderr)
    return 1


def _is_older(folder: str, path: str) -> bool:
    """Whether an export was made before this checkpoint."""
    times = [os.path.getmtime(os.path.join(at, name)) for at, name in ((folder, "config.json"), (path, ".metadata"))]
    return times[0] < times[1]


def command() -> None:
    """The command line; see above for its exit status."""
    warnings.filterwarnings("ignore", category=UserWarning)
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError) as e:
        print(f"{os.path.basename(sys.argv[0])}: error: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    command()
