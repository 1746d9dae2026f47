"""Predicted memory beside measured: what `momoe_titan.plan` says of the points of a bench_memory.py run.

    python benchmarks/memory.py --config train_configs/500m.toml --modes none,selective:op,full \
        --stock_modes none --save_percent 0,50,100 --warmup 2 --steps 2 --out 500m.json
    python benchmarks/check_plan.py 500m.json [1.4b.json ...] [--out checked.json]

The first needs the GPU, the second none. Error is predicted / measured - 1. Allocated is the highest
of what tensors take, which TorchTitan logs as max_active; reserved is what the allocator took for it
(max_reserved), by a model of the allocator.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from momoe_titan.memory.plan import GIB, MemoryPlan  # noqa: E402 - needs the path above
from momoe_titan.train import describe_cpu  # noqa: E402 - needs the path above

STOCK = "torchtitan"


def predict(config_file: str, options: list[str], moe: str, ac: str) -> MemoryPlan:
    """The plan of one kind of points."""
    from torchtitan.config import ConfigManager
    from torchtitan.tools.logging import logger

    import momoe_titan.register  # noqa: F401
    from momoe_titan.plan.job import trace_job

    logger.setLevel(logging.WARNING)
    args = ["--job.config_file", config_file, *options, "--training.global_batch_size", "-1", "--validation.no-enable"]
    config = ConfigManager().parse_args([*args, "--job.custom_config_module=momoe_titan.job_config"])
    mode, _, option = ac.partition(":")
    config.activation_checkpoint.mode = mode
    config.activation_checkpoint.selective_ac_option = option or "2"
    config.momoe.backend = STOCK if moe == STOCK else "auto"
    return trace_job(config)


def check(run: dict) -> list[dict]:
    """A row for each measured point of a run."""
    plans, rows = {}, []
    for point in run["rows"]:
        if "error" in point:
            continue
        kind = point["moe"], point["ac"]
        if kind not in plans:
            plans[kind] = predict(run["config"], run["options"], *kind)
        percent = point["save_percent"] or 0
        row = {"config": Path(run["config"]).stem, **{k: point[k] for k in ("moe", "ac", "save_percent")}}
        for name, predicted in (("peak", plans[kind].active(percent)), ("reserved", plans[kind].reserved(percent))):
            measured = point[f"{name}_gib"]
            row[name] = {"predicted": predicted / GIB, "measured": measured, "error": predicted / GIB / measured - 1}
        rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    """The rows as Markdown, and the bias of all."""
    lines = ["| job | MoE | checkpointing | allocated GiB | predicted | error | reserved GiB | predicted | error |"]
    lines += ["| --- " * 9 + "|"]
    for row in rows:
        moe = row["moe"] if row["save_percent"] is None else f"save_percent {row['save_percent']:g}"
        cells = [row["config"], moe, row["ac"]]
        for name in ("peak", "reserved"):
            cells += [f"{row[name]['measured']:.2f}", f"{row[name]['predicted']:.2f}", f"{row[name]['error']:+.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    for name, what in (("peak", "allocated"), ("reserved", "reserved")):
        errors = [row[name]["error"] for row in rows]
        if errors:
            lines.append(
                f"\n{what}: error from {min(errors):+.1%} to {max(errors):+.1%}, mean {sum(errors) / len(errors):+.1%}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="JSON files of bench_memory.py")
    parser.add_argument("--out", help="JSON file")
    args = parser.parse_args()
    with describe_cpu():
        rows = [row for path in args.runs for row in check(json.loads(Path(path).read_text()))]
    print(table(rows))
    if args.out:
        Path(args.out).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
