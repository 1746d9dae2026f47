"""Metrics of a momoe_titan run: TorchTitan's, and the balance of the experts, memory and health of
the whole job, gathered at log steps only.

On a machine without a GPU the memory is that of the process and is named so; there is no model
FLOPS utilization, because there is no peak to relate it to.
"""

import logging
import math
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torchtitan.components import metrics as titan
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.tools import utils
from torchtitan.tools.logging import logger

from momoe_titan.components.job_state import JobState, RankState, gather
from momoe_titan.dashboard.tensorboard import (
    Progress,
    RunRecorder,
    TimeLeft,
    custom_scalars_layout,
    layer_tag,
    tensorboard_writer,
)
from momoe_titan.kernels.compile_count import compile_count
from momoe_titan.model.args import MomoeLlamaArgs
from momoe_titan.model.moe import BalancedMoE, MomoeMoE
from momoe_titan.moe.expert_stats import want_entropy
from momoe_titan.save_percent import num_saved_rows

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
    """TorchTitan's metrics processor with the state of all ranks and layers.

    Adds at log steps, for one reduction over all ranks and one copy from the device, and costs
    nothing in between:
        moe/..., moe_maxvio/...  balance of the last optimizer step, in all pipeline stages
        moe/kernel_compiles      Triton kernels compiled since the start, on the rank with most
        memory/worst_rank...     memory of the rank that uses most
        health/...               out of memory, allocation retries, non-finite values, skipped steps,
                                 resumes
        time_metrics/step(s)     of the steps since the last log step or validation
    the experts' load as tensors and images (see `dashboards.RunRecorder`), and on the CPU
    memory/process_rss, memory/process_peak_rss in place of GPU memory.

    Args:
        model_args: says which layers the whole model has; without them it is this rank's.
    """

    def __init__(
        self,
        job_config: JobConfig,
        parallel_dims: ParallelDims,
        model_args: MomoeLlamaArgs | None = None,
        tag: str | None = None,
    ):
        self.on_gpu = torch.cuda.is_available()
        # Counting starts here, before the first kernel.
        compile_count()
        if self.on_gpu:
            super().__init__(job_config, parallel_dims, tag)
        else:
            self._init_on_cpu(job_config, parallel_dims, tag)
        self.model_args = model_args
        steps = job_config.training.steps
        self.time_left = TimeLeft(steps)
        self.recorder = RunRecorder(tensorboard_writer(self.logger), steps // job_config.metrics.log_freq + 1)
        self.first_step: int | None = None
        self.resumes = 0
        self.described = False
        self.non_finite = 0
        self.skipped_steps = 0
        self.steps_since_last_log = 0
        want_entropy(True)

    def _init_on_cpu(self, job_config: JobConfig, parallel_dims: ParallelDims, tag: str | None) -> None:
        # TorchTitan's own constructor asks for the memory and the name of a GPU.
        self.logger = titan._build_metric_logger(job_config, parallel_dims, tag)
        self.parallel_dims = parallel_dims
        self.job_config = job_config
        self.device_memory_monitor = ProcessMemoryMonitor()
        self.color = utils.NoColor() if job_config.metrics.disable_color_printing else utils.Color()
        self.gpu_peak_flops = float("nan")
        self.num_flops_per_token = -1
        self.optimizers = self.lr_schedulers = self.model_parts = None
        self.data_loading_times = []
        self._restart_interval()

    def should_log(self, step: int) -> bool:
        """Whether this step is logged; the trainer asks once after every step."""
        self.steps_since_last_log += 1
        logs = super().should_log(step)
        if self.first_step is None:
            self.first_step = step
            self.resumes = self._count_resumes()
            if not logs:
                # The routers have recorded this step, whose number was not known.
                self._restart_entropy()
        # Routers record the steps that will be logged; `log` reads and clears the record.
        want_entropy(super().should_log(step + 1))
        return logs

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        """Log one training step: scalars to the loggers, one line to the console."""
        assert self.num_flops_per_token > 0, "num_flops_per_token must be set"
        now = time.perf_counter()
        seconds = now - self.time_last_log
        tps = self._tokens_per_second(seconds)
        loading = sum(self.data_loading_times)
        memory = self.device_memory_monitor.get_peak_stats()
        state = self._gather(memory)
        if not self.described:
            self._describe_run(state)
            self.described = True
        self.non_finite += not (math.isfinite(global_avg_loss) and math.isfinite(grad_norm))
        if (skipped := int(state.ranks.skipped_steps.max())) > self.skipped_steps:
            logger.warning(
                f"{skipped - self.skipped_steps} optimizer steps were NOT TAKEN since the last log "
                "line: their gradient was not finite"
            )
            self.skipped_steps = skipped
        extra_metrics = {
            **self._state_metrics(state),
            "time_metrics/step(s)": seconds / max(1, self.steps_since_last_log),
            **(extra_metrics or {}),
        }
        if self.on_gpu:
            # Its line is replaced by the one below; what it warns of, the call above has said.
            with _silent(logger):
                super().log(step, global_avg_loss, global_max_loss, grad_norm, extra_metrics)
        else:
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
            self.data_loading_times.clear()
            self._restart_interval()
        self.steps_since_last_log = 0
        self.recorder.record(state.load_LE, step)
        worst = int(state.ranks.peak.argmax())
        progress = Progress(
            step=step,
            total_steps=self.job_config.training.steps,
            loss=global_avg_loss,
            grad_norm=grad_norm,
            tps=tps,
            memory_gib=state.ranks.peak[worst],
            memory_pct=100 * state.ranks.peak[worst] / state.ranks.capacity[worst],
            memory_name="memory" if self.on_gpu else "process memory",
            mfu=100 * self.num_flops_per_token * tps / self.gpu_peak_flops,
            maxvio=state.maxvio_L.max() if state.layer_ids else None,
            seconds_left=self.time_left.after(step, now),
        )
        logger.info(progress.line(self.color))

    def log_validation(self, loss: float, step: int, extra_metrics: dict[str, Any] | None = None) -> None:
        """Log one validation: its loss, throughput and memory."""
        self.steps_since_last_log = 0
        # TorchTitan 0.2.2 adds up the mean losses of the context-parallel ranks.
        loss /= self.parallel_dims.cp
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

    def _layers(self) -> dict[int, BalancedMoE]:
        """This rank's MoE layers by their index in the model."""
        return {
            int(layer_id): module
            for part in self.model_parts or ()
            for layer_id, block in part.layers.items()
            for module in block.modules()
            if isinstance(module, BalancedMoE)
        }

    def _gather(self, memory: NamedTuple) -> JobState:
        layers = self._layers()
        balancer = getattr(self.optimizers, "load_balancer", None)
        counted = {}
        if balancer is not None and balancer.counts_LE is not None:
            counts = {id(layer): counts_E for layer, counts_E in zip(balancer.layers, balancer.counts_LE)}
            counted = {i: (layer, counts[id(layer)]) for i, layer in layers.items()}
        if self.model_args is None:
            layer_ids = sorted(layers)
            num_experts = next(iter(layers.values())).experts.num_experts if layers else 1
        else:
            layer_ids = self.model_args.moe_layer_ids
            num_experts = self.model_args.moe_args.num_experts
        here = self._rank_state(memory, list(layers.values()))
        device = torch.device("cuda" if self.on_gpu else "cpu")
        state = gather(counted, layer_ids, num_experts, here, device)
        self._restart_entropy()
        return state

    def _restart_entropy(self) -> None:
        if layers := self._layers():
            torch._foreach_zero_([layer.router.entropy_and_tokens for layer in layers.values()])

    def _rank_state(self, memory: NamedTuple, layers: list[BalancedMoE]) -> RankState:
        if self.on_gpu:
            held, peak = memory.max_active_gib, memory.max_reserved_gib
            retries, ooms = memory.num_alloc_retries, memory.num_ooms
        else:
            held, peak, retries, ooms = memory.rss_gib, memory.peak_rss_gib, 0, 0
        ours = [layer for layer in layers if isinstance(layer, MomoeMoE)]
        ledgers = {layer.experts.ledger for layer in ours} - {None}  # one or none
        guard = getattr(self.optimizers, "non_finite_guard", None)
        return RankState(
            held=held,
            peak=peak,
            capacity=self.device_memory_monitor.device_capacity_gib,
            alloc_retries=retries,
            ooms=ooms,
            kernel_compiles=compile_count(),
            experts_kept=sum(self._kept(layer, layer.experts.save_percent) for layer in ours),
            experts_kept_at_100=sum(self._kept(layer, 100) for layer in ours),
            skipped_steps=0 if guard is None else guard.skipped_steps,
            experts_shed=sum(ledger.shed_bytes for ledger in ledgers) / GIB,
        )

    def _kept(self, layer: MomoeMoE, save_percent: float) -> float:
        """GiB that the layer's experts keep of a rank's local batch, beyond input and routing.

        Computed from shapes, for routing that is even over ranks. Pipeline stages keep what the
        microbatches under way need, which is at most this.
        """
        training, dims = self.job_config.training, self.parallel_dims
        tokens = training.local_batch_size * training.seq_len // dims.cp
        rows = num_saved_rows(tokens * layer.router.top_k, save_percent)
        item = TORCH_DTYPE_MAP[training.mixed_precision_param].itemsize
        return rows * 2 * layer.experts.w2.shape[1] // dims.tp * item / GIB

    def _state_metrics(self, state: JobState) -> dict[str, float]:
        ranks = state.ranks
        held, peak = ("active", "reserved") if self.on_gpu else ("rss", "peak_rss")
        scalars = {
            f"memory/worst_rank_{held}(GiB)": ranks.held.max(),
            f"memory/worst_rank_{peak}(GiB)": ranks.peak.max(),
            "memory/worst_rank": ranks.peak.argmax(),
            "memory/capacity(GiB)": ranks.capacity.min(),
            "health/alloc_retries": ranks.alloc_retries.sum(),
            "health/ooms": ranks.ooms.sum(),
            "health/non_finite": self.non_finite,
            "health/skipped_steps": ranks.skipped_steps.max(),
            "health/resumes": self.resumes,
            "moe/kernel_compiles": ranks.kernel_compiles.max(),
        }
        if state.ours:
            scalars["moe/save_percent"] = state.save_percent_L.mean()
            scalars["memory/experts_kept(GiB)"] = ranks.experts_kept.max()
            scalars["memory/experts_shed(GiB)"] = ranks.experts_shed.max()
        if state.counts_LE.size:
            maxvio_L, entropy_L = state.maxvio_L, state.entropy_L
            scalars |= {
                "moe/maxvio_batch_mean": maxvio_L.mean(),
                "moe/maxvio_batch_max": maxvio_L.max(),
                "moe/dead_experts": (state.counts_LE == 0).sum(),
                "moe/bias_min": state.bias_LE.min(),
                "moe/bias_max": state.bias_LE.max(),
                # every token reaches all experts it chose: there is no capacity limit
                "moe/dropped_tokens": 0,
                "moe/router_entropy_mean": entropy_L.mean(),
                "moe/router_entropy_min": entropy_L.min(),
                **{layer_tag(i): maxvio for i, maxvio in zip(state.layer_ids, maxvio_L)},
            }
        return {name: float(value) for name, value in scalars.items()}

    def _count_resumes(self) -> int:
        if self.first_step == 1:
            return 0
        # One event file per start, this one's among them.
        config = self.job_config
        folder = Path(config.job.dump_folder, config.metrics.save_tb_folder)
        return max(1, len(list(folder.rglob("events.out.tfevents.*"))) - 1)

    def _describe_run(self, state: JobState) -> None:
        config, args = self.job_config, self.model_args
        training = config.training
        description = {
            "first_step": self.first_step,
            "total_steps": training.steps,
            "description": config.job.description,
            "model": f"{config.model.name} {config.model.flavor}",
            "device": self.device_memory_monitor.device_name if self.on_gpu else "CPU",
            "ranks": len(state.ranks.peak),
            "local_batch_size": training.local_batch_size,
            "seq_len": training.seq_len,
            "activation_checkpoint": config.activation_checkpoint.mode,
            "moe_layers": state.layer_ids,
        }
        if state.ours:
            description["save_percent"] = state.save_percent_L.tolist()
            description["experts_kept_at_100_gib"] = state.ranks.experts_kept_at_100.max()
        if args is not None:
            description["backend"] = args.backend
            description["num_experts"] = args.moe_args.num_experts
            description["top_k"] = args.moe_args.top_k
        layout = custom_scalars_layout(state.layer_ids, self.on_gpu)
        self.recorder.start(description, layout, self.first_step)

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
    return MomoeMetricsProcessor(job_config, parallel_dims, model_args, tag)


@contextmanager
def _silent(log: logging.Logger) -> Iterator[None]:
    """What this thread gives to the logger is dropped."""
    thread = threading.get_ident()

    def is_from_another(record: logging.LogRecord) -> bool:
        return record.thread != thread

    log.addFilter(is_from_another)
    try:
        yield
    finally:
        log.removeFilter(is_from_another)


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
