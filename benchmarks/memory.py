"""Speed against memory: activation checkpointing x save_percent, compared with TorchTitan's own MoE.

    python benchmarks/memory.py --config train_configs/500m.toml --out memory.json --plot memory.png \
        -- --training.local_batch_size 32
    python benchmarks/memory.py --from memory.json --plot memory.png      # draw only

One process trains the job's model once per point with TorchTitan's trainer, each time from the same weights on the same
two batches: `--warmup` steps, then `--steps` steps that are timed. What follows `--` goes to the job. Without a GPU the
memory is that of the process, which says little. The columns:
    tokens/s   per device, over the timed steps
    peak GiB   peak of allocated memory in the timed steps; reserved is the memory that the allocator took for it
    MoE MiB    memory that the forward of all MoE layers leaves for the backward, without their input; not measured on
               a CPU or where the model is compiled
    loss       of the last step: equal where only memory and time differ
A point that does not fit is a row that says so. Below the table stands, for each point of the stock MoE, the fastest of
ours that needs no more memory. Plots need matplotlib: pip install "momoe_titan[plot]".
"""

import argparse
import gc
import itertools
import json
import os
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from momoe_titan import train as entry
from momoe_titan.config.command_line import missing_section_option

MODES = ("none", "full", "selective:op", "selective:2")
STOCK = "torchtitan"
GIB, MIB = 2**30, 2**20
# Options that leave nothing of a job but its steps.
QUIET = [
    "--metrics.log_freq=1000000",
    "--metrics.no-enable_tensorboard",
    "--validation.no-enable",
    "--checkpoint.no-enable",
    "--profiling.no-enable_profiling",
    "--training.global_batch_size=-1",
]


class Memory:
    """Peak memory of the GPU, as torch's allocator knows it, or of this process."""

    on_gpu = torch.cuda.is_available()

    @classmethod
    def restart(cls) -> None:
        if cls.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    @classmethod
    def peaks(cls) -> dict[str, float]:
        if cls.on_gpu:
            peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        else:
            fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            peak = reserved = int(fields["VmHWM"].split()[0]) * 1024
        return {"peak_gib": peak / GIB, "reserved_gib": reserved / GIB}


def points(modes: list[str], stock_modes: list[str], percents: list[float]) -> list[dict]:
    """What to measure. The stock MoE comes first, so that a run that is cut short can compare."""
    return [{"moe": STOCK, "ac": m, "save_percent": None} for m in stock_modes] + [
        {"moe": "momoe", "ac": m, "save_percent": p} for m in modes for p in percents
    ]


def make_trainer(config_file: str, options: list[str], folder: str):
    """A trainer of the job, whose model is not used."""
    # On a CPU only now: TorchTitan must not be imported before `describe_cpu`.
    from torchtitan import train as titan
    from torchtitan.config import ConfigManager

    from momoe_titan.components.loss import LossInModel
    from momoe_titan.components.trainer import check_config, prepare_cpu_job
    from momoe_titan.components.training_step import TrainingStep

    class Trainer(TrainingStep, LossInModel, titan.Trainer):
        def forward_backward_step(self, **batch):
            self.loss = super().forward_backward_step(**batch)
            return self.loss

    args = ["--job.config_file", config_file, "--job.dump_folder", folder, *QUIET, *options]
    args += missing_section_option(args)
    config = ConfigManager().parse_args(args)
    if not Memory.on_gpu:
        prepare_cpu_job(config, args)
    check_config(config)
    return Trainer(config)


def set_point(config, point: dict) -> None:
    mode, _, option = point["ac"].partition(":")
    config.activation_checkpoint.mode = mode
    config.activation_checkpoint.selective_ac_option = option or "2"
    stock = point["moe"] == STOCK
    config.momoe.backend = STOCK if stock else "auto"
    config.momoe.save_percent = [0.0 if stock else point["save_percent"]]


def build(trainer) -> None:
    """The model of `trainer.job_config` and its optimizer, as TorchTitan's Trainer.__init__ does."""
    from torchtitan.config import TORCH_DTYPE_MAP
    from torchtitan.tools import utils

    config, spec = trainer.job_config, trainer.train_spec
    model_args = spec.model_args[config.model.flavor]
    model_args.update_from_config(config)
    torch.manual_seed(config.debug.seed or 0)
    with torch.device("meta"), utils.set_default_dtype(TORCH_DTYPE_MAP[config.training.dtype]):
        model = spec.model_cls(model_args)
    model = spec.parallelize_fn(model, trainer.parallel_dims, config)
    model.to_empty(device=utils.device_type)
    model.init_weights()
    trainer.model_parts = [model.train()]
    trainer.optimizers = spec.build_optimizers_fn(trainer.model_parts, config.optimizer, trainer.parallel_dims)
    trainer.lr_schedulers = spec.build_lr_schedulers_fn(trainer.optimizers, config.lr_scheduler, config.training.steps)
    trainer.metrics_processor.optimizers = trainer.optimizers
    trainer.metrics_processor.model_parts = trainer.model_parts
    trainer.set_up_precision()


def discard_model(trainer) -> None:
    trainer.model_parts = trainer.optimizers = trainer.lr_schedulers = trainer.loss = None
    if trainer.weights is not None:
        trainer.weights, trainer.maybe_enable_amp = None, nullcontext()
    trainer.checkpointer.states.clear()  # else it would keep the first model
    trainer.metrics_processor.optimizers = trainer.metrics_processor.model_parts = None
    torch._dynamo.reset()
    torch._functorch.config.activation_memory_budget = 1.0
    gc.collect()
    if Memory.on_gpu:
        torch.cuda.empty_cache()


class MoeMemory:
    """While open, adds up the bytes that calls of MoE layers leave allocated besides their output."""

    def __init__(self, model, allocated=torch.cuda.memory_allocated):
        self.layers = [b.moe for b in model.layers.values() if b.moe_enabled]
        self.allocated = allocated
        self.held = 0

    def __enter__(self) -> "MoeMemory":
        from momoe_titan.moe.expert_stats import inside_backward

        def before(module, inputs):
            self.start = self.allocated()

        def after(module, inputs, output):
            if not inside_backward():  # else a recomputation
                self.held += self.allocated() - self.start - output.nbytes

        self.hooks = [m.register_forward_pre_hook(before) for m in self.layers]
        self.hooks += [m.register_forward_hook(after) for m in self.layers]
        return self

    def __exit__(self, *exc) -> None:
        for hook in self.hooks:
            hook.remove()


def measure(trainer, batches, warmup: int, steps: int) -> dict:
    """Measures the point that `trainer.job_config` is set to; one row of the table."""

    def run(number: int) -> None:
        for _ in range(number):
            trainer.train_step(({**inputs}, labels) for inputs, labels in [next(feed)])
        if Memory.on_gpu:
            torch.cuda.synchronize()

    feed = itertools.cycle(batches)
    trainer.step = 2  # the first is logged
    build(trainer)
    run(warmup)
    row = {}
    if Memory.on_gpu and not trainer.job_config.compile.enable:
        with MoeMemory(trainer.model_parts[0]) as moe:
            run(1)
        row["moe_mib"] = moe.held / MIB
    Memory.restart()
    start = time.perf_counter()
    run(steps)
    seconds = time.perf_counter() - start
    row["tokens_per_s"] = steps * batches[0][1].numel() / seconds
    return {**row, **Memory.peaks(), "loss": trainer.loss.item()}


def measure_all(args) -> dict:
    began = time.perf_counter()
    entry.set_single_process_defaults()
    with (
        nullcontext() if Memory.on_gpu else entry.describe_cpu(),
        tempfile.TemporaryDirectory() as folder,
    ):
        trainer = make_trainer(str(Path(args.config).resolve()), args.options, folder)
        result = {
            "config": args.config,
            "options": args.options,
            "device": torch.cuda.get_device_name() if Memory.on_gpu else "cpu",
            "torch": torch.__version__,
            "rows": [],
        }
        # Copies: the first batches of the dataset, whatever the point.
        batches = list(itertools.islice(iter(trainer.dataloader), 2))
        for point in points(args.modes, args.stock_modes, args.save_percent):
            row = {**point}
            discard_model(trainer)
            set_point(trainer.job_config, point)
            if time.perf_counter() - began > args.max_seconds:
                row["error"] = "no time left"
            else:
                try:
                    row |= measure(trainer, batches, args.warmup, args.steps)
                except torch.OutOfMemoryError:
                    row["error"] = "out of memory"
            row["seconds_since_start"] = time.perf_counter() - began
            result["rows"].append(row)
            print(table([row]).splitlines()[-1], flush=True)
            if args.out:
                Path(args.out).write_text(json.dumps(result, indent=1))
        discard_model(trainer)
        trainer.close()
        torch.distributed.destroy_process_group()
    return result


def name_of(row: dict) -> str:
    return STOCK if row["moe"] == STOCK else f"save_percent {row['save_percent']:g}"


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    lines = ["| MoE | checkpointing | tokens/s | peak GiB | reserved GiB | MoE MiB | loss |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        cells = [name_of(row), row["ac"]]
        if "error" in row:
            cells += [row["error"], "", "", "", ""]
        else:
            moe = f"{row['moe_mib']:,.0f}" if "moe_mib" in row else ""
            cells += [f"{row['tokens_per_s']:,.0f}", f"{row['peak_gib']:.2f}"]
            cells += [f"{row['reserved_gib']:.2f}", moe, f"{row['loss']:.5f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def against_stock(rows: list[dict]) -> str:
    """For each measured point of the stock MoE, the fastest of ours that needs no more peak memory."""
    rows = [row for row in rows if "error" not in row]
    lines = []
    for stock in (row for row in rows if row["moe"] == STOCK):
        ours = [r for r in rows if r["moe"] != STOCK and r["peak_gib"] <= stock["peak_gib"]]
        best = max(ours, key=lambda r: r["tokens_per_s"], default=None)
        line = f"within {stock['peak_gib']:.2f} GiB ({STOCK}, {stock['ac']}): "
        if best is None:
            line += "none of ours"
        else:
            line += f"{best['tokens_per_s'] / stock['tokens_per_s']:.2f}x the tokens/s"
            line += f" ({name_of(best)}, {best['ac']}, {best['peak_gib']:.2f} GiB)"
        lines.append(line)
    return "\n".join(lines)


def front(rows: list[dict]) -> list[dict]:
    """The rows that no other row beats in both memory and speed, by rising memory."""
    best, kept = float("-inf"), []
    for row in sorted(rows, key=lambda r: (r["peak_gib"], -r["tokens_per_s"])):
        if row["tokens_per_s"] > best:
            best = row["tokens_per_s"]
            kept.append(row)
    return kept


def plot(result: dict, path: str) -> None:
    """Draw tokens/s over peak memory, with the front of both MoEs. The ending of the file names the format.

    Raises:
        SystemExit: no matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        sys.exit('plots need matplotlib: pip install "momoe_titan[plot]"')
    rows = [row for row in result["rows"] if "error" not in row]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    markers = dict(zip(dict.fromkeys(row["ac"] for row in rows), "osD^vP*X", strict=False))
    for moe, colour in (("momoe", "tab:blue"), (STOCK, "tab:red")):
        of_moe = [row for row in rows if row["moe"] == moe]
        for mode, marker in markers.items():
            of_mode = [row for row in of_moe if row["ac"] == mode]
            axes.scatter(
                [row["peak_gib"] for row in of_mode],
                [row["tokens_per_s"] for row in of_mode],
                marker=marker,
                color=colour,
                label=f"{moe}, {mode}" if of_mode else None,
            )
        edge = front(of_moe)
        axes.plot([row["peak_gib"] for row in edge], [row["tokens_per_s"] for row in edge], color=colour, lw=1)
        for row in of_moe:
            if row["save_percent"] is not None:
                axes.annotate(
                    f"{row['save_percent']:g}",
                    (row["peak_gib"], row["tokens_per_s"]),
                    textcoords="offset points",
                    xytext=(4, 4),
                    fontsize=7,
                )
    axes.set_xlabel("peak memory, GiB")
    axes.set_ylabel("tokens per second")
    axes.set_ylim(bottom=0)
    axes.set_title(f"{os.path.basename(result['config'])} on {result['device']}")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def numbers(text: str) -> list[float]:
    return [float(p) for p in text.split(",") if p]


def names(text: str) -> list[str]:
    return [m for m in text.split(",") if m]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", help="TOML file of the job")
    source.add_argument("--from", dest="source", help="JSON file of an earlier run: measure nothing")
    every = ",".join(MODES)
    parser.add_argument("--modes", type=names, default=every, help=f"default {every}")
    parser.add_argument("--stock_modes", type=names, default=every, help="of TorchTitan's MoE")
    parser.add_argument("--save_percent", type=numbers, default="0,25,50,75,100")
    parser.add_argument("--warmup", type=int, default=3, help="steps")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--max_seconds", type=float, default=float("inf"), help="then no new point")
    parser.add_argument("--out", help="JSON file, written after each point")
    parser.add_argument("--plot", help="image file")
    parser.add_argument("options", nargs="*", help="after --: of the job")
    args = parser.parse_args()
    result = json.loads(Path(args.source).read_text()) if args.source else measure_all(args)
    print(table(result["rows"]), against_stock(result["rows"]), sep="\n\n")
    if args.plot:
        plot(result, args.plot)


if __name__ == "__main__":
    main()
