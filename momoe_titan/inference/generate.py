#!/usr/bin/env python
"""Sample text from a checkpoint, streaming to the terminal.

    python -m momoe_titan.generate outputs/debug_model/checkpoint \\
        --job.config_file train_configs/debug_model.toml --prompt "def main("
    python -m momoe_titan.generate exported/ --prompt "Once upon" --temperature 0.7 --top_p 0.9
    echo "import" | python -m momoe_titan.generate exported/ --max_tokens 50

CHECKPOINT is a folder of TorchTitan's (or the one above, for the latest step), with the
--job.config_file and other options that it was trained with, or a Hugging Face folder, whose
config.json says what it is. The text goes to standard output, everything else to standard error.
"""

import argparse
import os
import sys
import time
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
    parser.add_argument("--prompt", help="text to go on from (default: standard input)")
    parser.add_argument("--max_tokens", type=int, default=200, help="at most so many (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest (%(default)s)")
    parser.add_argument("--top_k", type=int, default=0, help="of the K likeliest; 0: all")
    parser.add_argument("--top_p", type=float, default=1.0, help="of the likeliest that reach P together")
    parser.add_argument("--seed", type=int, help="the same answer each time")
    parser.add_argument("--ignore_eos", action="store_true", help="go on after an end of text")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="in place of the checkpoint's or job's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of the weights (bfloat16 on a GPU, float32 on the CPU)",
    )
    return parser.parse_known_args(argv)


def main(argv: list[str]) -> None:
    options, job = parse(argv)
    if options.max_tokens < 1:
        raise ValueError(f"--max_tokens is {options.max_tokens}, must be at least 1")
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as e:  # the latter without a build for GPUs
        raise ValueError(f"--device {options.device!r} is none of this machine's: {e}") from e
    from torchtitan.components.tokenizer import HuggingFaceTokenizer

    from momoe_titan.inference.model import (
        args_and_tokenizer,
        find_checkpoint,
        generate,
        load_model,
        stream_text,
        with_positions,
    )

    path, _ = find_checkpoint(options.checkpoint)
    args, assets = args_and_tokenizer(path, job, options.tokenizer)
    tokenizer = HuggingFaceTokenizer(assets)
    prompt = sys.stdin.read() if options.prompt is None else options.prompt
    prompt_ids = tokenizer.encode(prompt, add_bos=True, add_eos=False)
    length = len(prompt_ids) + options.max_tokens
    if length > args.max_seq_len:
        say(f"note: {length} tokens, but the model was trained on {args.max_seq_len}")
    dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    say(f"loading {path}")
    model = load_model(path, with_positions(args, length), options.device, getattr(torch, dtype))
    start = time.perf_counter()
    times = []

    def timed(tokens):
        for token in tokens:
            times.append(time.perf_counter())
            yield token

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
    for piece in stream_text(tokenizer, timed(tokens)):
        print(piece, end="", flush=True)
    print()
    speed = f", then {(len(times) - 1) / (times[-1] - times[0]):.1f}/s" if len(times) > 1 else ""
    first = f"; the first after {times[0] - start:.2f} s{speed}" if times else ""
    say(f"{len(times)} tokens after a prompt of {len(prompt_ids)}{first}")


def say(message: str) -> None:
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
