"""Metrics of a momoe_titan run: TorchTitan's, the balance of the experts, kernel compiles.

On a machine without a GPU the memory is that of the process and is named so; there is no model
FLOPS utilization, because there is no peak to relate it to.
"""

import os
import platform
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torchtitan.components import metrics as titan
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.tools import utils
from torchtitan.tools.logging import logger

from momoe_titan.kernels.compile_count import compile_count

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


class ProcessMemoryMonitor:
    """What TorchTitan's DeviceMemoryMonitor is to a GPU, for the memory of this process.

    The peak is that of the whole process life: Linux has no way to restart it for oneself alone.
    """

    def __init__(self):
        self.device = torch.device("cpu")
        self.device_name = platform.processor() or platform.machine()
        self.device_capacity = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self.device_capacity_gib = self.device_capacity / GIB

    def get_peak_stats(self) -> ProcessMemStats:
        rss, peak = _process_memory()
        return ProcessMemStats(
            rss / GIB,
            100 * rss / self.device_capacity,
            peak / GIB,
            100 * peak / self.device_capacity,
        )

    def reset_peak_stats(self) -> None:
        """Nothing to do; TorchTitan calls it after every log line."""


class MomoeMetricsProcessor(titan.MetricsProcessor):
    """TorchTitan's metrics processor with the scalars of our optimizer hook and our kernels.

    Adds at log steps, and costs nothing in between:
        moe/...             what `optimizers.load_balancer.latest_metrics()` holds, with one copy
                            from the device for all of it
        moe/kernel_compiles Triton kernels compiled since the start
    and on the CPU memory/process_rss, memory/process_peak_rss in place of GPU memory.
    """

    def __init__(
        self,
        job_config: JobConfig,
        parallel_dims: ParallelDims,
        tag: str | None = None,
    ):
        self.on_gpu = torch.cuda.is_available()
        # Counting starts here, before the first kernel.
        compile_count()
        if self.on_gpu:
            super().__init__(job_config, parallel_dims, tag)
            return
        # TorchTitan's own constructor asks for the memory and the name of a GPU.
        self.logger = titan._build_metric_logger(job_config, parallel_dims, tag)
        self.parallel_dims = parallel_dims
        self.job_config = job_config
        self.device_memory_monitor = ProcessMemoryMonitor()
        self.color = (
            utils.NoColor() if job_config.metrics.disable_color_printing else utils.Color()
        )
        self.gpu_peak_flops = float("nan")
        self.num_flops_per_token = -1
        self.optimizers = self.lr_schedulers = self.model_parts = None
        self.data_loading_times = []
        self._restart_interval()

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        """Log one training step: scalars to the loggers, one line to the console."""
        extra_metrics = {**self.moe_metrics(), **(extra_metrics or {})}
        if self.on_gpu:
            super().log(step, global_avg_loss, global_max_loss, grad_norm, extra_metrics)
            return
        assert self.num_flops_per_token > 0, "num_flops_per_token must be set"
        seconds = time.perf_counter() - self.time_last_log
        tps = self._tokens_per_second(seconds)
        loading = sum(self.data_loading_times)
        memory = self.device_memory_monitor.get_peak_stats()
        self.logger.log(
            {
                "loss_metrics/global_avg_loss": global_avg_loss,
                "loss_metrics/global_max_loss": global_max_loss,
                "grad_norm": grad_norm,
                "throughput(tps)": tps,
                "tflops": self.num_flops_per_token * tps / 1e12,
                "time_metrics/end_to_end(s)": seconds / self.job_config.metrics.log_freq,
                "time_metrics/data_loading(s)": loading / max(1, len(self.data_loading_times)),
                "time_metrics/data_loading(%)": 100 * loading / seconds,
                **_memory_metrics(memory),
                **extra_metrics,
            },
            step,
        )
        c = self.color
        logger.info(
            f"{c.red}step: {step:2}  {c.green}loss: {global_avg_loss:8.5f}  "
            f"{c.orange}grad_norm: {grad_norm:7.4f}  "
            f"{c.turquoise}process memory: {memory.rss_gib:5.2f}GiB "
            f"(peak {memory.peak_rss_gib:.2f}GiB)  "
            f"{c.blue}tps: {round(tps):,}{c.reset}"
        )
        self.data_loading_times.clear()
        self._restart_interval()

    def log_validation(
        self, loss: float, step: int, extra_metrics: dict[str, Any] | None = None
    ) -> None:
        """Log one validation: its loss, throughput and memory."""
        if self.on_gpu:
            super().log_validation(loss, step, extra_metrics)
            return
        tps = self._tokens_per_second(time.perf_counter() - self.time_last_log)
        memory = self.device_memory_monitor.get_peak_stats()
        self.logger.log(
            {
                "validation_metrics/loss": loss,
                "validation_metrics/throughput(tps)": tps,
                **{f"validation_metrics/{k}": v for k, v in _memory_metrics(memory).items()},
                **(extra_metrics or {}),
            },
            step,
        )
        c = self.color
        logger.info(
            f"{c.yellow}validate step: {step:2}  {c.green}loss: {loss:7.4f}  "
            f"{c.turquoise}process memory: {memory.rss_gib:5.2f}GiB  "
            f"{c.blue}tps: {round(tps):,}{c.reset}"
        )
        self._restart_interval()

    def moe_metrics(self) -> dict[str, float]:
        """Balance of the last optimizer step, and the kernels compiled so far."""
        balancer = getattr(self.optimizers, "load_balancer", None)
        latest = balancer.latest_metrics() if balancer is not None else {}
        return {**host_scalars(latest), "moe/kernel_compiles": compile_count()}

    def _tokens_per_second(self, seconds: float) -> float:
        """Per device, as TorchTitan counts it."""
        return self.ntokens_since_last_log / (seconds * self.parallel_dims.non_data_parallel_size)

    def _restart_interval(self) -> None:
        self.ntokens_since_last_log = 0
        self.time_last_log = time.perf_counter()


def build_momoe_metrics_processor(
    job_config: JobConfig,
    parallel_dims: ParallelDims,
    model_args: Any = None,
    tag: str | None = None,
) -> MomoeMetricsProcessor:
    """TrainSpec.build_metrics_processor_fn of `momoe_llama`."""
    return MomoeMetricsProcessor(job_config, parallel_dims, tag)


def host_scalars(metrics: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """The 0-dim tensors among `metrics`, on the host, for the price of one copy.

    Tensors of one or more dimensions (tokens per layer and expert) are left out.
    """
    names = [name for name, value in metrics.items() if value.dim() == 0]
    if not names:
        return {}
    # float64 is exact for token counts up to 2^53.
    stacked = torch.stack([metrics[name].detach().to(torch.float64) for name in names])
    return dict(zip(names, stacked.tolist()))


def _memory_metrics(memory: ProcessMemStats) -> dict[str, float]:
    return {
        "memory/process_rss(GiB)": memory.rss_gib,
        "memory/process_rss(%)": memory.rss_pct,
        "memory/process_peak_rss(GiB)": memory.peak_rss_gib,
        "memory/process_peak_rss(%)": memory.peak_rss_pct,
    }


def _process_memory() -> tuple[int, int]:
    """Resident bytes of this process, now and at their highest."""
    try:
        with open("/proc/self/status") as status:
            fields = dict(line.split(":", 1) for line in status)
        return tuple(int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    except (OSError, KeyError):
        import resource
        import sys

        # Without /proc only the peak is known: in bytes on macOS, in KiB elsewhere.
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return peak, peak
