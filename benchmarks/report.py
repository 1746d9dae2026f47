"""Tables and charts of the pages, from the measurements in benchmarks/results.

    python benchmarks/report.py            # write them
    python benchmarks/report.py --check    # exit status 1 if a table or a chart is not up to date

A page marks the place of a table by two comments, `<!-- table: NAME -->` and `<!-- /table -->`; what
stands between them is written by the function NAME of `TABLES`. Charts are PNG files in docs/, which
need matplotlib (pip install "momoe_titan[plot]"); each carries a hash of what it shows, so that --check
needs no drawing.
"""

import argparse
import hashlib
import inspect
import json
import re
import statistics
import struct
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
DOCS = ROOT / "docs"
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)

Row = dict[str, object]
NAMES = {"momoe_titan": "momoe_titan", "sonicmoe": "SonicMoE", "torchtitan": "TorchTitan"}
COLORS = {"momoe_titan 100": "#1b6ca8", "momoe_titan 0": "#7fb3d8", "SonicMoE": "#e08a3c", "TorchTitan": "#8c8c8c"}
OURS = ("momoe_titan 100", "momoe_titan 0")


def rows_of(name: str) -> list[Row]:
    """The rows of one measurement."""
    return json.loads((RESULTS / f"{name}.json").read_text())["rows"]


def about(name: str) -> dict:
    """Hardware, versions, date and command of one measurement."""
    return json.loads((RESULTS / f"{name}.json").read_text())["about"]


def label(row: Row) -> str:
    """How a chart or a column names an implementation."""
    name = NAMES[str(row["implementation"])]
    return f"{name} {row['save_percent']}" if "save_percent" in row else name


def text(value: object) -> str:
    """A cell: thousands with commas, floats as they were recorded."""
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else str(value)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of markdown: the first column to the left, the others to the right."""
    lines = [list(header), ["---", *["---:"] * (len(header) - 1)], *([text(cell) for cell in row] for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def with_source(of_rows: str, name: str) -> str:
    """A table of one measurement, and the line under it: which hardware, when, and where its rows and command are."""
    first = about(name)
    return f"{of_rows}\n{first['hardware']}, {first['date']}; `{name}.json`.\n"


def pivot(rows: list[Row], index: str, columns: Sequence[str], value: str, name: Callable[[Row], str] = label) -> str:
    """A table with a row for each `index`, a column for each name, and one number a cell."""
    cells: dict[object, dict[str, object]] = {}
    for row in rows:
        cells.setdefault(row[index], {})[name(row)] = row.get(value, row.get("error"))
    return table([index, *columns], ([key, *(of_key.get(c) for c in columns)] for key, of_key in cells.items()))


# --- tables ---------------------------------------------------------------------------------------

README_SHAPES = ("1.4B-n256", "7B-n256", "30B-n1024", "120B-n1024", "seed-64e", "seed-128e-long")


def readme_layer() -> str:
    """Forward and backward of six shapes, and their peaks."""
    cells = {(row["shape"], label(row)): row for row in rows_of("layer_h100")}
    columns = (*OURS, "SonicMoE")
    header = ["shape", *(f"TFLOPS, {c}" for c in columns), *(f"peak MiB, {c}" for c in columns)]
    body = ([s, *(cells[s, c][v] for v in ("both", "peak") for c in columns)] for s in README_SHAPES)
    return table(header, body)


def layer_shapes() -> str:
    """What the names of the shapes stand for."""
    shapes = {row["shape"]: row for row in rows_of("layer_h100")}
    return table(["shape", *"TDFEK"], ([name, *(row[k] for k in "TDFEK")] for name, row in shapes.items()))


def _layer(value: str) -> str:
    return pivot(rows_of("layer_h100"), "shape", (*OURS, "SonicMoE", "TorchTitan"), value)


def layer_both() -> str:
    """Forward and backward, all shapes."""
    return with_source(_layer("both"), "layer_h100")


def layer_forward() -> str:
    return _layer("forward")


def layer_backward() -> str:
    return _layer("backward")


def layer_inference() -> str:
    return _layer("inference")


def layer_saved() -> str:
    return _layer("saved")


def layer_peak() -> str:
    return _layer("peak")


def layer_other_host() -> str:
    return pivot(rows_of("layer_other_host_h100"), "shape", ("momoe_titan 100", "SonicMoE"), "both")


def layer_save_percent() -> str:
    """TFLOPS at five values of save_percent."""
    percents = ("0", "25", "50", "75", "100")
    return pivot(rows_of("layer_save_percent_h100"), "shape", percents, "both", lambda r: str(r["save_percent"]))


def layer_before() -> str:
    """One layer by the first measured code and by today's."""
    header = {"before": "before, TFLOPS", "now": "now, TFLOPS", "percent": "faster by, %"}
    return _plain("layer_before_h200", shape="shape", save_percent="save_percent", **header)


def layer_h200() -> str:
    """Shapes nobody tuned for: speed, then peak."""
    rows = rows_of("layer_h200")
    keys = ("forward", "backward", "both", "inference", "peak")
    header = ["shape", "implementation", *(f"{k}, TFLOPS" for k in keys[:-1]), "peak, MiB"]
    return table(header, ([r["shape"], label(r), *(r.get(k) for k in keys)] for r in rows))


def layer_original_momoe() -> str:
    header = ["shape", "save_percent", "forward and backward, TFLOPS", "peak, MiB"]
    rows = rows_of("layer_original_momoe_h100")
    return table(header, ([r["shape"], r["save_percent"], r["both"], r["peak"]] for r in rows))


def layer_errors() -> str:
    keys = ("y", "dx", "scores", "w1", "w2")
    rows = rows_of("layer_errors_h100")
    return table(["implementation", *keys], ([label(r), *(f"{r[k]:.4f}" for k in keys)] for r in rows))


def layer_skew() -> str:
    rows = rows_of("layer_skew_h100")
    return table(
        ["shape", "balanced, ms", "skewed, ms"], ([r["shape"], r["balanced_ms"], r["skewed_ms"]] for r in rows)
    )


def layer_layouts() -> str:
    """Times of weights as others keep them, beside those of our own layout."""
    rows = rows_of("layer_layouts_h200")
    own = {row["shape"]: row for row in rows if row["layout"] == "own"}
    names = {"own": "own", "before": "own, kernels of 0.1.0", "out_in": "(E, out, in)", "two": "two tensors"}
    names |= {"two_out_in": "two tensors, (E, out, in)", "interleaved": "interleaved"}
    names |= {"interleaved_out_in": "interleaved, (E, out, in)"}
    rows = sorted(rows, key=lambda r: (list(own).index(r["shape"]), list(names).index(r["layout"])))
    keys = ("forward", "backward", "both")
    header = ["shape", "weights", *(f"{k}, ms" for k in keys), *(f"{k}, more than own, %" for k in keys)]
    lines = []
    for row in rows:
        ms = [row[f"{k}_ms"] for k in keys]
        more = [f"{100 * (row[f'{k}_ms'] / own[row['shape']][f'{k}_ms'] - 1):.1f}" for k in keys]
        lines.append([row["shape"], names[row["layout"]], *ms, *more])
    return table(header, lines)


def transformers_step() -> str:
    """Models of transformers with their own experts and with ours."""
    header = {
        "shape": "layers of", "tokens": "tokens", "variant": "experts", "step_ms": "step, ms", "moe_ms": "experts, ms",
        "moe_speedup": "experts, times faster", "step_speedup": "step, times faster", "bound": "step, at most",
        "peak_gib": "peak, GiB",
    }  # fmt: skip
    return _plain("transformers_h200", **header)


def layer_parts() -> str:
    """What OLMoE's experts spend their time on, beside dense products."""
    return _plain("layer_parts_h200", part="part", launches="launches", ms="ms", tflops="TFLOPS")


def layer_sustained() -> str:
    """OLMoE's experts and dense products, after a rest and without one."""
    header = {"what": "what", "burst_ms": "after a rest, ms", "burst_tflops": "TFLOPS", "long_ms": "without rest, ms"}
    return _plain("layer_sustained_h200", **header, long_tflops="TFLOPS ", mhz="MHz", watt="W")


def host_time() -> str:
    """How long the host takes for a layer that is not compiled."""
    header = {"shape": "shape", "tokens": "tokens", "weights": "weights", "code": "code"}
    header |= {"forward_ms": "forward, ms", "both_ms": "forward and backward, ms", "queued_ms": "one of 20 in turn, ms"}
    layouts = {"own": "own", "out_in": "(E, out, in)"}
    rows = [{**row, "tokens": row["T"], "weights": layouts[row["layout"]]} for row in rows_of("host_time_h200")]
    return table(
        list(header.values()), [[f"{row[k]:.2f}" if k.endswith("ms") else row[k] for k in header] for row in rows]
    )


def torchtitan_step() -> str:
    """Models of TorchTitan with their own MoE layers and with ours."""
    header = {
        "shape": "layers of", "layers": "MoE layers", "tokens": "tokens", "variant": "MoE layers are",
        "tokens_per_second": "tokens/s", "step_ms": "step, ms", "moe_ms": "MoE layer, ms",
        "moe_tflops": "MoE layer, TFLOPS", "moe_speedup": "MoE layer, times faster",
        "step_speedup": "step, times faster", "bound": "step, at most", "peak_gib": "peak, GiB",
    }  # fmt: skip
    return _plain("torchtitan_h200", **header)


def layer_kinds() -> str:
    """Errors of other experts; the largest share of torch's own error over all of a kind's tensors."""
    keys = ("out", "x", "scores", "w1", "w2", "bias1", "bias2")
    lines = []
    for row in rows_of("layer_kinds_h200"):
        shares = [row[name] / row[f"{name}_torch"] for name in row if f"{name}_torch" in row]
        errors = [row.get(key, row.get("up") if key == "w1" else None) for key in keys]
        lines.append(
            [row["kind"], row["dtype"], row["path"], *(e and f"{1e3 * e:.2f}" for e in errors), f"{max(shares):.2f}"]
        )
    return table(["experts", "dtype", "kernels", *keys, "of torch's, at most"], lines)


def layer_router_share() -> str:
    return table(["shape", "share, %"], ([r["shape"], r["share"]] for r in rows_of("layer_router_share_h100")))


def router() -> str:
    keys = ("torch_float32", "ours_float32", "torch_bfloat16", "ours_bfloat16")
    header = ["shape", *(f"{k.replace('_', ', ').replace('ours', 'kernels')}, ms" for k in keys)]
    return table(header, ([r["shape"], *(r[k] for k in keys)] for r in rows_of("router_h100")))


def decode() -> str:
    """Share of a copy's speed, by the number of tokens."""
    tokens = ("1", "4", "16", "64")
    rows = [row for row in rows_of("decode_h100") if row["implementation"] == "momoe_titan"]
    name = lambda row: str(row["T"])  # noqa: E731
    return with_source(pivot(rows, "shape", tokens, "share", name), "decode_h100")


def decode_time() -> str:
    rows = [row for row in rows_of("decode_h100") if row["implementation"] == "momoe_titan"]
    return pivot(rows, "shape", ("1", "4", "16", "64"), "us", lambda row: str(row["T"]))


MODES = ("none", "full", "selective, op", "every second block")


def _modes(name: str, value: str) -> str:
    rows = rows_of(name)
    for row in rows:
        row["save_percent"] = row.get("save_percent", "TorchTitan's MoE")
    return pivot(rows, "save_percent", MODES, value, lambda row: str(row["mode"]))


def memory_500m_speed() -> str:
    return with_source(_modes("memory_500m_h100", "tokens_per_s"), "memory_500m_h100")


def memory_500m_peak() -> str:
    return _modes("memory_500m_h100", "peak")


def memory_500m_planned() -> str:
    return _modes("memory_500m_h100", "planned")


def memory_500m_moe() -> str:
    return _modes("memory_500m_h100", "moe")


def memory_1_4b_speed() -> str:
    return with_source(_modes("memory_1.4b_h100", "tokens_per_s"), "memory_1.4b_h100")


def memory_1_4b_peak() -> str:
    return _modes("memory_1.4b_h100", "peak")


def memory_1_4b_planned() -> str:
    return _modes("memory_1.4b_h100", "planned")


def memory_1_4b_moe() -> str:
    return _modes("memory_1.4b_h100", "moe")


def _plain(name: str, **header: str) -> str:
    """All rows of a measurement as they are; `header` names the columns and their units."""
    body = ([label(r) if k == "implementation" else r.get(k) for k in header] for r in rows_of(name))
    return with_source(table(list(header.values()), body), name)


def compile_500m() -> str:
    header = {"mode": "activation checkpointing", "implementation": "MoE", "tokens_per_s": "tokens/s"}
    return _plain("compile_500m_h100", **header, peak="peak, GiB")


def memory_batch() -> str:
    header = {"config": "model", "sequences": "sequences a step", "tokens_per_s": "tokens/s", "peak": "peak, GiB"}
    return _plain("memory_batch_h100", **header)


def train_500m() -> str:
    losses = {f"loss_{step}": f"loss, step {step}" for step in (1, 100, 200, 300)}
    return _plain(
        "train_500m_h100", run="run", **losses, tokens_per_s="tokens/s", peak="peak, GiB", planned="plan, GiB"
    )


def models_h200() -> str:
    header = {"model": "model, sequences per GPU", "gpus": "GPUs", "implementation": "MoE"}
    header |= {"before": "old step, tokens/s per GPU", "now": "new step, tokens/s per GPU"}
    return _plain("models_h200", **header, mfu="new step, MFU, %", reserved="new step, GiB reserved")


def step_breakdown() -> str:
    return _plain("step_breakdown_h200", part="part of the step", before="old step, ms", after="new step, ms")


def cuda_graph() -> str:
    losses = {f"loss_{step}": f"loss, step {step}" for step in (20, 40, 60)}
    return _plain("cuda_graph_500m_h200", run="run", ms="step, ms", busy="busy, %", peak="peak, GiB", **losses)


def first_step() -> str:
    return _plain("first_step_h200", phase="phase", before="old step, s", now="new step, s")


def rms_norm() -> str:
    header = {"rows": "rows", "width": "width", "dtype": "dtype", "limit": "limit, us"}
    return _plain("rms_norm_h200", **header, compiled="torch.compile, us", own="own kernel, us")


def optimizer() -> str:
    return _plain("optimizer_h200", model="model", optimizer="optimizer", ms="ms", gb_per_s="GB/s")


def loss() -> str:
    header = {"tokens": "tokens", "classes": "vocabulary", "dim": "width", "loss": "loss", "ms": "ms"}
    return _plain("loss_h200", **header, mib="MiB beyond the gradients")


def step_variants() -> str:
    """What activation checkpointing and save_percent cost and save."""
    header = {"checkpointing": "activation checkpointing", "save_percent": "save_percent", "step_ms": "step, ms"}
    return _plain("step_variants_h200", model="model", **header, tokens_per_s="tokens/s", reserved="reserved, GiB")


def gpu_busy() -> str:
    return _plain("gpu_busy_h200", model="model, sequences x tokens", step_ms="step, ms", busy="GPU busy, %")


def loss_30b() -> str:
    return _plain("loss_30b_h200", loss="the loss holds", tokens_per_s="tokens/s", peak="peak, GiB")


def batch_30b() -> str:
    header = {"loss": "the loss holds", "sequences": "sequences", "fits": "fits", "reserved": "reserved, GiB"}
    return _plain("batch_30b_h200", **header, planned="planned, GiB", step_ms="step, ms", tokens_per_s="tokens/s")


def loss_runs() -> str:
    losses = {f"loss_{step}": f"loss, step {step}" for step in (1, 50, 100, 200, 250, 300)}
    return _plain("loss_runs_h200", run="the loss holds", **losses)


def reliability() -> str:
    header = {"check": "check", "where": "on", "amount": "how much", "result": "found", "seconds": "seconds"}
    return _plain("reliability", **header)


def mutation() -> str:
    """How many of the faults put into each part of the package the tests have seen."""
    header = {"part": "part", "faults": "faults", "once": "seen at first", "since": "seen since"}
    scores = {"first_score": "score at first, %", "score": "score now, %"}
    new = {"new_faults": "new sample, faults", "new_harmless": "new, harmless", "new_score": "new, seen at first, %"}
    return _plain("mutation", **header, harmless="harmless", unseen="not seen", **scores, **new)


LONG_ARMS = {
    "stock": "TorchTitan's layer",
    "ours-0": "ours, nothing kept",
    "ours-100": "ours, all kept",
    "ours-float32": "ours, float32",
}


def long_runs() -> str:
    """How far from TorchTitan's layer long jobs are, by the means of their seeds."""
    header = [
        "job",
        "layer",
        "seeds",
        "validation loss, step 400",
        "apart, %",
        "steps",
        "their training loss",
        "apart,  %",
    ]
    header += ["validation loss, step 800", "apart,   %"]
    body = []
    for job in dict.fromkeys(str(row["job"]) for row in rows_of("long_runs")):
        arms = {arm: rows for arm in LONG_ARMS if (rows := _long_of(job, arm))}
        trained = min(len(row["training"]) for rows in arms.values() for row in rows)
        begin = trained - trained // 4  # the last quarter of the steps that all jobs have
        values: list[Callable[[Row], float | None]] = [
            lambda row: row["half"],
            lambda row, steps=slice(begin, trained): statistics.fmean(row["training"][steps]),
            lambda row: row["last"],
        ]
        for arm, rows in arms.items():
            cells = []
            for value in values:
                ours, stock = ([value(row) for row in some] for some in (rows, arms["stock"]))
                known = None not in ours and None not in stock
                mean = statistics.fmean(ours) if None not in ours else None
                cells += [
                    "" if mean is None else f"{mean:.4f}",
                    f"{100 * (mean / statistics.fmean(stock) - 1):+.2f}" if known else "",
                ]
            cells.insert(2, f"{begin * 10 + 10} to {trained * 10}")
            body.append([job, LONG_ARMS[arm], len(rows), *cells])
    return with_source(table(header, body), "long_runs")


def _long_of(job: str, arm: str) -> list[Row]:
    return [row for row in rows_of("long_runs") if row["arm"] == arm and row["job"] == job]


def precision_losses() -> str:
    losses = {f"loss_{step}": f"loss, step {step}" for step in (1, 50, 100, 180, 250, 300)}
    return _plain("precision_losses_h200", model="model, sequences x tokens", run="mixed_precision", **losses)


def parallel_two() -> str:
    header = {"model": "model, sequences", "run": "run", "implementation": "MoE", "ms": "step, ms"}
    return _plain(
        "parallel_2xh200", **header, tokens_per_s="tokens/s per GPU", of_one="of one GPU, %", peak="peak, GiB"
    )


def goals_parallel() -> str:
    """What two GPUs were to reach."""
    return _plain("goals_parallel", **GOALS)


def exchange() -> str:
    header = {"model": "model, sequences", "ms": "step, ms", "copies": "copies, ms"}
    return _plain(
        "exchange_2xh200", **header, barriers="barriers, ms", exposed="exposed, ms", share="of the profiled step, %"
    )


def fsdp() -> str:
    header = {"model": "model", "run": "run", "ms": "step, ms", "tokens_per_s": "tokens/s per GPU"}
    header |= {"of_one": "of one GPU, %"}
    return _plain("fsdp_2xh200", **header, collectives="collectives, ms", exposed="exposed, ms", copies="copies, ms")


def link() -> str:
    header = {"collective": "collective", "of": "of", "dtype": "dtype", "MB": "MB", "us": "us"}
    return _plain("link_2xh200", **header, **{"GB/s": "GB/s"})


def token_transfers() -> str:
    header = {"transfer": "transfer", "us": "us", "GB/s": "GB/s", "beside": "added to a layer's forward beside it, us"}
    return _plain("token_transfers_2xh200", **header)


def parallel_four() -> str:
    losses = {f"loss_{step}": f"loss, step {step}" for step in (1, 5, 10)}
    header = {"grad_norm_10": "gradient norm, step 10", "reserved": "reserved, GiB", "planned": "plan, GiB"}
    return _plain("parallel_4xh100", run="run", **losses, **header)


def step_time() -> str:
    header = ["GPU", "run", "MoE", "tokens/s", "predicted", "error, %"]
    rows = []
    for row in rows_of("step_time"):
        measured, predicted = float(str(row["tokens_per_s"])), float(str(row["predicted"]))
        error = round(100 * (predicted / measured - 1), 1)
        rows.append([row["gpu"], row["run"], label(row), row["tokens_per_s"], row["predicted"], error])
    return with_source(table(header, rows), "step_time")


def layers_30b() -> str:
    header = {"sequences": "sequences", "save_percent": "save_percent", "per_layer": "a layer, ms"}
    header |= {"rest": "embedding and loss, ms", "sum": "48 layers, ms", "tokens_per_s": "tokens/s"}
    header |= {"mfu": "MFU, %", "mfu_layer": "MFU of a layer, %"}
    return _plain("layers_30b_h200", mode="activation checkpointing", **header)


def rates_step_time() -> str:
    return _plain("rates_step_time", rate="rate", unit="unit", h100="H100", h200="H200", source="where from")


def eviction() -> str:
    header = {"mode": "activation checkpointing", "run": "run", "budget": "budget, MiB", "allocated": "allocated, MiB"}
    return _plain("eviction_2xh200", **header, reserved="reserved, MiB", evicted="evicted, MiB")


# what an arm of benchmarks/balance.py is called in a page
BALANCE_ARMS = {
    "quantile": "quantile (default)",
    "quantile_0.5": "quantile, average 0.5 throughout",
    "quantile_1": "quantile, average 1 throughout",
    "quantile_0.1": "quantile, average 0.1 throughout",
    "proportional_0.03": "proportional, rate 0.03",
    "sign_0.01": "sign, rate 0.01",
    "sign_0.001": "sign, rate 0.001",
    "sign_0.001_sequence_1e-4": "sign, rate 0.001, with an auxiliary loss of 1e-4 per sequence",
    "aux_0.01": "auxiliary loss of 0.01 over the step",
    "none": "none",
}
OTHER_BALANCE_ARMS = {
    "quantile_1": "quantile, average 1 throughout",
    "quantile_not_following": "the same, bias not corrected for the gate's step",
    "none": "no balancing",
    "none_centred": "the same, gate sees tokens without their mean",
    "none_init_0.1": "the same, gate drawn a tenth as large",
    "none_warmup_400": "the same, the learning rate warms up over all steps",
}


def _digits(column: str, value: object) -> object:
    """A loss or an entropy with three digits behind the point, a MaxVio with two; of values by step, the last."""
    if isinstance(value, dict):
        value = list(value.values())[-1]
    if isinstance(value, float):
        return f"{value:.3f}" if "loss" in column or column == "entropy" else f"{value:.2f}"
    return value


def _balance(name: str, arms: dict[str, str], **columns: str) -> str:
    """The arms of one measurement in the order of `arms`."""
    rows = [row for arm in arms for row in rows_of(name) if row["arm"] == arm]
    body = ([arms[str(row["arm"])], *(_digits(column, row[column]) for column in columns)] for row in rows)
    return with_source(table(["rule", *columns.values()], body), name)


VIOLATIONS = {"maxvio_40": "MaxVio, step 40", "maxvio_late": "MaxVio, steps after 100"}
OF_VALIDATION = {"val_loss": "validation loss", "maxvio_global": "MaxVio, validation text"}
AT_THE_END = {"entropy": "router's entropy", "tokens_per_s": "tokens/s"}


def balance_long() -> str:
    """The rules at full length, one row for each seed."""
    return _balance("balance_500m_1200", BALANCE_ARMS, seed="seed", **OF_VALIDATION, **VIOLATIONS, **AT_THE_END)


def balance_all() -> str:
    """All rules, short and with one seed."""
    return _balance("balance_500m_400", BALANCE_ARMS, **OF_VALIDATION, **VIOLATIONS, entropy="router's entropy")


def balance_1_4b() -> str:
    """The flavor of 128 experts, short and with one seed."""
    return _balance("balance_1.4b_400", BALANCE_ARMS, **OF_VALIDATION, **VIOLATIONS, **AT_THE_END)


def balance_1_4b_long() -> str:
    """The flavor of 128 experts with the default rule, longer, beside the floor."""
    header = ["scores", "learning rate", "steps", "validation loss", *VIOLATIONS.values(), "floor of a batch"]
    header += ["MaxVio, validation text", "its floor", "its floor, files apart"]
    body = (
        [
            row["scores"],
            str(row["lr"]),
            row["steps"],
            *(_digits(column, row[column]) for column in ("val_loss", *VIOLATIONS)),
            _digits("", row.get("floor", {}).get("other_half_batch")),
            _digits("", row["maxvio_global"]),
            _digits("", row.get("floor", {}).get("other_half")),
            _digits("", row.get("floor", {}).get("other_files")),
        ]
        for row in rows_of("balance_1.4b_long")
    )
    return with_source(table(header, body), "balance_1.4b_long")


def step_batches() -> str:
    """What a sequence takes by the number of them in a microbatch, checkpointing and save_percent, some layers."""
    header = {"sequences": "sequences", "checkpointing": "activation checkpointing", "save_percent": "save_percent"}
    header |= {"backward_ms": "forward and backward, ms", "sequence_ms": "of these a sequence, ms"}
    return _plain("step_batches_h200", model="model", **header, reserved="reserved, GiB")


def file_plans() -> str:
    """Memory and speed of whole jobs by the planner."""
    header = {"gpus": "GPUs", "sequences": "sequences", "checkpointing": "activation checkpointing"}
    header |= {"save_percent": "save_percent", "total": "planned, GiB", "tokens_per_s": "tokens/s per GPU, predicted"}
    return _plain("file_plans", file="file", **header, chosen="in the file")


def goals_step() -> str:
    """What the training step was to reach."""
    return _plain("goals_step", **GOALS)


def goals_balance() -> str:
    """What load balancing was to reach."""
    return _plain("goals_balance", **GOALS)


GOALS = {"what": "what", "goal": "goal", "measured": "measured", "reached": "reached"}


def balance_replay() -> str:
    """Where the rest of MaxVio comes from: the biases of the long runs, solved on other text and recomputed."""
    header = {"sigmoid": "sigmoid", "sigmoid_worst": "sigmoid, worst layer"}
    return _plain(
        "balance_replay_1.4b", bias="the bias", **header, softmax="softmax", softmax_worst="softmax, worst layer"
    )


def balance_lr() -> str:
    """What the learning rate does to loss and balance."""
    rows = rows_of("balance_lr_h200")
    columns = {"maxvio_40": "MaxVio, step 40", "maxvio_late": "MaxVio, steps after 100"}
    columns |= {"maxvio_global": "MaxVio, validation text"}
    header = ["flavor", "steps", "learning rate", "seed", "loss, step 200", "validation loss", *columns.values()]
    body = (
        [
            *(row[c] for c in ("flavor", "steps", "lr", "seed")),
            *(_digits("loss", row[c]) for c in ("loss_200", "val_loss")),
            *(_digits(c, row[c]) for c in columns),
        ]
        for row in rows
    )
    return with_source(table(header, body), "balance_lr_h200")


def balance_time() -> str:
    """Seconds of training until a loss is reached, beside TorchTitan's MoE."""
    header = {"val_loss": "validation loss", "new_s": "rate 1e-3, s", "stock_new_s": "TorchTitan, rate 1e-3, s"}
    header |= {"new_share": "share", "ours_s": "rate 5e-4, s", "stock_s": "TorchTitan, rate 5e-4, s", "share": "share "}
    return _plain("balance_time_h200", **header)


def balance_steep() -> str:
    """What happens step by step in a warm-up that is too steep."""
    header = {"step": "step", "maxvio": "MaxVio", "maxvio_after": "the same tokens, after the step"}
    header |= {"maxvio_known": "if the mean's move were known", "common": "part that all tokens share"}
    return _plain("balance_steep_cpu", **header, move="move of the mean over the spread")


def balance_causes() -> str:
    """Where the collapse comes from."""
    return _balance("balance_500m_400", OTHER_BALANCE_ARMS, **OF_VALIDATION, **VIOLATIONS)


def balance_average() -> str:
    """How long the rule "quantile" should average."""
    header = {"maxvio_40": "MaxVio, step 40", "maxvio_late": "MaxVio, steps after 100"}
    return _plain("balance_average_500m", average="average", **header, maxvio_end="MaxVio, last batches together")


def balance_floor() -> str:
    """MaxVio over the validation text beside what a bias solved on the other half of it leaves."""
    rows = [row for row in rows_of("balance_500m_1200") if "floor" in row]
    header = ["rule", "seed", "MaxVio, validation text", "its floor", "MaxVio, batches of it", "floor of a batch"]
    values = ("maxvio_global", "other_half"), ("maxvio_validation_batch", "other_half_batch")
    body = (
        [BALANCE_ARMS[str(row["arm"])], row["seed"]]
        + [f"{v:.2f}" for name, floor in values for v in (row[name], row["floor"][floor])]
        for row in rows
    )
    return with_source(table(header, body), "balance_500m_1200")


def balance_cost() -> str:
    header = {"model": "model", "tokens": "scores"}
    header |= {"margins_us": "margins, µs a layer", "routing_us": "routing, µs a layer"}
    whole = {"step_ms": "step without the rule, ms", "rule_ms": "the rule adds, ms"}
    return _plain("balance_cost_h200", **header, hooks_ms="hooks, ms a step", **whole)


def balance_ep() -> str:
    """How even the ranks of expert parallelism are loaded."""
    header = {"worst_rank": "fuller rank over its share", "maxvio": "MaxVio", "tokens_per_s": "tokens/s per GPU"}
    return _plain("balance_ep_2xh200", dispatch="a token goes", steps="steps", **header)


def data_training() -> str:
    """Training on new batches beside training on one batch."""
    header = {"batches": "batches", "ranks": "GPUs", "tokens_per_s": "tokens/s per GPU"}
    header |= {"percent": "% of one batch's speed", "swing": "swing, %", "waiting": "waiting for data, %"}
    return _plain("data_training_h200", **header)


def data_loader() -> str:
    """The loader alone on two cores, beside the tokenizer alone."""
    header = {"by": "two of these tokenize", "loader": "loader, tokens/s", "tokenizer": "tokenizer alone, tokens/s"}
    return _plain("data_loader_h200", **header)


def balance_debug_seeds() -> str:
    """The README's run, one row for each seed and rule."""
    header = {"rule": "rule", "seed": "seed", "val_loss": "validation loss", "maxvio_mean": "MaxVio, steps 40 to 120"}
    return _plain("balance_debug_cpu", **header, maxvio_worst="highest of these", dead_experts="dead experts")


def seed_curve() -> str:
    return _plain("seed_curve_h100", step="step", loss="loss")


def inference() -> str:
    return _plain("inference", what="what", hardware="hardware", value="value", unit="unit")


def kernel_times() -> str:
    keys = ("up", "down", "down_backward", "dw2", "dw1", "dx", "combines")
    return _plain("kernel_times_h100", code="code", **{k: f"{k.replace('_', ' ')}, us" for k in keys})


def first_call() -> str:
    header = {"shape": "shape", "seconds": "first call at 100, s", "seconds_more": "then at 0, s"}
    return _plain("first_call_h100", **header)


def layer_cuda_graph() -> str:
    rows = rows_of("layer_cuda_graph_h100")
    return table(["implementation", "forward and backward, TFLOPS"], ([label(r), r["both"]] for r in rows))


def auto_500m() -> str:
    header = {"moment": "moment", "save_percent": "`save_percent`, mean of layers", "planned": "plan, GiB"}
    return _plain("auto_500m_h100", **header, measured="measured, GiB")


def versions() -> str:
    """What was run with each release of PyTorch and Triton."""
    header = {
        "cpu": "tests without a GPU",
        "portable": "portable kernels for sm_80, sm_90, sm_100",
        "gpu": "GPU tests, H200",
    }
    header |= {"hopper": "Hopper kernels compiled ahead", "used": "Hopper kernels used"}
    return _plain("versions", torch="PyTorch", triton="Triton", **header)


def plan_ep() -> str:
    header = {"save_percent": "`save_percent`", "rank_0": "rank 0, MiB", "rank_1": "rank 1, MiB"}
    return _plain("plan_ep_2xh100", **header, planned="plan, MiB")


TABLES: dict[str, Callable[[], str]] = {
    f.__name__: f
    for f in (readme_layer, layer_shapes, layer_both, layer_forward, layer_backward, layer_inference, layer_saved)
    + (layer_peak, layer_other_host, layer_save_percent, layer_h200, layer_original_momoe, layer_errors, layer_skew)
    + (layer_layouts, layer_kinds, transformers_step, torchtitan_step, layer_parts, layer_sustained, host_time)
    + (layer_router_share, router, decode, decode_time, memory_500m_speed, memory_500m_peak, memory_500m_planned)
    + (memory_500m_moe, memory_1_4b_speed, memory_1_4b_peak, memory_1_4b_planned, memory_1_4b_moe, compile_500m)
    + (memory_batch, train_500m, models_h200, layers_30b, parallel_two, goals_parallel, parallel_four, step_time)
    + (rates_step_time, eviction, balance_long, balance_all, balance_1_4b, balance_causes, balance_floor, balance_cost)
    + (layer_before, gpu_busy, step_variants, step_batches, file_plans, goals_step, goals_balance)
    + (balance_average, balance_ep, balance_1_4b_long, balance_replay, balance_lr, balance_time, balance_steep)
    + (data_training, data_loader, versions)
    + (balance_debug_seeds, seed_curve, inference, kernel_times)
    + (first_call, layer_cuda_graph, auto_500m, plan_ep, optimizer, loss, loss_30b, batch_30b, loss_runs)
    + (
        precision_losses,
        reliability,
        long_runs,
        mutation,
        step_breakdown,
        cuda_graph,
        first_step,
        rms_norm,
        link,
        fsdp,
        token_transfers,
        exchange,
    )
}


def filled(page: str) -> str:
    """A page with its tables as the measurements have them now."""

    def block(match: re.Match) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"no table is called {match[2]!r}; the tables are {', '.join(TABLES)}")
        return match[1] + TABLES[match[2]]() + match[3]

    return BLOCK.sub(block, page)


# --- charts ---------------------------------------------------------------------------------------


def _bars(axes, rows: list[Row], shapes: Sequence[str], columns: Sequence[str], value: str, ylabel: str) -> None:
    """One group of bars for each shape, one bar for each implementation."""
    cells = {(row["shape"], label(row)): row.get(value) for row in rows}
    width = 0.8 / len(columns)
    for i, column in enumerate(columns):
        heights = [cells[shape, column] or 0 for shape in shapes]
        x = [j + (i - (len(columns) - 1) / 2) * width for j in range(len(shapes))]
        axes.bar(x, heights, width, label=column, color=COLORS[column])
    axes.set_xticks(range(len(shapes)), shapes, rotation=30, ha="right")
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)


def draw_readme(figure) -> None:
    """Speed to the left, peak memory to the right."""
    rows, columns = rows_of("layer_h100"), (*OURS, "SonicMoE", "TorchTitan")
    left, right = figure.subplots(1, 2)
    shapes = README_SHAPES
    _bars(left, rows, shapes, columns, "both", "TFLOPS, forward and backward")
    _bars(right, rows, shapes, columns, "peak", "peak memory of the layer, MiB")
    right.legend(frameon=False, fontsize="small")


def _draw_all_shapes(value: str, ylabel: str) -> Callable[[object], None]:
    def draw(figure) -> None:
        rows = rows_of("layer_h100")
        shapes = list(dict.fromkeys(str(row["shape"]) for row in rows))
        for axes, part in zip(figure.subplots(3, 1), (shapes[:6], shapes[6:12], shapes[12:]), strict=True):
            _bars(axes, rows, part, (*OURS, "SonicMoE", "TorchTitan"), value, ylabel)
        figure.axes[0].legend(frameon=False, fontsize="small", ncols=4)

    return draw


def draw_ratio(figure) -> None:
    """One dot for each run: TFLOPS of forward and backward over SonicMoE's."""
    cells: dict[str, list[float]] = {}
    both = {(row["shape"], label(row)): row.get("both") for row in rows_of("layer_h100")}
    for shape, column in both:
        if column == "SonicMoE":
            cells[shape] = [both[shape, OURS[0]] / both[shape, column]]
    for row in rows_of("layer_repeats_h100"):
        if "both" in row and row["run"] != "earlier kernels":
            cells[str(row["shape"])].append(float(row["both"]))
    axes = figure.subplots()
    for i, ratios in enumerate(cells.values()):
        axes.plot([i] * len(ratios), ratios, "o", color=COLORS[OURS[0]], alpha=0.6)
    axes.axhline(1, color=COLORS["SonicMoE"], label="SonicMoE 0.1.2")
    axes.set_xticks(range(len(cells)), list(cells), rotation=40, ha="right")
    axes.set_ylabel("TFLOPS over SonicMoE's, one dot a run")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def _draw_memory(name: str) -> Callable[[object], None]:
    def draw(figure) -> None:
        axes = figure.subplots()
        rows, colors = rows_of(name), ("#1b6ca8", "#3a9d6e", "#e08a3c", "#9b59b6")
        for mode, color in zip(MODES, colors, strict=True):
            ours = [r for r in rows if r["mode"] == mode and "save_percent" in r]
            stock = [r for r in rows if r["mode"] == mode and "save_percent" not in r]
            axes.plot([r["peak"] for r in ours], [r["tokens_per_s"] for r in ours], "o-", color=color, label=mode)
            axes.plot([r["peak"] for r in stock], [r["tokens_per_s"] for r in stock], "x", color=color)
        axes.plot([], [], "x", color="black", label="TorchTitan's MoE, same mode")
        axes.set_xlabel("peak memory, GiB")
        axes.set_ylabel("tokens/s")
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small")

    return draw


def draw_balance(figure) -> None:
    """MaxVio over steps, one line for each rule of the long runs, first seed."""
    axes = figure.subplots()
    colors = "#1b6ca8", "#7fb3d5", "#3a9d6e", "#9b59b6", "#e08a3c", "#8c8c8c"
    drawn = {str(row["arm"]): row["maxvio"] for row in rows_of("balance_500m_1200") if row["seed"] == 0}
    drawn["none"] = next(row["maxvio"] for row in rows_of("balance_500m_400") if row["arm"] == "none")
    for arm, color in zip((arm for arm in BALANCE_ARMS if arm in drawn), colors, strict=True):
        axes.plot(range(10, 10 * len(drawn[arm]) + 1, 10), drawn[arm], color=color, label=BALANCE_ARMS[arm])
    axes.set_xscale("log")
    axes.set_xticks([10, 40, 100, 400, 1200], ["10", "40", "100", "400", "1,200"])
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("MaxVio, mean of the layers")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")


def draw_long(figure) -> None:
    """The training losses over steps to the left, the mean of all seeds; validation losses half way to the right."""
    job = "debug model, learning rate 1e-3"
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    for place, (arm, name) in enumerate(LONG_ARMS.items()):
        rows = _long_of(job, arm)
        steps = min(len(row["training"]) for row in rows)
        losses = [statistics.fmean(of_step) for of_step in zip(*(row["training"][:steps] for row in rows), strict=True)]
        left.plot(range(10, 10 * steps + 1, 10), losses, label=name, alpha=0.8, linewidth=1)
        right.plot([place] * len(rows), [row["half"] for row in rows], "o", alpha=0.6)
    left.set_xlabel("optimizer step")
    left.set_ylabel("training loss, mean of four seeds")
    right.set_xticks(range(len(LONG_ARMS)), list(LONG_ARMS.values()), rotation=30, ha="right")
    right.set_ylabel("validation loss at step 400, one dot a seed")
    left.legend(frameon=False, fontsize="small")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)


# name: (what draws it, measurements it shows, size in inches)
CHARTS: dict[str, tuple[Callable, tuple[str, ...], tuple[float, float]]] = {
    "layer": (draw_readme, ("layer_h100",), (10, 3.6)),
    "layer_forward_backward": (_draw_all_shapes("both", "TFLOPS"), ("layer_h100",), (8, 8)),
    "layer_forward": (_draw_all_shapes("forward", "TFLOPS"), ("layer_h100",), (8, 8)),
    "layer_peak": (_draw_all_shapes("peak", "MiB"), ("layer_h100",), (8, 8)),
    "layer_ratio": (draw_ratio, ("layer_h100", "layer_repeats_h100"), (8, 4)),
    "memory_500m": (_draw_memory("memory_500m_h100"), ("memory_500m_h100",), (7, 4.5)),
    "balance": (draw_balance, ("balance_500m_1200", "balance_500m_400"), (8, 4)),
    "long_runs": (draw_long, ("long_runs",), (9, 4)),
    "memory_1.4b": (_draw_memory("memory_1.4b_h100"), ("memory_1.4b_h100",), (7, 4.5)),
}


def chart_hash(name: str) -> str:
    """A hash of a chart's measurements and of the code that draws it."""
    draw, measurements, size = CHARTS[name]
    parts = [name, inspect.getsource(draw), inspect.getsource(_bars), repr((size, COLORS, README_SHAPES))]
    parts += [json.dumps(rows_of(measurement)) for measurement in measurements]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def stored_hash(png: Path) -> str | None:
    """The hash that a chart carries in its PNG metadata, None without one."""
    if not png.exists():
        return None
    data, at = png.read_bytes(), 8
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + length]
        if kind == b"tEXt" and body.startswith(b"Data\0"):
            return body[5:].decode()
        at += 12 + length
    return None


def draw_chart(name: str) -> None:
    """Write docs/NAME.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    draw, _, size = CHARTS[name]
    figure = pyplot.figure(figsize=size, layout="constrained")
    draw(figure)
    figure.savefig(DOCS / f"{name}.png", dpi=110, metadata={"Data": chart_hash(name)})
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Write what is not up to date, or, with --check, name it and return 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if something is stale")
    check = parser.parse_args(arguments).check

    pages = {path: path.read_text() for path in (ROOT / "README.md", *sorted(DOCS.glob("*.md")))}
    stale_pages = [path for path, page in pages.items() if filled(page) != page]
    stale_charts = [name for name in CHARTS if stored_hash(DOCS / f"{name}.png") != chart_hash(name)]
    for path in stale_pages:
        if not check:
            path.write_text(filled(pages[path]))
    for name in stale_charts:
        if not check:
            draw_chart(name)
    stale = [path.name for path in stale_pages] + [f"{name}.png" for name in stale_charts]
    if stale:
        print(f"{'not up to date' if check else 'written'}: {', '.join(stale)}", file=sys.stderr)
    return 1 if stale and check else 0


if __name__ == "__main__":
    sys.exit(main())
