"""Filters and shortens the console log, so that a user sees the lines that matter, each of them once."""

import logging
import os
import re
import warnings
from pathlib import Path

import torchtitan
from torchtitan.tools.logging import logger

from momoe_titan.config.command_line import LOG_LEVELS

LEVELS = {level: getattr(logging, level.upper()) for level in LOG_LEVELS}
TITAN = str(Path(next(iter(torchtitan.__path__))))
# TorchTitan's own lines that contain one of these are shown at the level "info"; its other lines are not.
KEPT = (
    "Starting job:",
    " capacity: ",
    "Total parameter count",
    "Loading the checkpoint from",
    "Training starts at step",
    "validate step",
    "Created seed checkpoint",
)
KEPT_OF_SEVERAL_RANKS = ("Building device mesh",)
COLORS = re.compile("\x1b\\[[0-9;]*m")
# The first rank's line has the loss of the last pipeline stage.
# Without FSDP the precision is ours to set up, and has a line of ours (`training_step`).
UNTRUE = ("Pipeline Parallel loss is not visible", "Mixed precision training with TP or PP is only supported")


class ConsoleFilter(logging.Filter):
    """Which records are shown. At the level "debug" all are, of all ranks; otherwise those of the first rank.

    Args:
        level: a key of `LEVELS`.
    """

    def __init__(self, level: str):
        super().__init__()
        self.level = LEVELS[level]
        self.first_rank = os.environ.get("RANK", "0") == "0"
        several = os.environ.get("WORLD_SIZE", "1") != "1"
        self.kept = KEPT + (KEPT_OF_SEVERAL_RANKS if several else ())

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < self.level:
            return False
        if self.level == logging.DEBUG or record.levelno >= logging.ERROR:
            return True
        if not self.first_rank:
            return False
        message = record.getMessage()
        if record.levelno < logging.WARNING and record.pathname.startswith(TITAN):
            return any(part in message for part in self.kept)
        return not any(part in message for part in UNTRUE)


class ConsoleFormatter(logging.Formatter):
    """The time and the message; its level too where that is above "info"."""

    def __init__(self):
        super().__init__("%(asctime)s %(message)s", datefmt="%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record)
        if record.levelno < logging.WARNING:
            return line
        time, _, message = line.partition(" ")
        return f"{time} {record.levelname}: {message}"


class WithoutColors(logging.Formatter):
    """Another formatter's lines without colour codes, for a log that goes to a file or a pipe."""

    def __init__(self, formatter: logging.Formatter):
        super().__init__()
        self.formatter = formatter

    def format(self, record: logging.LogRecord) -> str:
        return COLORS.sub("", self.formatter.format(record))


def quiet_before_start(level: str) -> ConsoleFilter:
    """Filter what TorchTitan says until it has read the configuration. Remove the result from `logger` at the end."""
    shown = ConsoleFilter(level)
    logger.addFilter(shown)
    if LEVELS[level] > logging.DEBUG:
        # torchdata 0.11 calls it whenever a loader is made.
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")
        # TorchTitan 0.2.2 calls it after the first step; PyTorch 2.15 wants another name.
        warnings.filterwarnings("ignore", ".*set_pg_timeout.* is deprecated")
        if not shown.first_rank:
            warnings.simplefilter("ignore")
    return shown


def set_up_console(shown: ConsoleFilter) -> None:
    """Filter all loggers' records and shorten the lines; to be called once TorchTitan has made its handler."""
    logger.setLevel(min(shown.level, logging.INFO))
    for handler in logger.handlers:
        handler.addFilter(shown)
        if shown.level == logging.DEBUG:
            handler.setLevel(logging.DEBUG)
        else:
            handler.setFormatter(ConsoleFormatter())
        stream = getattr(handler, "stream", None)
        if handler.formatter is not None and not (stream is not None and stream.isatty()):
            handler.setFormatter(WithoutColors(handler.formatter))
