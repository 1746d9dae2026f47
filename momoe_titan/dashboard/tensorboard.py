"""What a run leaves for people to look at beside its scalars: TensorBoard's grouped charts, the load
of every expert as images and tensors, a description of the run, and the line on the console.

`scripts/dashboard.py` reads the tags named here.
"""

import dataclasses
import json
import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from tensorboard.compat.proto import types_pb2
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from torch.utils.tensorboard import SummaryWriter
from torchtitan.components.metrics import BaseLogger, LoggerContainer, TensorBoardLogger

# A text summary of one JSON object per start of the job.
RUN_TAG = "run"
# Tensor summaries, float16 (MoE layers, E): tokens of an expert relative to the layer's mean.
LOAD_TAG = "moe/load"
LOAD_IMAGE_TAG = "moe/load_per_layer_and_expert"
# Frames of the load in a run: 48 layers of 128 experts then take under 8 MB, images included.
MAX_FRAMES = 200


def layer_tag(layer_id: int) -> str:
    """Scalar with the MaxVio of one MoE layer."""
    return f"moe_maxvio/layer_{layer_id:02}"


def custom_scalars_layout(layer_ids: Sequence[int], on_gpu: bool) -> dict[str, dict[str, list]]:
    """TensorBoard's custom-scalars page: charts of this run's scalars in groups.

    For `SummaryWriter.add_custom_scalars`; tags are regular expressions there.
    """

    def lines(*tags: str) -> list:
        escaped = [tag.replace("(", r"\(").replace(")", r"\)") for tag in tags]
        return ["Multiline", [f"^{tag}$" for tag in escaped]]

    memory, throughput = {}, {}
    if on_gpu:
        memory["peak of the worst rank (GiB)"] = lines(
            "memory/worst_rank_reserved(GiB)", "memory/worst_rank_active(GiB)", "memory/capacity(GiB)"
        )
        throughput["model FLOPS utilisation (%)"] = lines("mfu(%)")
    else:
        memory["resident, worst process (GiB)"] = lines("memory/worst_rank_rss(GiB)", "memory/worst_rank_peak_rss(GiB)")
    return {
        "health": {
            "out of memory, allocation retries": lines("health/ooms", "health/alloc_retries"),
            "non-finite losses or gradients": lines("health/non_finite"),
            "dropped tokens": lines("moe/dropped_tokens"),
            "kernels compiled": lines("moe/kernel_compiles"),
            "resumes": lines("health/resumes"),
        },
        "loss": {
            "training: mean and worst rank": lines("loss_metrics/global_avg_loss", "loss_metrics/global_max_loss"),
            "validation": lines("validation_metrics/loss"),
            "gradient norm": lines("grad_norm"),
            "learning rate": lines("lr"),
        },
        "throughput": {
            "tokens per second and device": lines("throughput(tps)"),
            **throughput,
            "seconds per step": lines("time_metrics/step(s)"),
            "data loading (% of the time)": lines("time_metrics/data_loading(%)"),
        },
        "memory": {
            **memory,
            "kept by the experts for the backward, shed of it (GiB)": lines(
                "memory/experts_kept(GiB)", "memory/experts_shed(GiB)"
            ),
            "save_percent, mean over layers": lines("moe/save_percent"),
        },
        "balance": {
            "MaxVio: mean and maximum over layers": lines("moe/maxvio_batch_mean", "moe/maxvio_batch_max"),
            "MaxVio per layer": lines(*map(layer_tag, layer_ids)),
            "dead experts": lines("moe/dead_experts"),
            "router entropy (1: undecided)": lines("moe/router_entropy_mean", "moe/router_entropy_min"),
            "balancing bias": lines("moe/bias_min", "moe/bias_max"),
        },
    }


def load_image(load_LE: np.ndarray) -> np.ndarray:
    """A picture of the relative load: one square per expert, one row per layer, uint8 (H, W, 3).

    White is the fair share 1; red is more and blue less, full at 8 times and an eighth; black is an
    expert without a token.
    """
    octaves_LE = np.clip(np.log2(np.maximum(load_LE, 2.0**-3)) / 3, -1, 1)
    more, less = np.array([178.0, 24, 43]), np.array([33.0, 102, 172])
    end = np.where(octaves_LE[..., None] > 0, more, less)
    colours = 255 + (end - 255) * np.abs(octaves_LE)[..., None]
    colours[load_LE == 0] = 0
    side = max(2, min(12, 768 // load_LE.shape[1]))
    return np.kron(colours.round().astype(np.uint8), np.ones((side, side, 1), np.uint8))


def load_summary(load_LE: np.ndarray) -> Summary:
    """TensorBoard's tensor summary of float16, two bytes a number. (SummaryWriter.add_tensor writes
    the bits of float32 into a float16 tensor.)"""
    tensor = TensorProto(
        dtype=types_pb2.DT_HALF,
        tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=n) for n in load_LE.shape]),
        tensor_content=load_LE.astype("<f2").tobytes(),
    )
    plugin = SummaryMetadata.PluginData(plugin_name="tensor")
    metadata = SummaryMetadata(plugin_data=plugin)
    return Summary(value=[Summary.Value(tag=LOAD_TAG, metadata=metadata, tensor=tensor)])


def tensorboard_writer(logger: BaseLogger) -> SummaryWriter | None:
    """Where this rank writes TensorBoard's files; None where it does not."""
    loggers = logger._loggers if isinstance(logger, LoggerContainer) else [logger]
    return next((x.writer for x in loggers if isinstance(x, TensorBoardLogger)), None)


class RunRecorder:
    """Writes a run's description and layout once, and the experts' load at a bounded rate.

    Args:
        writer: TensorBoard's, or None for a rank that writes nothing.
        log_steps: how many log steps the run has; at most MAX_FRAMES of them (and one more per
            start) record the load.
    """

    def __init__(self, writer: SummaryWriter | None, log_steps: int):
        self.writer = writer
        self.every = max(1, math.ceil(log_steps / MAX_FRAMES))
        self.seen = 0

    def start(self, description: dict[str, Any], layout: dict[str, dict[str, list]], step: int) -> None:
        """Once, before the first log step.

        Args:
            description: what JSON can hold.
            layout: of `custom_scalars_layout`.
        """
        if self.writer is None:
            return
        self.writer.add_custom_scalars(layout)
        self.writer.add_text(RUN_TAG, json.dumps(description, allow_nan=False), step)

    def record(self, load_LE: np.ndarray, step: int) -> None:
        """Once per log step; writes the first and every `every`-th one."""
        due = self.seen % self.every == 0
        self.seen += 1
        if self.writer is None or not due or not load_LE.size:
            return
        # float16 ends at 65504, where E and with it the load of one expert never comes near
        self.writer._get_file_writer().add_summary(load_summary(load_LE), step)
        self.writer.add_image(LOAD_IMAGE_TAG, load_image(load_LE), step, dataformats="HWC")


class TimeLeft:
    """Seconds to the last step, from the pace of the last log steps: validation and checkpoints
    between them count."""

    def __init__(self, total_steps: int, window: int = 10):
        self.total_steps = total_steps
        self.seen: deque[tuple[int, float]] = deque(maxlen=window + 1)

    def after(self, step: int, now: float) -> float | None:
        """None after the first log step, whose time is that of starting up."""
        self.seen.append((step, now))
        first_step, begin = self.seen[0]
        if step == first_step:
            return None
        return (self.total_steps - step) * (now - begin) / (step - first_step)


@dataclasses.dataclass
class Progress:
    """What a log step prints. Memory is the worst rank's.

    Attributes:
        memory_name: of what the memory is.
        mfu: percent; NaN where there is no peak to relate it to.
        maxvio: the worst layer's, None without MoE layers.
        seconds_left: None while unknown.
    """

    step: int
    total_steps: int
    loss: float
    grad_norm: float
    tps: float
    memory_gib: float
    memory_pct: float
    memory_name: str
    mfu: float
    maxvio: float | None
    seconds_left: float | None

    def line(self, color: Any) -> str:
        """One line; `color` is TorchTitan's Color or NoColor."""
        parts = [
            f"{color.red}step: {self.step:2}",
            f"{color.green}loss: {self.loss:8.5f}",
            f"{color.orange}grad_norm: {self.grad_norm:7.4f}",
            f"{color.turquoise}{self.memory_name}: {self.memory_gib:5.2f}GiB({self.memory_pct:.1f}%)",
            f"{color.blue}tps: {round(self.tps):,}",
        ]
        if self.mfu == self.mfu:
            parts.append(f"{color.magenta}mfu: {self.mfu:.1f}%")
        if self.maxvio is not None:
            parts.append(f"{color.cyan}maxvio: {self.maxvio:.2f}")
        done = f"{color.reset}done: {self.step}/{self.total_steps} ({self.step / self.total_steps:.0%})"
        parts.append(done)
        if self.seconds_left is not None:
            parts.append(f"left: {duration(self.seconds_left)}")
        return "  ".join(parts)


def duration(seconds: float) -> str:
    """Such as 45s, 3m20s, 5h07m, 2d03h."""
    seconds = max(0, round(seconds))
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if seconds >= size:
            return f"{seconds // size}{unit}{seconds % size // part:02}{smaller}"
    return f"{seconds}s"
