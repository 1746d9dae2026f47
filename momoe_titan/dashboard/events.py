"""Reads runs from their TensorBoard event files: which starts a job had, and what each logged."""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.util.tensor_util import make_ndarray

from momoe_titan.dashboard import tags

# TorchTitan names the folder of a start by the minute.
START_FOLDER = re.compile(r"\d{8}-\d{4}")


@dataclass
class Start:
    """One event file: what one start of a job has written so far.

    Attributes:
        scalars: tag -> step -> value.
        frames: step -> load of the experts relative to the mean, (MoE layers, E).
        seconds: step -> seconds since the first event.
        description: what `RunRecorder.start` was given.
        begun, last: seconds since the epoch, of the first and the last event.
    """

    path: Path
    scalars: dict[str, dict[int, float]] = field(default_factory=dict)
    frames: dict[int, np.ndarray] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    description: dict[str, Any] = field(default_factory=dict)
    begun: float = math.inf
    last: float = 0.0
    loader: LegacyEventFileLoader | None = None

    def read(self) -> bool:
        """Read what was added since the last call. Returns whether there was anything."""
        last = self.last
        if self.loader is None:
            self.loader = LegacyEventFileLoader(str(self.path))
        for event in self.loader.Load():
            self.begun = min(self.begun, event.wall_time)
            self.last = max(self.last, event.wall_time)
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    self.scalars.setdefault(value.tag, {})[event.step] = value.simple_value
                    if value.tag == tags.LOSS:
                        self.seconds[event.step] = event.wall_time - self.begun
                elif value.tag == tags.RUN_IN_FILE:
                    self.description = json.loads(value.tensor.string_val[0])
                elif value.tag == tags.LOAD:
                    self.frames[event.step] = make_ndarray(value.tensor)
        return self.last > last

    @property
    def steps(self) -> list[int]:
        return sorted(self.scalars.get(tags.LOSS, {}))

    @property
    def first_step(self) -> int | None:
        """The first step that was trained, or else logged; None before that."""
        steps = self.steps
        return self.description.get("first_step", steps[0]) if steps else None


class Run:
    """A job with all its starts.

    Args:
        name: of the run on the page.
        root: the folder that holds the event files, at any depth.
    """

    def __init__(self, name: str, root: Path):
        self.name = name
        self.root = root
        self.files: dict[Path, Start] = {}

    def read(self) -> bool:
        """Read what all files have got since the last call, new files included. Returns whether there was anything."""
        for path in self.root.rglob(tags.EVENT_FILES):
            if path not in self.files:
                self.files[path] = Start(path)
        return any([start.read() for start in self.files.values()])

    def starts(self) -> list[Start]:
        """The starts in order of time, as one rank wrote them.

        Where all ranks have written, this is the first rank that knows the loss.
        """
        streams: dict[tuple, list[Start]] = {}
        for path, start in self.files.items():
            below = [part for part in path.parent.relative_to(self.root).parts if not START_FOLDER.fullmatch(part)]
            number = re.findall(r"\d+", below[-1]) if below else []
            streams.setdefault((int(number[-1]) if number else 0, *below), []).append(start)
        chosen: list[Start] = []
        for _, chosen in sorted(streams.items()):
            # Pipeline stages other than the last log a loss of -1.
            if any(v >= 0 for start in chosen for v in start.scalars.get(tags.LOSS, {}).values()):
                break
        return sorted(chosen, key=lambda start: start.begun)


@dataclass
class Stitched:
    """All starts of a job as one run. Where a resumed job repeats steps, the later start counts.

    Attributes:
        starts: those that have logged a step.
        scalars, frames: as in `Start`.
        seconds: step -> seconds spent so far, without those between two starts.
        resumes: step and time of each resume, and whether the start before it is known.
        notes: what the reader of the page should know.
    """

    starts: list[Start]
    scalars: dict[str, dict[int, float]] = field(default_factory=dict)
    frames: dict[int, np.ndarray] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    resumes: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def description(self) -> dict[str, Any]:
        """The description that the last start of the job wrote."""
        return self.starts[-1].description if self.starts else {}

    def drop_from(self, step: int) -> None:
        """Forget this step and all later ones."""
        for values in (*self.scalars.values(), self.frames, self.seconds):
            for later in [s for s in values if s >= step]:
                del values[later]


def stitch(starts: list[Start]) -> Stitched:
    """The starts of one job, in order of time, as one run."""
    run = Stitched([start for start in starts if start.steps])
    if len(run.starts) < len(starts):
        run.notes.append(f"{len(starts) - len(run.starts)} of {len(starts)} starts ended before a step was logged")
    for start in run.starts:
        first = start.first_step
        assert first is not None  # it has logged a step
        is_first_start = start is run.starts[0]
        run.drop_from(first)
        if first > 1:
            run.resumes.append({"step": first, "time": start.begun, "known": not is_first_start})
        elif not is_first_start:
            run.resumes.clear()
            run.notes.append("started again from step 1: what came before is not shown")
        for tag, values in start.scalars.items():
            run.scalars.setdefault(tag, {}).update(values)
        run.frames.update(start.frames)
        before = max(run.seconds.values(), default=0.0)
        run.seconds.update({step: before + seconds for step, seconds in start.seconds.items()})
    return run


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
        for file in sorted(folder.rglob(tags.EVENT_FILES)):
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
            run.name = _shortest_name(run.root, [other.root for other in runs if other is not run])
    return runs


def _shortest_name(root: Path, others: list[Path]) -> str:
    """The last parts of a folder's path that no other folder ends with."""
    parts = root.parts
    for count in range(2, len(parts)):
        if all(other.parts[-count:] != parts[-count:] for other in others):
            return str(Path(*parts[-count:]))
    return str(root)
