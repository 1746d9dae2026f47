"""How fast the data loader is: alone on the CPU, and as the part of a GPU's speed that training with it reaches.

    python benchmarks/data.py texts OUT.jsonl --megabytes 250
    python benchmarks/data.py loader --path OUT.jsonl --threads 2 --out loader.json
    python benchmarks/data.py training --out training.json -- --job.config_file train_configs/500m.toml \
        --training.dataset local --training.dataset_path OUT.jsonl

`texts` writes Python sources of this environment as records. `loader` counts tokens per second of batches, beside those
of the tokenizer alone in as many threads. `training` trains in one process, by turns with new batches and with one
batch over and over, and gives the speed of both, their swing, and the share of the time lost in waiting for data.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import sysconfig
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

BATCH, SEQ_LEN = 16, 2048  # of the loader alone
WARM_UP, WINDOW, PHASES = 20, 10, 4  # steps, steps, and turns of both kinds


def write_texts(path: str, megabytes: int) -> int:
    """Write a .jsonl of Python sources; repeated with another number if there are too few. Returns the documents."""
    files = sorted(Path(sysconfig.get_path("purelib")).rglob("*.py")) + sorted(
        Path(sysconfig.get_path("stdlib")).glob("*.py")
    )
    documents, size = 0, 0
    with open(path, "w") as f:
        for turn in itertools.count():
            for file in files:
                text = file.read_text(encoding="utf-8", errors="replace")
                f.write(
                    json.dumps({"id": documents, "turn": turn, "text": f"# {turn}\n{text}" if turn else text}) + "\n"
                )
                documents, size = documents + 1, size + len(text)
                if size > megabytes * 1e6:
                    return documents


def measure_loader(path: str, threads: int, seconds: float, tokenizer_folder: str) -> dict[str, Any]:
    """Tokens per second of the loader and of the tokenizer alone, each with as many threads."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from momoe_titan.data.loader import Shape, TextDataloader
    from momoe_titan.data.local_files import load_local
    from momoe_titan.data.order import Order
    from momoe_titan.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_folder, "--tokenizer")
    source = load_local(path)
    loader = TextDataloader(Order([source]), tokenizer, Shape("training", BATCH, SEQ_LEN, threads=threads), 0, 1)
    counts = [0] * threads

    def tokenize(thread: int, end: float) -> None:
        for start in itertools.count(32 * thread, 32 * threads):
            texts = source.read([i % len(source) for i in range(start, start + 32)])
            # Only counted: a list of ids is what the loader pays beside.
            counts[thread] += sum(len(each) for each in tokenizer.tokenizer.encode_batch_fast(texts))
            if time.monotonic() > end:
                return

    rates: dict[str, list[float]] = {"loader": [], "tokenizer": []}
    for _ in range(3):  # by turns, because other work on the machine comes and goes
        batches = iter(loader)
        next(batches)
        begin, tokens = time.monotonic(), 0
        while time.monotonic() - begin < seconds:
            tokens += next(batches)[1].numel()
        rates["loader"].append(tokens / (time.monotonic() - begin))
        batches.close()
        counts[:] = [0] * threads
        begin = time.monotonic()
        working = [threading.Thread(target=tokenize, args=(i, begin + seconds)) for i in range(threads)]
        for each in working:
            each.start()
        for each in working:
            each.join()
        rates["tokenizer"].append(sum(counts) / (time.monotonic() - begin))
    return {name: round(statistics.median(each)) for name, each in rates.items()} | {"threads": threads}


def turn_taking(base: type, result: dict[str, Any]) -> type:
    """The trainer `base`, which takes new batches and one batch by turns, and measures."""
    import torch

    class TurnTaking(base):
        def batch_generator(self, data_iterable):
            batches = super().batch_generator(data_iterable)
            kept = next(batches)
            yield kept
            for _ in range(WARM_UP):
                yield next(batches)
            windows = (self.job_config.training.steps - WARM_UP - 2) // (2 * PHASES * WINDOW)
            for turn, kind in enumerate(("new", "kept") * PHASES):
                for window in range(windows):
                    torch.cuda.synchronize()
                    begin = time.perf_counter()
                    waited = 0.0
                    for _ in range(WINDOW):
                        yield next(batches) if kind == "new" else kept
                        waited += self.metrics_processor.data_loading_times[-1] if kind == "new" else 0.0
                    torch.cuda.synchronize()
                    seconds = time.perf_counter() - begin
                    if window:  # the first after a change has its end in it
                        result["windows"].append({"turn": turn, "kind": kind, "seconds": seconds, "waited": waited})
            yield from batches

    return TurnTaking


def summarise(windows: list[dict[str, Any]], tokens_per_window: int) -> dict[str, Any]:
    """Speeds, their ratio and swing (largest minus smallest, of the median), and the share of the time lost."""
    summary: dict[str, Any] = {}
    for kind in ("new", "kept"):
        rates = [tokens_per_window / w["seconds"] for w in windows if w["kind"] == kind]
        median = statistics.median(rates)
        summary[kind] = {"tokens_per_s": round(median), "swing_percent": 100 * (max(rates) - min(rates)) / median}
    new = [w for w in windows if w["kind"] == "new"]
    summary["percent_of_kept"] = 100 * summary["new"]["tokens_per_s"] / summary["kept"]["tokens_per_s"]
    summary["waiting_percent"] = 100 * sum(w["waited"] for w in new) / sum(w["seconds"] for w in new)
    return summary


def measure_training(options: list[str]) -> dict[str, Any]:
    """Train with these options of a job; see the head of this file."""
    sys.argv = [sys.argv[0], *options]
    from momoe_titan.train import set_single_process_defaults

    set_single_process_defaults()
    from momoe_titan.components import trainer

    result: dict[str, Any] = {"options": options, "windows": []}
    kept: list[Any] = []
    taking = turn_taking(trainer.Trainer, result)

    class Kept(taking):
        def __init__(self, *args):
            super().__init__(*args)
            kept.append(self.job_config)

    with mock.patch.object(trainer, "Trainer", Kept):
        result["status"] = trainer.train(options)
    training = kept[0].training
    tokens = WINDOW * training.local_batch_size * training.seq_len
    return summarise(result["windows"], tokens) | result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    texts = what.add_parser("texts")
    texts.add_argument("path")
    texts.add_argument("--megabytes", type=int, default=250)
    loader = what.add_parser("loader")
    loader.add_argument("--path", required=True)
    loader.add_argument("--threads", type=int, default=2)
    loader.add_argument("--seconds", type=float, default=5.0)
    loader.add_argument("--tokenizer", default="momoe_titan/assets/tokenizer")
    loader.add_argument("--out")
    training = what.add_parser("training")
    training.add_argument("--out")
    training.add_argument("options", nargs="*", help="after --: of the job")
    args = parser.parse_args()
    if args.what == "texts":
        print(write_texts(args.path, args.megabytes), "documents")
        return
    if args.what == "loader":
        result = measure_loader(args.path, args.threads, args.seconds, args.tokenizer)
    else:
        result = measure_training(args.options)
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1))
    print(json.dumps({name: each for name, each in result.items() if name != "windows"}, indent=1))


if __name__ == "__main__":
    main()
