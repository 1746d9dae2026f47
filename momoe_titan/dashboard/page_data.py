"""Computes the data that the page draws of a run, as JSON: lines, the load of the experts, health, a summary.

The page stays small however long a run is: each line and the number of frames have a bound.
"""

import base64
import itertools
import math
from typing import Any

import numpy as np

from momoe_titan.dashboard import tags
from momoe_titan.dashboard.events import Run, Start, Stitched, stitch

# A longer line is drawn by the lowest and the highest value of each stretch of steps. Above that, a noisy line also
# gets the means of longer stretches.
MAX_POINTS = 2000
MAX_LAYER_POINTS = 400
MAX_MEANS = 200
MAX_FRAMES = 100
MAX_AXIS_POINTS = 500

# A layer's highest MaxVio is E/K - 1: every token chooses the same K experts.
BAD_MAXVIO = 0.5  # of the highest
WARN_MAXVIO = 0.5, 0.25  # in itself, and of the highest: the lower one counts
LAST_LOG_STEPS = 5  # of which the tile shows the median

# Line on the page -> tags, of which the first that a run has is taken.
SERIES: dict[str, tuple[str, ...]] = {
    "loss": (tags.LOSS,),
    "loss_max": (tags.WORST_LOSS,),
    "val_loss": (tags.VALIDATION_LOSS,),
    "val_perplexity": (tags.VALIDATION_PERPLEXITY,),
    "grad_norm": (tags.GRAD_NORM,),
    "lr": (tags.LEARNING_RATE,),
    "tps": (tags.TOKENS_PER_SECOND,),
    "mfu": (tags.MFU,),
    "step_time": (tags.STEP_TIME, tags.TIME_END_TO_END),
    "loading": (tags.DATA_LOADING_PERCENT,),
    "mem_peak": (tags.WORST_RANK_RESERVED, tags.WORST_RANK_PEAK_RSS, tags.GPU_RESERVED, tags.PROCESS_PEAK_RSS),
    "mem_in_use": (tags.WORST_RANK_ACTIVE, tags.WORST_RANK_RSS, tags.GPU_ACTIVE, tags.PROCESS_RSS),
    "mem_capacity": (tags.CAPACITY,),
    "worst_rank": (tags.WORST_RANK,),
    "saved": (tags.EXPERTS_SAVED,),
    "save_percent": (tags.SAVE_PERCENT,),
    "maxvio_mean": (tags.MAXVIO_MEAN,),
    "maxvio_max": (tags.MAXVIO_MAX,),
    "val_maxvio_mean": (tags.MAXVIO_GLOBAL_MEAN,),
    "val_maxvio_max": (tags.MAXVIO_GLOBAL_MAX,),
    "dead": (tags.DEAD_EXPERTS,),
    "val_dead": (tags.VALIDATION_DEAD_EXPERTS,),
    "worst_rank_load": (tags.WORST_RANK_LOAD,),
    "entropy_mean": (tags.ENTROPY_MEAN,),
    "entropy_min": (tags.ENTROPY_MIN,),
    "bias_min": (tags.BIAS_MIN,),
    "bias_max": (tags.BIAS_MAX,),
}
NOISY = ("loss", "loss_max", "grad_norm", "tps", "mfu", "step_time", "loading")


def page_data(run: Run) -> dict[str, Any]:
    """What the page's script draws of a run; all of it fits into JSON."""
    starts = run.starts()
    stitched = stitch(starts)
    if tags.VALIDATION_PERPLEXITY not in stitched.scalars and tags.VALIDATION_LOSS in stitched.scalars:
        # a run of an older version
        losses = stitched.scalars[tags.VALIDATION_LOSS]
        stitched.scalars[tags.VALIDATION_PERPLEXITY] = {step: math.exp(min(loss, 100)) for step, loss in losses.items()}
    lines = Lines(stitched.scalars)
    series = {key: line for key in SERIES if (line := lines.of_key(key)) is not None}
    maxvio_layers = lines.of_layers()
    description = dict(stitched.description)
    steps = sorted(stitched.scalars.get(tags.LOSS, {}))
    return {
        "name": run.name,
        "folder": str(run.root),
        "description": description,
        "total_steps": description.get("total_steps"),
        "last_step": steps[-1] if steps else None,
        "begun": min((start.begun for start in starts if start.last), default=None),
        "updated": max((start.last for start in starts if start.last), default=None),
        "starts": len(starts),
        "resumes": stitched.resumes,
        "notes": stitched.notes,
        "health": [*balance_tiles(stitched.scalars, description), *health(stitched.starts, len(stitched.resumes))],
        "config": description.pop("config", {}),
        "axes": axes(stitched),
        "series": series,
        "maxvio_layers": maxvio_layers,
        "load": _load(stitched.frames, description),
        "summary": summarise(stitched.scalars),
        "drawn": [lines.drawn, lines.recorded],
    }


def axes(run: Stitched) -> dict[str, list]:
    """Tokens and seconds at some of the steps, between which the page interpolates."""
    steps = sorted(run.seconds)
    if len(steps) > MAX_AXIS_POINTS:
        steps = [steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, MAX_AXIS_POINTS).round().astype(int))]
    axis: dict[str, list] = {"steps": steps, "seconds": [round(run.seconds[step], 1) for step in steps]}
    tokens = run.scalars.get(tags.TOKENS_SEEN, {})
    if all(step in tokens for step in steps):
        axis["tokens"] = [tokens[step] for step in steps]
    return axis


class Lines:
    """Shortens the lines of a run, and counts how many of the recorded values are drawn."""

    def __init__(self, scalars: dict[str, dict[int, float]]):
        self.scalars = scalars
        self.drawn = self.recorded = 0

    def of_key(self, key: str) -> dict[str, Any] | None:
        """The line of `SERIES` with this key; None where the run has none of its tags."""
        values = _values(self.scalars, key)
        if not values:
            return None
        line: dict[str, Any] = self._shortened(values, MAX_POINTS)
        if key in NOISY and len(values) > 2 * MAX_MEANS:
            line["means"] = _means(values)
        return line

    def of_layers(self) -> list[dict[str, Any]]:
        """MaxVio of every MoE layer, in order."""
        layers = sorted((layer, tag) for tag in self.scalars if (layer := tags.maxvio_layer_id(tag)) is not None)
        return [{"layer": layer, **self._shortened(self.scalars[tag], MAX_LAYER_POINTS)} for layer, tag in layers]

    def _shortened(self, values: dict[int, float], limit: int) -> dict[str, list]:
        steps = sorted(values)
        y = np.array([values[step] for step in steps], dtype=float)
        y[~np.isfinite(y)] = np.nan
        chosen = extremes(y, limit)
        self.drawn += len(chosen)
        self.recorded += len(y)
        # six digits are more than a screen shows; JSON has no NaN
        shown = [None if math.isnan(v) else float(f"{v:.6g}") for v in y[chosen]]
        return {"x": [steps[i] for i in chosen], "y": shown}


def _values(scalars: dict[str, dict[int, float]], key: str) -> dict[int, float]:
    """Step -> value of the first tag of this line that the run has."""
    return next((scalars[tag] for tag in SERIES[key] if scalars.get(tag)), {})


def balance_tiles(scalars: dict[str, dict[int, float]], description: dict[str, Any]) -> list[dict[str, Any]]:
    """Tiles for the balance of the last log steps: MaxVio of the worst layer, dead experts, the worst rank's tokens."""

    def last(tag: str) -> float | None:
        values = [v for _, v in sorted(scalars.get(tag, {}).items()) if math.isfinite(v)]
        return float(np.median(values[-LAST_LOG_STEPS:])) if values else None

    tag = tags.MAXVIO_MAX if tags.MAXVIO_MAX in scalars else tags.MAXVIO_MEAN
    experts, top_k = description.get("num_experts"), description.get("top_k")
    highest = experts / top_k - 1 if experts and top_k else None
    tiles = [_maxvio_tile(last(tag), highest)]
    dead = last(tags.DEAD_EXPERTS)
    layers = sum(tags.maxvio_layer_id(tag) is not None for tag in scalars)
    all_experts = layers * experts if experts else None
    tile = {"label": "Dead experts", "value": None if dead is None else round(dead), "state": "ok", "note": ""}
    if dead is None:
        tile |= {"state": "unknown", "note": "not recorded"}
    else:
        tile["note"] = f"of {all_experts:,}, in one step" if all_experts else "in one step"
        if dead > 0:
            tile["state"] = "bad" if all_experts and dead > all_experts / 10 else "warn"
    tiles.append(tile)
    if (load := last(tags.WORST_RANK_LOAD)) is not None:
        state = "ok" if load <= 1.2 else "warn" if load <= 1.5 else "bad"
        note = "of an even share of the tokens"
        tiles.append({"label": "Worst rank of experts", "value": round(load, 2), "state": state, "note": note})
    return tiles


def _maxvio_tile(value: float | None, highest: float | None) -> dict[str, Any]:
    """The tile of the worst layer's MaxVio, red at the latest where every token goes to the same experts."""
    label = "Balance (MaxVio)"
    if value is None:
        return {"label": label, "value": None, "state": "unknown", "note": "not recorded"}
    limit = 2.0 if highest is None else BAD_MAXVIO * highest
    warn = WARN_MAXVIO[0] if highest is None else min(WARN_MAXVIO[0], WARN_MAXVIO[1] * highest)
    state = "ok"
    if highest is None or highest > 0:
        state = "bad" if value >= limit else "warn" if value > warn else "ok"
    note = "worst layer" if highest is None else f"worst layer; {highest:.3g} is the highest"
    return {"label": label, "value": round(value, 2), "state": state, "note": note}


def health(starts: list[Start], resumes: int) -> list[dict[str, Any]]:
    """The tiles of the health strip: label, value, state ("ok", "warn", "bad", "unknown"), note.

    Counters begin at 0 with every start. A tile adds up their last values, repeated steps included.
    """
    non_finite = _tile(starts, "Non-finite log steps", (tags.NON_FINITE,), "bad")
    if not non_finite["value"] and (count := _count_non_finite(starts)):
        non_finite |= {"value": count, "state": "bad", "note": "in loss or gradient norm"}
    compiles = _tile(starts, "Kernels compiled", (tags.KERNEL_COMPILES,), "ok")
    if any(map(_keeps_compiling, starts)):
        compiles |= {"state": "warn", "note": "still growing"}
    note = f"{len(starts)} starts" if len(starts) > 1 else ""
    return [
        _tile(starts, "Out of memory", (tags.OOMS, tags.GPU_OOMS), "bad"),
        _tile(starts, "Allocation retries", (tags.ALLOC_RETRIES, tags.GPU_ALLOC_RETRIES), "warn"),
        non_finite,
        _tile(starts, "Dropped tokens", (tags.DROPPED_TOKENS,), "bad"),
        compiles,
        {"label": "Resumes", "value": resumes, "state": "ok", "note": note},
    ]


def _tile(starts: list[Start], label: str, names: tuple[str, ...], state: str) -> dict[str, Any]:
    """The sum of a counter over all starts; `state` is that of a sum above 0."""
    total, last, seen = 0.0, None, False
    for start in starts:
        values = next((start.scalars[tag] for tag in names if tag in start.scalars), None)
        if values is None:
            continue
        seen = True
        line = sorted(values.items())
        total += max(0, line[-1][1])
        before = 0.0
        for step, value in line:
            last = step if value > before else last
            before = value
    if not seen:
        return {"label": label, "value": None, "state": "unknown", "note": "not recorded"}
    note = "" if last is None else f"last at step {last:,}"
    return {"label": label, "value": round(total), "state": state if total else "ok", "note": note}


def _keeps_compiling(start: Start) -> bool:
    """Whether kernels were compiled in the later half of a start.

    Every path through the kernels is compiled once, also that of validation. A count that keeps growing is a fault.
    """
    compiles = [value for _, value in sorted(start.scalars.get(tags.KERNEL_COMPILES, {}).items())]
    return len(compiles) > 20 and compiles[-1] > compiles[len(compiles) // 2]


def _count_non_finite(starts: list[Start]) -> int:
    return sum(
        not math.isfinite(v)
        for start in starts
        for tag in (tags.LOSS, tags.GRAD_NORM)
        for v in start.scalars.get(tag, {}).values()
    )


def summarise(scalars: dict[str, dict[int, float]]) -> dict[str, float | None]:
    """One number for each: the highest memory, medians over the second half of the log steps, and last values."""

    def finite(key: str) -> list[float]:
        return [v for _, v in sorted(_values(scalars, key).items()) if math.isfinite(v)]

    def median_of_later_half(key: str) -> float | None:
        found = finite(key)
        return float(np.median(found[len(found) // 2 :])) if found else None

    def last(key: str) -> float | None:
        return (finite(key) or [None])[-1]

    return {
        "loss": last("loss"),
        "val_loss": last("val_loss"),
        "val_perplexity": last("val_perplexity"),
        "lr": max(finite("lr"), default=None),
        "tps": median_of_later_half("tps"),
        "mfu": median_of_later_half("mfu"),
        "step_time": median_of_later_half("step_time"),
        "mem_peak": max(finite("mem_peak"), default=None),
        "capacity": last("mem_capacity"),
        "saved": last("saved"),
        "save_percent": last("save_percent"),
        "maxvio": last("maxvio_mean"),
        "val_maxvio": last("val_maxvio_max"),
        "dead": last("dead"),
    }


def extremes(values: np.ndarray, limit: int) -> np.ndarray:
    """Rising indices of at most `limit` values: the first, the last, and the lowest and highest of equal stretches."""
    if len(values) <= limit:
        return np.arange(len(values))
    edges = np.linspace(0, len(values), (limit - 2) // 2 + 1).astype(int)
    chosen = {0, len(values) - 1}
    for begin, end in itertools.pairwise(edges):
        stretch = values[begin:end]
        if np.isnan(stretch).all():
            chosen.add(int(begin))
        else:
            chosen |= {int(begin + np.nanargmin(stretch)), int(begin + np.nanargmax(stretch))}
    return np.array(sorted(chosen))


def _means(values: dict[int, float]) -> dict[str, list]:
    """The mean of each of MAX_MEANS equal stretches, at its last step, over the values that are finite."""
    steps = sorted(values)
    x, y = [], []
    for stretch in np.array_split(np.arange(len(steps)), MAX_MEANS):
        finite = [values[steps[i]] for i in stretch if math.isfinite(values[steps[i]])]
        x.append(steps[stretch[-1]])
        y.append(float(f"{np.mean(finite):.6g}") if finite else None)
    return {"x": x, "y": y}


def _load(frames: dict[int, np.ndarray], description: dict[str, Any]) -> dict[str, Any] | None:
    """The load, one byte an expert: 0 for none, else 86 + 21 * log2(load), within 1.7%."""
    if not frames:
        return None
    steps = sorted(frames)
    shape = frames[steps[-1]].shape
    steps = [step for step in steps if frames[step].shape == shape]
    every = np.unique(np.linspace(0, len(steps) - 1, min(MAX_FRAMES, len(steps))).round().astype(int))
    codes = []
    for i in every:
        load_LE = frames[steps[i]].astype(np.float32)
        code_LE = (86 + 21 * np.log2(np.maximum(load_LE, 1e-9))).round().clip(1, 255)
        codes.append(base64.b64encode(np.where(load_LE > 0, code_LE, 0).astype(np.uint8).tobytes()).decode())
    return {
        "steps": [steps[i] for i in every],
        "recorded": len(steps),
        "layers": description.get("moe_layers") or list(range(shape[0])),
        "experts": shape[1],
        "data": codes,
    }
