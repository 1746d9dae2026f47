"""Train the same job several times with different settings, and compare loss, speed, memory and balance.

    python benchmarks/train.py --config train_configs/500m.toml --out runs.json \
        --run "save 0: --momoe.save_percent 0" --run "save 100: --momoe.save_percent 100" \
        --run "stock: --momoe.backend torchtitan" -- --training.steps 300 --debug.seed 42

What follows `--` goes to every run. Runs go one after another, each in a process of its own. The table is made from
their TensorBoard files:
    loss        of the first and the last logged step
    apart       largest relative difference of a logged loss from the first run's loss at the same step. Without
                --debug.deterministic, attention's backward is not deterministic, and choosing experts amplifies
                rounding: two runs with the same settings then differ too (--debug.deterministic_warn_only does not
                help).
    tokens/s    per device, median over the second half of the logged steps
    memory GiB  peak: active memory on a GPU, resident memory of a process on a CPU
    MaxVio      mean over layers, first -> last logged step (arXiv 2408.15664)
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from momoe_titan.dashboard import tags

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # run as a file
    sys.path.insert(0, str(ROOT))

from benchmarks.named_runs import add_named_runs, named_runs  # noqa: E402 - from the folder above

MEMORY = (tags.GPU_ACTIVE, tags.PROCESS_PEAK_RSS)


def read_scalars(folder: Path) -> dict[str, dict[int, float]]:
    """The scalars of the one run in a dump folder: tag -> step -> value.

    Raises:
        ValueError: no TensorBoard file there.
    """
    files = sorted(folder.rglob(tags.EVENT_FILES))
    if not files:
        raise ValueError(f"no TensorBoard file under {folder}: is metrics.enable_tensorboard on?")
    events = EventAccumulator(str(files[-1]), size_guidance={"scalars": 0}).Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def train(config: str, options: list[str], processes: int, folder: Path) -> dict[str, dict[int, float]]:
    """Run a job to its end in `folder`. Returns its scalars."""
    command = [sys.executable, "-m", "momoe_titan.train"]
    if processes > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [
        "--job.config_file",
        str(Path(config).resolve()),
        "--job.dump_folder",
        str(folder),
        "--metrics.enable_tensorboard",
        *options,
    ]
    with open(folder / "log.txt", "w") as log:
        code = subprocess.run(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        ).returncode
    if code:
        raise RuntimeError(f"{' '.join(command)} ended with {code}:\n{(folder / 'log.txt').read_text()[-3000:]}")
    return read_scalars(folder)


def summarise(runs: dict[str, dict[str, dict[int, float]]]) -> list[dict]:
    """One row of the table per run. Losses are compared with those of the first run."""
    reference = next(iter(runs.values()))[tags.LOSS]
    rows = []
    for name, scalars in runs.items():
        loss = scalars[tags.LOSS]
        steps = sorted(loss)
        speed = [v for _, v in sorted(scalars[tags.TOKENS_PER_SECOND].items())]
        memory = next((scalars[tag] for tag in MEMORY if tag in scalars), {})
        balance = scalars.get(tags.MAXVIO_MEAN, {})
        rows.append(
            {
                "run": name,
                "loss_first": loss[steps[0]],
                "loss_last": loss[steps[-1]],
                "last_step": steps[-1],
                "apart": max((abs(loss[s] / reference[s] - 1) for s in steps if s in reference), default=float("nan")),
                "tokens_per_s": statistics.median(speed[len(speed) // 2 :]),
                "memory_gib": max(memory.values(), default=None),
                "maxvio": [balance[min(balance)], balance[max(balance)]] if balance else None,
            }
        )
    return rows


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    lines = ["| run | loss | apart | tokens/s | memory GiB | MaxVio |", "| --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        memory = "" if row["memory_gib"] is None else f"{row['memory_gib']:.2f}"
        maxvio = "" if row["maxvio"] is None else "{:.2f} -> {:.2f}".format(*row["maxvio"])
        lines.append(
            f"| {row['run']} | {row['loss_first']:.4f} -> {row['loss_last']:.4f} (step {row['last_step']}) "
            f"| {row['apart']:.1e} | {row['tokens_per_s']:,.0f} | {memory} | {maxvio} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="TOML file of the job")
    add_named_runs(parser)
    parser.add_argument("--processes", type=int, default=1, help="of every run; one per GPU")
    parser.add_argument("--out", help="JSON file with the table and every scalar")
    parser.add_argument("options", nargs="*", help="after --: of every run")
    args = parser.parse_args()
    runs = {}
    for name, options in named_runs(parser, args.run).items():
        with tempfile.TemporaryDirectory() as folder:
            runs[name] = train(args.config, [*args.options, *options], args.processes, Path(folder))
        print(table(summarise(runs)), flush=True)
        if args.out:
            Path(args.out).write_text(json.dumps({"rows": summarise(runs), "scalars": runs}, indent=1))


if __name__ == "__main__":
    main()
