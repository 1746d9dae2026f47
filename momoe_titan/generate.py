"""Sample text from a checkpoint, streaming to the terminal.

    python -m momoe_titan.generate outputs/debug_model/checkpoint \\
        --job.config_file train_configs/debug_model.toml --prompt "def main("
    python -m momoe_titan.generate exported/ --prompt "Once upon" --temperature 0.7 --top_p 0.9
    echo "import" | python -m momoe_titan.generate exported/ --max_tokens 50

CHECKPOINT is either a folder of TorchTitan's (or the folder above it, for the latest step), given with the
--job.config_file and other options that it was trained with, or a Hugging Face folder, whose config.json describes the
model. The text goes to standard output, everything else to standard error.
"""

import argparse
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence

# Before torch loads its OpenMP runtime: threads that wait for one another asleep, as in training. Spinning on cores
# shared with other work, they make a token of a small model take fifty times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from momoe_titan.data.tokenizer import TextTokenizer
from momoe_titan.inference.load import args_and_tokenizer, find_checkpoint, load_model, with_positions
from momoe_titan.inference.sampling import generate, stream_text


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
    parser.add_argument("--prompt", help="text to continue (default: standard input)")
    parser.add_argument("--max_tokens", type=int, default=200, help="most tokens to sample (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest (default: %(default)s)")
    parser.add_argument("--top_k", type=int, default=0, help="sample from the K likeliest tokens; 0: from all")
    parser.add_argument("--top_p", type=float, default=1.0, help="sample from the likeliest that together reach P")
    parser.add_argument("--seed", type=int, help="gives the same answer each time")
    parser.add_argument("--ignore_eos", action="store_true", help="continue after an end of text")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="in place of the checkpoint's or job's")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="dtype of the weights (default: bfloat16 on a GPU, float32 on the CPU)",
    )
    return parser.parse_known_args(argv)


class Stopwatch:
    """Notes when each token came."""

    def __init__(self):
        self.start = time.perf_counter()
        self.times: list[float] = []

    def watch(self, tokens: Iterator[int]) -> Iterator[int]:
        """The same tokens."""
        for token in tokens:
            self.times.append(time.perf_counter())
            yield token

    def __str__(self) -> str:
        times = self.times
        first = f"; the first after {times[0] - self.start:.2f} s" if times else ""
        speed = f", then {(len(times) - 1) / (times[-1] - times[0]):.1f}/s" if len(times) > 1 else ""
        return first + speed


def main(argv: Sequence[str]) -> None:
    """Sample as these arguments say.

    Raises:
        ValueError: names what cannot be loaded or sampled, and why.
    """
    options, job = parse(argv)
    if options.max_tokens < 1:
        raise ValueError(f"--max_tokens is {options.max_tokens}, must be at least 1")
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as e:  # the latter without a build for GPUs
        raise ValueError(f"--device {options.device!r} is none of this machine's: {e}") from e
    path, _ = find_checkpoint(options.checkpoint)
    args, assets = args_and_tokenizer(path, job, options.tokenizer)
    tokenizer = TextTokenizer(assets, parse_special=True)
    prompt = sys.stdin.read() if options.prompt is None else options.prompt
    prompt_ids = tokenizer.encode(prompt, add_bos=True, add_eos=False)
    length = len(prompt_ids) + options.max_tokens
    if length > args.max_seq_len:
        say(f"note: {length} tokens, but the model was trained on {args.max_seq_len}")
    dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    say(f"loading {path}")
    model = load_model(path, with_positions(args, length), options.device, getattr(torch, dtype))
    stopwatch = Stopwatch()
    tokens = generate(
        model,
        prompt_ids,
        options.max_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        eos_id=None if options.ignore_eos else tokenizer.eos_id,
    )
    print(prompt, end="", flush=True)
    for piece in stream_text(tokenizer, stopwatch.watch(tokens)):
        print(piece, end="", flush=True)
    print()
    say(f"{len(stopwatch.times)} tokens after a prompt of {len(prompt_ids)}{stopwatch}")


def say(message: str) -> None:
    """Print to standard error."""
    print(message, file=sys.stderr, flush=True)


def command() -> None:
    """The command line; exit status 2 for what cannot be loaded."""
    warnings.filterwarnings("ignore", category=UserWarning)
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as e:
        say(f"{os.path.basename(sys.argv[0])}: error: {e}")
        sys.exit(2)
    except KeyboardInterrupt:
        print()
        sys.exit(130)


if __name__ == "__main__":
    command()
