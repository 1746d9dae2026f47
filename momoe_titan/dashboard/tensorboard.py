"""Writes more than scalars for TensorBoard: groups of charts, the load of every expert as images and
tensors, and a description of the run. `page_data` reads the tensors and the description too."""

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata  # pyright: ignore[reportAttributeAccessIssue]  protobuf makes it at run time
from tensorboard.compat.proto.tensor_pb2 import TensorProto  # pyright: ignore[reportAttributeAccessIssue]  protobuf makes it at run time
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto  # pyright: ignore[reportAttributeAccessIssue]  protobuf makes it at run time
from tensorboard.compat.proto.types_pb2 import DataType  # pyright: ignore[reportAttributeAccessIssue]  protobuf makes it at run time
from torch.utils.tensorboard import SummaryWriter
from torchtitan.components.metrics import BaseLogger, LoggerContainer, TensorBoardLogger
from torchtitan.tools.logging import logger

from momoe_titan.dashboard import tags

# The most records of the load in a run: 48 layers of 128 experts then take under 8 MB, images included.
MAX_FRAMES = 200


def custom_scalars_layout(layer_ids: Sequence[int], on_gpu: bool, expert_ranks: int = 1) -> dict[str, dict[str, list]]:
    """TensorBoard's custom-scalars page: charts of this run's scalars in groups, for
    `SummaryWriter.add_custom_scalars`."""
    load = {"tokens of the worst expert-parallel rank (1: an even share)": _lines(tags.WORST_RANK_LOAD)}
    ranks_of_experts = load if expert_ranks > 1 else {}
    return {
        "loss": {
            "training: mean and worst rank": _lines(tags.LOSS, tags.WORST_LOSS),
            "validation": _lines(tags.VALIDATION_LOSS),
            "validation perplexity": _lines(tags.VALIDATION_PERPLEXITY),
            "gradient norm": _lines(tags.GRAD_NORM),
            "learning rate": _lines(tags.LEARNING_RATE),
        },
        "balance": {
            "MaxVio: mean and maximum over layers": _lines(tags.MAXVIO_MEAN, tags.MAXVIO_MAX),
            "MaxVio over a validation: mean and maximum over layers": _lines(
                tags.MAXVIO_GLOBAL_MEAN, tags.MAXVIO_GLOBAL_MAX
            ),
            "MaxVio per layer": _lines(*map(tags.maxvio_layer, layer_ids)),
            "dead experts, in a step and in a validation": _lines(tags.DEAD_EXPERTS, tags.VALIDATION_DEAD_EXPERTS),
            **ranks_of_experts,
            "router entropy (1: undecided)": _lines(tags.ENTROPY_MEAN, tags.ENTROPY_MIN),
            "balancing bias": _lines(tags.BIAS_MIN, tags.BIAS_MAX),
        },
        "throughput": _throughput_charts(on_gpu),
        "memory": _memory_charts(on_gpu),
        "health": {
            "out of memory, allocation retries": _lines(tags.OOMS, tags.ALLOC_RETRIES),
            "non-finite losses or gradients": _lines(tags.NON_FINITE),
            "dropped tokens": _lines(tags.DROPPED_TOKENS),
            "kernels compiled": _lines(tags.KERNEL_COMPILES),
            "resumes": _lines(tags.RESUMES),
        },
    }


def _throughput_charts(on_gpu: bool) -> dict[str, list]:
    utilisation = {"model FLOPS utilisation (%)": _lines(tags.MFU)} if on_gpu else {}
    return {
        "tokens per second and device": _lines(tags.TOKENS_PER_SECOND),
        **utilisation,
        "seconds per step": _lines(tags.STEP_TIME),
        "data loading (% of the time)": _lines(tags.DATA_LOADING_PERCENT),
    }


def _memory_charts(on_gpu: bool) -> dict[str, list]:
    if on_gpu:
        title = "peak of the worst rank (GiB)"
        worst = _lines(tags.WORST_RANK_RESERVED, tags.WORST_RANK_ACTIVE, tags.CAPACITY)
    else:
        title = "resident, worst process (GiB)"
        worst = _lines(tags.WORST_RANK_RSS, tags.WORST_RANK_PEAK_RSS)
    return {
        title: worst,
        "saved by the experts for the backward, evicted from it (GiB)": _lines(
            tags.EXPERTS_SAVED, tags.EXPERTS_EVICTED
        ),
        "save_percent, mean over layers": _lines(tags.SAVE_PERCENT),
    }


def _lines(*names: str) -> list:
    """One chart with a line for each tag; TensorBoard wants regular expressions."""
    return ["Multiline", [f"^{re.escape(name)}$" for name in names]]


def load_image(load_LE: np.ndarray) -> np.ndarray:
    """A picture of the relative load, uint8 (H, W, 3): one row per layer, one square per expert.

    White is the mean load of the layer. Red is more, up to 8 times; blue is less, down to an eighth. Black is an expert
    without a token.
    """
    octaves_LE = np.clip(np.log2(np.maximum(load_LE, 2.0**-3)) / 3, -1, 1)
    more, less = np.array([178.0, 24, 43]), np.array([33.0, 102, 172])
    end = np.where(octaves_LE[..., None] > 0, more, less)
    colours = 255 + (end - 255) * np.abs(octaves_LE)[..., None]
    colours[load_LE == 0] = 0
    side = max(2, min(12, 768 // load_LE.shape[1]))
    return np.kron(colours.round().astype(np.uint8), np.ones((side, side, 1), np.uint8))


def load_summary(load_LE: np.ndarray) -> Summary:
    """TensorBoard's tensor summary of float16, two bytes a number.

    SummaryWriter.add_tensor is no help: it writes the bits of float32 into a float16 tensor.
    """
    tensor = TensorProto(
        dtype=DataType.Value("DT_HALF"),
        tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=n) for n in load_LE.shape]),
        tensor_content=load_LE.astype("<f2").tobytes(),
    )
    plugin = SummaryMetadata.PluginData(plugin_name="tensor")
    metadata = SummaryMetadata(plugin_data=plugin)
    return Summary(value=[Summary.Value(tag=tags.LOAD, metadata=metadata, tensor=tensor)])


def tensorboard_writer(logger: BaseLogger) -> SummaryWriter | None:
    """The writer of this rank's TensorBoard files; None where this rank writes none."""
    loggers = logger._loggers if isinstance(logger, LoggerContainer) else [logger]
    return next((x.writer for x in loggers if isinstance(x, TensorBoardLogger)), None)


class FaultyDiskLogger(BaseLogger):
    """A logger whose disk may fill up or turn read-only: one warning, and training goes on without its files.

    Args:
        logger: TorchTitan's.
        recorder: writes to the same files, and stops with it.
    """

    def __init__(self, logger: BaseLogger, recorder: "RunRecorder"):
        self.inner = logger
        self.recorder = recorder

    def log(self, metrics: dict[str, Any], step: int) -> None:
        """As the logger's."""
        self._try(lambda: self.inner.log(metrics, step))

    def close(self) -> None:
        """As the logger's."""
        self._try(self.inner.close)

    def _try(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as e:
            self.inner, self.recorder.writer = BaseLogger(), None
            logger.warning(f"METRICS ARE NO LONGER WRITTEN, to TensorBoard or elsewhere; training goes on: {e}")


class RunRecorder:
    """Writes a run's description and layout once, and the experts' load at a bounded rate.

    Args:
        writer: TensorBoard's, or None for a rank that writes nothing.
        log_steps: how many log steps the run has. At most MAX_FRAMES of them, and one more per start, record the load.
    """

    def __init__(self, writer: SummaryWriter | None, log_steps: int):
        self.writer = writer
        self.every = max(1, math.ceil(log_steps / MAX_FRAMES))
        self.seen = 0

    def start(self, description: dict[str, Any], layout: dict[str, dict[str, list]], step: int) -> None:
        """Write the description and the layout. Call it once, before the first log step.

        Args:
            description: values that JSON can hold.
            layout: from `custom_scalars_layout`.
            step: the first step of this start.
        """
        if self.writer is None:
            return
        self.writer.add_custom_scalars(layout)
        self.writer.add_text(tags.RUN, json.dumps(description, allow_nan=False), step)

    def record(self, load_LE: np.ndarray, step: int) -> None:
        """Write the load of this log step, if it is the first or the `every`-th since the last. Call it at each one."""
        due = self.seen % self.every == 0
        self.seen += 1
        if self.writer is None or not due or not load_LE.size:
            return
        try:
            # float16 ends at 65504; the load of one expert is at most E
            self.writer._get_file_writer().add_summary(load_summary(load_LE), step)
            self.writer.add_image(tags.LOAD_IMAGE, load_image(load_LE), step, dataformats="HWC")
        except OSError:
            self.writer = None  # `FaultyDiskLogger` warns: it writes to the same files
