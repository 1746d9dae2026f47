"""How fast the data loader is: alone on the CPU, and as the part of a GPU's speed that training with it reaches.

    python benchmarks/data.py texts OUT.jsonl --megabytes 250
    python benchmarks/data.py loader --path OUT.jsonl --workers 2 --out loader.json
    python benchmarks/data.py training --out training.json -- --job.config_file train_configs/500m.toml \
        --training.dataset local --training.dataset_path OUT.jsonl

`texts` writes Python sources of this environment as records. `loader` counts tokens per second of batches, beside those
of the tokenizer alone on as many cores. `training` trains in one process, by turns with new batches and with one
batch over and over, and gives the speed of both, their swing, and the share of the time lost in waiting for data. Under
torchrun it does so on several ranks, and gives what the first one sees.
"""

import argparse
import contextlib
import copy
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any
from unittest import mock

BATCH, SEQ_LEN = 16, 2048  # of the loader alone
WARM_UP, WINDOW, PHASES = 20, 10, 2  # steps, steps, and turns of both kinds


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


def workers_of(method: str) -> Any:
    """While open, loaders that begin tokenize in processes, not in threads, where the method is "process"."""
    from momoe_titan.data import pipeline

    mapper = pipeline.ParallelMapper

    def with_method(*args: Any, **kwargs: Any) -> Any:
        return mapper(*args, **kwargs | {"method": method, "multiprocessing_context": "fork"})

    return mock.patch.object(pipeline, "ParallelMapper", with_method)


def measure_loader(path: str, workers: int, seconds: float, folder: str, method: str) -> dict[str, Any]:
    """Tokens per second of the loader with so many threads, and of the tokenizer alone in as many processes.

    The processes tokenize the same documents in the same order, and keep nothing.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from momoe_titan.data.loader import Shape, TextDataloader
    from momoe_titan.data.local_files import load_local
    from momoe_titan.data.order import Order
    from momoe_titan.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder, "--tokenizer")
    order = Order([load_local(path)])
    counts = multiprocessing.get_context("fork").Queue()

    def tokenize(worker: int) -> None:
        tokens, begin = 0, time.monotonic()
        for start in itertools.count(32 * worker, 32 * workers):
            texts = order.sources[0].read([document for _, document, _ in order.find(range(start, start + 32))])
            tokens += sum(len(each) for each in tokenizer.tokenizer.encode_batch_fast(texts))
            if (spent := time.monotonic() - begin) > seconds:
                return counts.put(tokens / spent)

    rates: dict[str, list[float]] = {"loader": [], "tokenizer": []}
    for _ in range(3):  # by turns, because other work on the machine comes and goes
        processes = [multiprocessing.get_context("fork").Process(target=tokenize, args=(i,)) for i in range(workers)]
        for each in processes:
            each.start()
        rates["tokenizer"].append(sum(counts.get() for _ in processes))
        for each in processes:
            each.join()
        with workers_of(method):
            shape = Shape("training", BATCH, SEQ_LEN, threads=workers)
            batches = iter(TextDataloader(order, tokenizer, shape, 0, 1))
            next(batches)
        begin, tokens = time.monotonic(), 0
        while (spent := time.monotonic() - begin) < seconds:
            tokens += next(batches)[1].numel()
        rates["loader"].append(tokens / spent)
        batches.close()
    return {name: round(statistics.median(each)) for name, each in rates.items()} | {"workers": workers, "by": method}


def turn_taking(base: type, result: dict[str, Any], tokens: str | None, processes: bool) -> type:
    """The trainer `base`, which takes batches of several kinds by turns, and measures.

    Args:
        tokens: path of token shards to read too.
        processes: read the data by a loader that tokenizes in processes, too.
    """
    import torch

    from momoe_titan.data.loader import build_dataloader

    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)

    class TurnTaking(base):
        def batch_generator(self, data_iterable):
            kinds = {"new": super().batch_generator(data_iterable)}
            ranks = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
            if processes:
                with workers_of("process"):
                    loader = build_dataloader(*ranks, self.tokenizer, self.job_config)
                    kinds["processes"] = super().batch_generator(loader)
                    next(kinds["processes"])
            if tokens:
                config = copy.deepcopy(self.job_config)
                config.training.dataset_path = tokens
                kinds["tokens"] = super().batch_generator(build_dataloader(*ranks, self.tokenizer, config))
            kinds["kept"] = itertools.repeat(next(kinds["new"]))
            training = self.job_config.training
            result["tokens_per_window"] = WINDOW * training.local_batch_size * training.seq_len
            for _ in range(WARM_UP):
                yield next(kinds["new"])
            windows = (training.steps - WARM_UP - 1) // (len(kinds) * PHASES * WINDOW)
            for turn, kind in enumerate([*kinds] * PHASES):
                for window in range(windows):
                    synchronize()
                    begin, waited = time.perf_counter(), 0.0
                    for _ in range(WINDOW):
                        batch = next(kinds[kind])
                        times = self.metrics_processor.data_loading_times
                        if kind == "kept":
                            times.append(0.0)  # the log takes their mean
                        waited += times[-1]  # read before the step, which may log and begin the list anew
                        yield batch
                    synchronize()
                    seconds = time.perf_counter() - begin
                    if window:  # the first after a change has its end in it
                        result["windows"].append({"turn": turn, "kind": kind, "seconds": seconds, "waited": waited})
            yield from kinds["new"]

    return TurnTaking


def summarise(windows: list[dict[str, Any]], tokens_per_window: int) -> dict[str, Any]:
    """By kind: speed, its part of that with one batch, swing (largest minus smallest), time lost; all in percent."""
    summary: dict[str, Any] = {}
    for kind in sorted({window["kind"] for window in windows}, key=lambda kind: kind != "kept"):
        of_kind = [window for window in windows if window["kind"] == kind]
        rates = [tokens_per_window / w["seconds"] for w in of_kind]
        median = statistics.median(rates)
        kept = summary["kept"]["tokens_per_s"] if summary else median
        summary[kind] = {
            "tokens_per_s": round(median),
            "percent_of_kept": round(100 * median / kept, 2),
            "swing_percent": round(100 * (max(rates) - min(rates)) / median, 2),
            "waiting_percent": round(100 * sum(w["waited"] for w in of_kind) / sum(w["seconds"] for w in of_kind), 2),
        }
    return summary


def measure_training(options: list[str], tokens: str | None, processes: bool) -> dict[str, Any]:
    """Train with these options of a job; see the head of this file."""
    sys.argv = [sys.argv[0], *options]
    import torch

    from momoe_titan.train import describe_cpu, set_single_process_defaults

    set_single_process_defaults()
    result: dict[str, Any] = {"options": options, "windows": []}
    with contextlib.nullcontext() if torch.cuda.is_available() else describe_cpu():
        from momoe_titan.components import trainer

        with mock.patch.object(trainer, "Trainer", turn_taking(trainer.Trainer, result, tokens, processes)):
            result["status"] = trainer.train(options)
    return summarise(result["windows"], result["tokens_per_window"]) | result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    texts = what.add_parser("texts")
    texts.add_argument("path")
    texts.add_argument("--megabytes", type=int, default=250)
    loader = what.add_parser("loader")
    loader.add_argument("--path", required=True)
    loader.add_argument("--workers", type=int, default=2)
    loader.add_argument(
        "--method", choices=("thread", "process"), default="thread", help="of the loader: our own is thread"
    )
    loader.add_argument("--seconds", type=float, default=5.0)
    loader.add_argument("--tokenizer", default="momoe_titan/assets/tokenizer")
    loader.add_argument("--out")
    training = what.add_parser("training")
    training.add_argument("--out")
    training.add_argument("--tokens", help="token shards of the same text, to read by turns too")
    training.add_argument("--processes", action="store_true", help="tokenize in processes by turns, too")
    training.add_argument("options", nargs="*", help="after --: of the job")
    args = parser.parse_args()
    if args.what == "texts":
        print(write_texts(args.path, args.megabytes), "documents")
        return
    if args.what == "loader":
        result = measure_loader(args.path, args.workers, args.seconds, args.tokenizer, args.method)
    else:
        result = measure_training(args.options, args.tokens, args.processes)
    if os.environ.get("RANK", "0") != "0":
        return
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1))
    print(json.dumps({name: each for name, each in result.items() if name != "windows"}, indent=1))


if __name__ == "__main__":
    main()
