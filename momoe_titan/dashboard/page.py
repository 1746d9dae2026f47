"""One page that shows training runs: health, loss, speed, memory, and the balance of the experts.

    python -m momoe_titan.dashboard outputs/debug_model -o dashboard.html
    python -m momoe_titan.dashboard "keep nothing=outputs/a" "keep all=outputs/b" --live 30

A RUN is a job's dump folder (or a folder below or above it), with a name in front if it should have
another than the folder's. What is read are TensorBoard's event files (metrics.enable_tensorboard).
The page holds all it needs: it opens in any browser, without a network. Starts of one job are
stitched together: where a resumed job repeats steps, the later start counts.

--live SECONDS also serves the page at http://127.0.0.1:PORT and refreshes it there, zoom and sliders
kept, until it is interrupted.

Needs the extra "dashboard": pip install 'momoe_titan[dashboard]'
"""

import argparse
import base64
import json
import math
import re
import sys
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.util.tensor_util import make_ndarray

TEMPLATE = Path(__file__).with_name("page.html")
# TorchTitan names the folder of a start by the minute.
START_FOLDER = re.compile(r"\d{8}-\d{4}")
EVENT_FILES = "events.out.tfevents.*"
RUN_TAG, LOAD_TAG = "run/text_summary", "moe/load"
MAXVIO_LAYER = re.compile(r"moe_maxvio/layer_(\d+)")

# Bounds on what the page holds of a run. A longer line is drawn by the lowest and the highest value
# of each stretch of steps, and noisy ones by the means of (longer) stretches above that.
MAX_POINTS = 2000
MAX_LAYER_POINTS = 400
MAX_MEANS = 200
MAX_FRAMES = 100

# Line on the page -> tags, of which the first that a run has is taken.
SERIES = {
    "loss": ("loss_metrics/global_avg_loss",),
    "loss_max": ("loss_metrics/global_max_loss",),
    "val_loss": ("validation_metrics/loss",),
    "grad_norm": ("grad_norm",),
    "tps": ("throughput(tps)",),
    "mfu": ("mfu(%)",),
    "step_time": ("time_metrics/step(s)", "time_metrics/end_to_end(s)"),
    "loading": ("time_metrics/data_loading(%)",),
    "mem_peak": (
        "memory/worst_rank_reserved(GiB)",
        "memory/worst_rank_peak_rss(GiB)",
        "memory/max_reserved(GiB)",
        "memory/process_peak_rss(GiB)",
    ),
    "mem_held": (
        "memory/worst_rank_active(GiB)",
        "memory/worst_rank_rss(GiB)",
        "memory/max_active(GiB)",
        "memory/process_rss(GiB)",
    ),
    "mem_capacity": ("memory/capacity(GiB)",),
    "worst_rank": ("memory/worst_rank",),
    "kept": ("memory/experts_kept(GiB)",),
    "save_percent": ("moe/save_percent",),
    "maxvio_mean": ("moe/maxvio_batch_mean",),
    "maxvio_max": ("moe/maxvio_batch_max",),
    "entropy_mean": ("moe/router_entropy_mean",),
    "entropy_min": ("moe/router_entropy_min",),
    "bias_min": ("moe/bias_min",),
    "bias_max": ("moe/bias_max",),
}


NOISY = ("loss", "loss_max", "grad_norm", "tps", "mfu", "step_time", "loading")


@dataclass
class Start:
    """One event file: what one start of a job has written so far.

    Attributes:
        frames: step -> load of the experts relative to the mean, (MoE layers, E).
        begun, last: seconds since the epoch, of the first and the last event.
    """

    path: Path
    scalars: dict[str, dict[int, float]] = field(default_factory=dict)
    frames: dict[int, np.ndarray] = field(default_factory=dict)
    description: dict[str, Any] = field(default_factory=dict)
    begun: float = math.inf
    last: float = 0.0
    loader: LegacyEventFileLoader | None = None

    def read(self) -> bool:
        """Read what has been added since the last call; whether there was anything."""
        last = self.last
        if self.loader is None:
            self.loader = LegacyEventFileLoader(str(self.path))
        for event in self.loader.Load():
            self.begun = min(self.begun, event.wall_time)
            self.last = max(self.last, event.wall_time)
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    self.scalars.setdefault(value.tag, {})[event.step] = value.simple_value
                elif value.tag == RUN_TAG:
                    self.description = json.loads(value.tensor.string_val[0])
                elif value.tag == LOAD_TAG:
                    self.frames[event.step] = make_ndarray(value.tensor)
        return self.last > last

    @property
    def steps(self) -> list[int]:
        return sorted(self.scalars.get(SERIES["loss"][0], {}))

    @property
    def first_step(self) -> int | None:
        """The first step that was trained, or else logged; None before that."""
        steps = self.steps
        return self.description.get("first_step", steps[0]) if steps else None


class Run:
    """A job with all its starts: what the page shows of it.

    Args:
        name: on the page.
        root: folder with the event files.
        stream: folders below that of a start, where several ranks write files of their own.
    """

    def __init__(self, name: str, root: Path):
        self.name = name
        self.root = root
        self.files: dict[Path, Start] = {}

    def read(self) -> bool:
        """Read new files and what files have got since the last call; whether there was anything."""
        for path in self.root.rglob(EVENT_FILES):
            if path not in self.files:
                self.files[path] = Start(path)
        return any([start.read() for start in self.files.values()])

    def _starts(self) -> list[Start]:
        """In order, of one rank: the first that knows the loss, where all ranks have written."""
        streams: dict[tuple, list[Start]] = {}
        for path, start in self.files.items():
            below = [part for part in path.parent.relative_to(self.root).parts if not START_FOLDER.fullmatch(part)]
            number = re.findall(r"\d+", below[-1]) if below else []
            streams.setdefault((int(number[-1]) if number else 0, *below), []).append(start)
        chosen: list[Start] = []
        for _, chosen in sorted(streams.items()):
            # Pipeline stages other than the last log a loss of -1.
            if any(v >= 0 for start in chosen for v in start.scalars.get(SERIES["loss"][0], {}).values()):
                break
        return sorted(chosen, key=lambda start: start.begun)

    def page_data(self) -> dict[str, Any]:
        """What the page's script draws; all of it fits into JSON."""
        starts = self._starts()
        scalars: dict[str, dict[int, float]] = {}
        frames: dict[int, np.ndarray] = {}
        resumes, notes = [], []
        trained = [start for start in starts if start.steps]
        if len(trained) < len(starts):
            notes.append(f"{len(starts) - len(trained)} of {len(starts)} starts ended before a step was logged")
        for start in trained:
            first = start.first_step
            for older in (*scalars.values(), frames):
                for step in [s for s in older if s >= first]:
                    del older[step]
            if first > 1:
                resumes.append({"step": first, "time": start.begun, "known": start is not trained[0]})
            elif start is not trained[0]:
                resumes.clear()
                notes.append("started again from step 1: what came before is not shown")
            for tag, values in start.scalars.items():
                scalars.setdefault(tag, {}).update(values)
            frames.update(start.frames)
        description = trained[-1].description if trained else {}

        series, shortened = {}, [0, 0]
        for key, tags in SERIES.items():
            tag = next((tag for tag in tags if scalars.get(tag)), None)
            if tag is not None:
                series[key] = _line(scalars[tag], MAX_POINTS, shortened)
                if key in NOISY and len(scalars[tag]) > 2 * MAX_MEANS:
                    series[key]["means"] = _means(scalars[tag])
        layers = sorted((int(m[1]), tag) for tag in scalars if (m := MAXVIO_LAYER.fullmatch(tag)))
        steps = sorted(scalars.get(SERIES["loss"][0], {}))
        return {
            "name": self.name,
            "folder": str(self.root),
            "description": description,
            "total_steps": description.get("total_steps"),
            "last_step": steps[-1] if steps else None,
            "begun": min((start.begun for start in starts if start.last), default=None),
            "updated": max((start.last for start in starts if start.last), default=None),
            "starts": len(starts),
            "resumes": resumes,
            "notes": notes,
            "health": health(trained, len(resumes)),
            "series": series,
            "maxvio_layers": [
                {"layer": layer, **_line(scalars[tag], MAX_LAYER_POINTS, shortened)} for layer, tag in layers
            ],
            "load": _frames(frames, description),
            "summary": summarise(scalars),
            "drawn": shortened,
        }


def health(starts: list[Start], resumes: int) -> list[dict[str, Any]]:
    """The tiles of the health strip: label, value, state ("ok", "warn", "bad", "unknown"), note.

    Counters begin anew with every start: their last values are added up, over all that the starts
    have seen, repeated steps included.
    """

    def tile(label: str, tags: tuple[str, ...], state: str) -> dict[str, Any]:
        total, last, seen = 0, None, False
        for start in starts:
            values = next((start.scalars[tag] for tag in tags if tag in start.scalars), None)
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

    tiles = [
        tile("Out of memory", ("health/ooms", "memory/num_ooms"), "bad"),
        tile("Allocation retries", ("health/alloc_retries", "memory/num_alloc_retries"), "warn"),
        tile("Non-finite log steps", ("health/non_finite",), "bad"),
        tile("Dropped tokens", ("moe/dropped_tokens",), "bad"),
        tile("Kernels compiled", ("moe/kernel_compiles",), "ok"),
    ]
    # Every path through the kernels, validation's too, is compiled once; a count that keeps growing
    # is a fault.
    for start in starts:
        compiles = [value for _, value in sorted(start.scalars.get("moe/kernel_compiles", {}).items())]
        if len(compiles) > 20 and compiles[-1] > compiles[len(compiles) // 2]:
            tiles[-1] |= {"state": "warn", "note": "still growing"}
    non_finite = sum(
        not math.isfinite(v)
        for start in starts
        for tag in (*SERIES["loss"], "grad_norm")
        for v in start.scalars.get(tag, {}).values()
    )
    if non_finite and not tiles[2]["value"]:
        tiles[2] |= {"value": non_finite, "state": "bad", "note": "in loss or gradient norm"}
    note = f"{len(starts)} starts" if len(starts) > 1 else ""
    tiles.append({"label": "Resumes", "value": resumes, "state": "ok", "note": note})
    return tiles


def summarise(scalars: dict[str, dict[int, float]]) -> dict[str, float | None]:
    """One number each: the highest memory, and medians over the second half of the log steps."""

    def values(key: str) -> list[float]:
        tag = next((tag for tag in SERIES[key] if scalars.get(tag)), None)
        found = [v for _, v in sorted(scalars.get(tag, {}).items())]
        return [v for v in found if math.isfinite(v)]

    def later_half(key: str) -> float | None:
        found = values(key)
        return float(np.median(found[len(found) // 2 :])) if found else None

    def last(key: str) -> float | None:
        return (values(key) or [None])[-1]

    return {
        "loss": last("loss"),
        "val_loss": last("val_loss"),
        "tps": later_half("tps"),
        "mfu": later_half("mfu"),
        "step_time": later_half("step_time"),
        "mem_peak": max(values("mem_peak"), default=None),
        "capacity": last("mem_capacity"),
        "kept": last("kept"),
        "save_percent": last("save_percent"),
        "maxvio": last("maxvio_mean"),
    }


def extremes(values: np.ndarray, limit: int) -> np.ndarray:
    """Indices, rising, of at most `limit` values: the lowest and the highest of equal stretches, the
    first and the last."""
    if len(values) <= limit:
        return np.arange(len(values))
    edges = np.linspace(0, len(values), (limit - 2) // 2 + 1).astype(int)
    kept = {0, len(values) - 1}
    for begin, end in zip(edges, edges[1:]):
        stretch = values[begin:end]
        if np.isnan(stretch).all():
            kept.add(int(begin))
        else:
            kept |= {int(begin + np.nanargmin(stretch)), int(begin + np.nanargmax(stretch))}
    return np.array(sorted(kept))


def _line(values: dict[int, float], limit: int, shortened: list[int]) -> dict[str, list]:
    steps = sorted(values)
    y = np.array([values[step] for step in steps], dtype=float)
    y[~np.isfinite(y)] = np.nan
    kept = extremes(y, limit)
    shortened[0] += len(kept)
    shortened[1] += len(y)
    # six digits are more than a screen shows; JSON has no NaN
    shown = [None if math.isnan(v) else float(f"{v:.6g}") for v in y[kept]]
    return {"x": [steps[i] for i in kept], "y": shown}


def _means(values: dict[int, float]) -> dict[str, list]:
    """Of MAX_MEANS equal stretches, at the last step of each; what is not finite is left out."""
    steps = sorted(values)
    x, y = [], []
    for stretch in np.array_split(np.arange(len(steps)), MAX_MEANS):
        finite = [values[steps[i]] for i in stretch if math.isfinite(values[steps[i]])]
        x.append(steps[stretch[-1]])
        y.append(float(f"{np.mean(finite):.6g}") if finite else None)
    return {"x": x, "y": y}


def _frames(frames: dict[int, np.ndarray], description: dict[str, Any]) -> dict[str, Any] | None:
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


def find_runs(arguments: list[str]) -> list[Run]:
    """The runs below the folders that were named, in that order.

    Raises:
        ValueError: a folder does not exist, or holds no event file.
    """
    found: dict[Path, str | None] = {}
    for argument in arguments:
        name, separator, path = argument.partition("=")
        if not separator or Path(argument).exists():
            name, path = None, argument
        folder = Path(path).resolve()
        if not folder.is_dir():
            raise ValueError(f"RUN {argument!r}: there is no folder {folder}")
        roots = []
        for file in sorted(folder.rglob(EVENT_FILES)):
            # .../<dump folder>/<tb>/<start>/[<rank>/]<file>, from the start's folder upward
            start = next((p for p in file.parents if START_FOLDER.fullmatch(p.name)), None)
            root = file.parent if start is None else start.parent
            if folder.is_relative_to(root):
                root = folder  # one start was named
            if root not in roots:
                roots.append(root)
        if not roots:
            raise ValueError(f"RUN {argument!r}: no TensorBoard file under {folder}: is metrics.enable_tensorboard on?")
        for root in roots:
            below = root.parent.relative_to(folder) if root.parent.is_relative_to(folder) else Path()
            found[root] = name if name is None or len(roots) == 1 else str(name / below)
    runs = []
    for root, name in found.items():
        # dump folder/tb, or one start below it
        dump = root.parent.parent if START_FOLDER.fullmatch(root.name) else root.parent
        runs.append(Run(name or dump.name, root))
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = str(run.root)
    return runs


def page_json(runs: list[Run], live: float = 0) -> str:
    """What the page's script draws; `live`: seconds between refreshes, or 0."""
    shown = [run.page_data() for run in runs]
    return json.dumps({"written": time.time(), "live": live, "runs": shown}, allow_nan=False)


def page(data: str) -> str:
    """The whole page, of what `page_json` gives.

    Raises:
        ModuleNotFoundError: plotly is not installed.
    """
    from plotly.offline import get_plotlyjs

    # No "</script>" may come from a name.
    parts = {"@DATA@": data.replace("</", "<\\/"), "@PLOTLY@": get_plotlyjs()}
    return re.sub("@DATA@|@PLOTLY@", lambda mark: parts[mark[0]], TEMPLATE.read_text())


def write(path: Path, text: str) -> None:
    """A reader sees the old page or the new one, whole."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


class Live:
    """The page and its data as they were last read."""

    def __init__(self, runs: list[Run], out: Path, seconds: float):
        self.runs, self.out, self.seconds = runs, out, seconds
        self.refresh(force=True)

    def refresh(self, force: bool = False) -> None:
        """Read the runs again; write the page if they have changed."""
        if any([run.read() for run in self.runs]) or force:
            data = page_json(self.runs, self.seconds)
            text = page(data)
            self.data, self.page = data.encode(), text.encode()
            write(self.out, text)

    def serve(self, port: int) -> ThreadingHTTPServer:
        """On this machine only; port 0 takes a free one."""
        server = ThreadingHTTPServer(("127.0.0.1", port), partial(_Handler, self))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, live: Live, *args):
        self.live = live
        super().__init__(*args)

    def do_GET(self) -> None:
        answers = {"/": (self.live.page, "text/html"), "/data": (self.live.data, "application/json")}
        body, kind = answers.get(self.path.partition("?")[0], (None, None))
        if body is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args) -> None:
        """Requests are not worth a line."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder, or NAME=folder")
    parser.add_argument("-o", "--out", type=Path, default=Path("dashboard.html"))
    parser.add_argument("--live", type=float, default=0, metavar="SECONDS", help="refresh that often until interrupted")
    parser.add_argument("--port", type=int, default=0, help="of --live; 0 (the default) takes a free one")
    args = parser.parse_args()
    if args.live < 0 or not math.isfinite(args.live):
        parser.error(f"--live {args.live} must be a number of seconds")
    if not 0 <= args.port < 1 << 16:
        parser.error(f"--port {args.port} must be from 0 to 65535")
    try:
        runs = find_runs(args.runs)
        if not args.live:
            for run in runs:
                run.read()
            write(args.out, page(page_json(runs)))
            print(f"{args.out}: {args.out.stat().st_size / 2**20:.1f} MiB, {len(runs)} run{'s'[: len(runs) > 1]}")
            return
        live = Live(runs, args.out, args.live)
        server = live.serve(args.port)
    except ModuleNotFoundError as e:
        sys.exit(f"dashboard.py: {e}: pip install 'momoe_titan[dashboard]'")
    except (ValueError, OSError) as e:
        parser.error(str(e))
    print(
        f"http://127.0.0.1:{server.server_port} (and {args.out}), refreshed every {args.live:g} s; Ctrl-C ends it",
        flush=True,
    )
    try:
        while True:
            time.sleep(args.live)
            live.refresh()
    except KeyboardInterrupt:
        server.shutdown()
