"""Measures the memory of this process, which is logged in place of GPU memory on a machine without a GPU."""

import os
import platform
import resource
import sys
from typing import NamedTuple

import torch

from momoe_titan.dashboard import tags

GIB = 1024**3


class ProcessMemStats(NamedTuple):
    """Resident memory of this process, in GiB and in percent of the machine's memory."""

    rss_gib: float
    rss_pct: float
    peak_rss_gib: float
    peak_rss_pct: float

    # The two names by which TorchTitan's Trainer logs the memory of the fresh model.
    @property
    def max_reserved_gib(self) -> float:
        return self.peak_rss_gib

    @property
    def max_reserved_pct(self) -> float:
        return self.peak_rss_pct

    def metrics(self) -> dict[str, float]:
        """The same by tag."""
        return {
            tags.PROCESS_RSS: self.rss_gib,
            tags.PROCESS_RSS_PERCENT: self.rss_pct,
            tags.PROCESS_PEAK_RSS: self.peak_rss_gib,
            tags.PROCESS_PEAK_RSS_PERCENT: self.peak_rss_pct,
        }


class ProcessMemoryMonitor:
    """The counterpart of TorchTitan's DeviceMemoryMonitor for the memory of this process.

    The peak is that of the process's whole life: Linux cannot reset it for one reader alone.
    """

    def __init__(self):
        self.device = torch.device("cpu")
        self.device_name = platform.processor() or platform.machine()
        self.device_capacity = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self.device_capacity_gib = self.device_capacity / GIB

    def get_peak_stats(self) -> ProcessMemStats:
        rss, peak = _resident_bytes()
        return ProcessMemStats(
            rss / GIB,
            100 * rss / self.device_capacity,
            peak / GIB,
            100 * peak / self.device_capacity,
        )

    def reset_peak_stats(self) -> None:
        """Does nothing; TorchTitan calls it after every log line."""


def _resident_bytes() -> tuple[int, int]:
    """Resident bytes of this process: now, and at their peak."""
    try:
        with open("/proc/self/status") as status:
            fields = dict(line.split(":", 1) for line in status)
        now, peak = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
        return now, peak
    except (OSError, KeyError):
        # Without /proc only the peak is known: in bytes on macOS, in KiB elsewhere.
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return peak, peak
