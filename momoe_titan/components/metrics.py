"""Logs the metrics of a run: TorchTitan's, and the balance of the experts, the memory and the health of the job.

On a machine without a GPU, memory is that of the process and has tags of its own. There is no model FLOPS utilisation,
because the peak FLOPS of a CPU are not known.
"""

import dataclasses
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from torchtitan.components import metrics as titan
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.tools import utils
from torchtitan.tools.logging import logger

from momoe_titan.components.balance import CollapseWatch, ValidationCounts, maxvio, worst_rank_load
from momoe_titan.components.job_state import JobState, RankState, gather, to_host
from momoe_titan.components.process_memory import GIB, ProcessMemoryMonitor, ProcessMemStats
from momoe_titan.components.summary import Totals, perplexity
from momoe_titan.dashboard import tags
from momoe_titan.dashboard.console import Progress, TimeLeft
from momoe_titan.dashboard.tensorboard import FaultyDiskLogger, RunRecorder, custom_scalars_layout, tensorboard_writer
from momoe_titan.kernels.compile_count import compile_count
from momoe_titan.model.args import MomoeLlamaArgs
from momoe_titan.model.experts import SavingExperts
from momoe_titan.model.moe import BalancedMoE
from momoe_titan.moe.balancing import QUANTILE
from momoe_titan.moe.expert_stats import want_entropy
from momoe_titan.save_percent import num_saved_rows


class StepNumbers(NamedTuple):
    """What a log step knows on the device alone, tensors of no dimension, over all ranks.

    Attributes:
        loss, worst_loss: the mean over all tokens, and the largest mean of a rank.
        grad_norm: before clipping.
        tokens_seen: since the job began.
    """

    loss: torch.Tensor
    worst_loss: torch.Tensor
    grad_norm: torch.Tensor
    tokens_seen: torch.Tensor


class MomoeMetricsProcessor(titan.MetricsProcessor):
    """TorchTitan's metrics processor, which also logs the state of all ranks and layers.

    A log step costs one reduction over all ranks and one copy from the device; other steps cost nothing. On a GPU the
    host does not wait for them: `start_log` has the numbers copied, and `finish_log` logs them when the host has
    started the step after, so that the GPU always has something to do. It adds:
        moe/..., moe_maxvio/...  balance of the last optimizer step, in all pipeline stages
        moe/kernel_compiles      Triton kernels compiled since the start, on the rank with most
        memory/worst_rank...     memory of the rank that uses most
        validation_metrics/...   perplexity, and the balance over all tokens of a validation
        health/...               out of memory, allocation retries, non-finite values, skipped steps, resumes
        time_metrics/step(s)     mean over the steps since the last log step or validation
    and the experts' load as tensors and images (see `RunRecorder`). On the CPU, memory/process_rss and
    memory/process_peak_rss take the place of GPU memory. `dashboard.tags` lists all tags.

    Args:
        model_args: names the MoE layers of the whole model; without it only those of this rank are known.
    """

    device_memory_monitor: titan.DeviceMemoryMonitor | ProcessMemoryMonitor

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
        self.logger = FaultyDiskLogger(self.logger, self.recorder)
        self.totals = Totals(memory_name="memory" if self.on_gpu else "process memory")
        self.validation_counts: ValidationCounts | None = None
        self.collapse: CollapseWatch | None = None
        if model_args is not None and model_args.moe_layer_ids:
            moe = model_args.moe_args
            self.collapse = CollapseWatch(moe.num_experts, moe.top_k, balance_advice(model_args))
        self.first_step: int | None = None
        self.resumes = 0
        self.described = False
        self.non_finite = 0
        self.skipped_steps = 0
        self.steps_since_last_log = 0
        self.unfinished: Callable[[], None] | None = None
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
        """Whether this step is logged, as the last one is; the trainer asks once after every step."""
        self.steps_since_last_log += 1
        logs = self._is_log_step(step)
        if self.first_step is None:
            self.first_step = step
            self.resumes = self._count_resumes()
            if not logs:
                # The routers have recorded this step, whose number was not known.
                self._restart_entropy()
        # Routers record the steps that will be logged; `log` reads and clears the record.
        want_entropy(self._is_log_step(step + 1))
        return logs

    def _is_log_step(self, step: int) -> bool:
        return super().should_log(step) or step == self.job_config.training.steps

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        """Log one training step: scalars to the loggers, one line to the console."""
        memory = self._take_peaks()
        state = self._gather(memory, global_avg_loss)()
        self._log(step, global_avg_loss, global_max_loss, grad_norm, state, memory, extra_metrics)

    def start_log(self, step: int, numbers: StepNumbers, lr: float) -> None:
        """Log one training step; on a GPU later, in `finish_log`, without waiting for it now."""
        memory = self._take_peaks()
        state = self._gather(memory, numbers.loss)
        read = to_host(torch.stack([number.double() for number in numbers]))
        tokens, steps, loads = self.ntokens_since_last_log, self.steps_since_last_log, len(self.data_loading_times)

        def finish() -> None:
            loss, worst, norm, seen = (float(number) for number in read())
            # What the steps since have counted belongs to the next log step.
            later = self.ntokens_since_last_log - tokens, self.steps_since_last_log - steps
            later_loads = self.data_loading_times[loads:]
            self.ntokens_since_last_log, self.steps_since_last_log = tokens, steps
            del self.data_loading_times[loads:]
            extra_metrics = {tags.TOKENS_SEEN: int(seen), tags.LEARNING_RATE: lr}
            self._log(step, loss, worst, norm, state(), memory, extra_metrics)
            self.ntokens_since_last_log, self.steps_since_last_log = later
            self.data_loading_times += later_loads

        self.finish_log()
        self.unfinished = finish
        if not self.on_gpu:
            self.finish_log()

    def finish_log(self) -> None:
        """Log what `start_log` has left to do, if anything: to be called when the next step has been started, and
        before anything else is logged, or takes time that is no step's."""
        if self.unfinished is not None:
            finish, self.unfinished = self.unfinished, None
            finish()

    def _take_peaks(self) -> titan.DeviceMemStats | ProcessMemStats:
        """This rank's peaks of memory since the last time. The next step may allocate before this one is logged."""
        memory = self.device_memory_monitor.get_peak_stats()
        if self.on_gpu:
            self.device_memory_monitor.reset_peak_stats()
        return memory

    def _log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        state: JobState,
        memory: titan.DeviceMemStats | ProcessMemStats,
        extra_metrics: dict[str, Any] | None,
    ) -> None:
        """Log a step whose numbers are on the host. The device has just ended the step."""
        assert self.num_flops_per_token > 0, "num_flops_per_token must be set"
        now = time.perf_counter()
        seconds = now - self.time_last_log
        tps = self._tokens_per_second(seconds)
        waiting_pct = 100 * sum(self.data_loading_times) / seconds
        loss = state.ranks.loss.max()  # pipeline stages other than the last have one of -1
        if not self.described:
            self._describe_run(state)
            self.described = True
        self._count_faults(state, global_avg_loss, grad_norm)
        metrics = {
            **self._state_metrics(state),
            tags.STEP_TIME: seconds / max(1, self.steps_since_last_log),
            **(extra_metrics or {}),
        }
        if isinstance(memory, ProcessMemStats):
            losses = {tags.LOSS: global_avg_loss, tags.WORST_LOSS: global_max_loss, tags.GRAD_NORM: grad_norm}
            self._log_on_cpu(step, seconds, {**losses, **memory.metrics(), **metrics})
        else:
            # Its line is replaced by the one below.
            with _silent(logger), self._showing(memory):
                super().log(step, global_avg_loss, global_max_loss, grad_norm, metrics)
        if self.on_gpu:
            self.time_last_log = now  # the GPU has gone on meanwhile
        self.steps_since_last_log = 0
        self.recorder.record(state.load_LE, step)
        worst = int(state.ranks.peak.argmax())
        progress = Progress(
            step=step,
            total_steps=self.job_config.training.steps,
            loss=loss,
            grad_norm=grad_norm,
            tps=tps,
            memory_gib=state.ranks.peak[worst],
            memory_pct=100 * state.ranks.peak[worst] / state.ranks.capacity[worst],
            memory_name="memory" if self.on_gpu else "process memory",
            mfu=100 * self.num_flops_per_token * tps / self.gpu_peak_flops,
            maxvio=state.maxvio_L.max() if state.layer_ids else None,
            seconds_left=self.time_left.after(step, now),
            waiting_pct=waiting_pct,
        )
        logger.info(progress.line(self.color))
        self._add_to_totals(progress, state)
        if self.collapse is not None and state.layer_ids:
            line = self.collapse.look(step, state.layer_ids, state.maxvio_L)
            if line:
                logger.warning(line)

    @contextmanager
    def _showing(self, memory: titan.DeviceMemStats) -> Iterator[None]:
        """While open, TorchTitan's code finds these peaks, and does not reset those of the step under way."""
        monitor = self.device_memory_monitor
        shown: Any = SimpleNamespace(get_peak_stats=lambda: memory, reset_peak_stats=lambda: None)
        self.device_memory_monitor = shown
        try:
            yield
        finally:
            self.device_memory_monitor = monitor

    def _add_to_totals(self, progress: Progress, state: JobState) -> None:
        totals = self.totals
        totals.loss, totals.maxvio = progress.loss, progress.maxvio
        totals.tps.append(progress.tps)
        totals.peak_gib = max(totals.peak_gib, progress.memory_gib)
        totals.dead_experts = int((state.counts_LE == 0).sum())

    def _count_faults(self, state: JobState, loss: float, grad_norm: float) -> None:
        """Count a non-finite log step, and warn of optimizer steps that were skipped since the last one."""
        self.non_finite += not (math.isfinite(loss) and math.isfinite(grad_norm))
        if (skipped := int(state.ranks.skipped_steps.max())) > self.skipped_steps:
            logger.warning(
                f"{skipped - self.skipped_steps} optimizer steps were NOT TAKEN since the last log "
                "line: their gradient was not finite"
            )
            self.skipped_steps = skipped

    def _log_on_cpu(self, step: int, seconds: float, metrics: dict[str, float]) -> None:
        """Log these metrics with the times that TorchTitan's own `log` would add, and start the next interval."""
        tps = self._tokens_per_second(seconds)
        loading = sum(self.data_loading_times)
        times = {
            tags.TOKENS_PER_SECOND: tps,
            tags.TFLOPS: self.num_flops_per_token * tps / 1e12,
            tags.TIME_END_TO_END: seconds / self.job_config.metrics.log_freq,
            tags.DATA_LOADING_TIME: loading / max(1, len(self.data_loading_times)),
            tags.DATA_LOADING_PERCENT: 100 * loading / seconds,
        }
        self.logger.log({**times, **metrics}, step)
        self.data_loading_times.clear()
        self._restart_interval()

    def log_validation(self, loss: float, step: int, extra_metrics: dict[str, Any] | None = None) -> None:
        """Log one validation: its loss, throughput and memory.

        Args:
            loss: the mean over all tokens; -1 where this pipeline stage does not see it.
        """
        self.steps_since_last_log = 0
        self.data_loading_times.clear()  # of steps whose time is not of the interval that begins here
        self.totals.validation_loss = loss if loss >= 0 else None
        extra_metrics = {**self._validation_metrics(loss), **(extra_metrics or {})}
        memory = self.device_memory_monitor.get_peak_stats()
        tps = self._tokens_per_second(time.perf_counter() - self.time_last_log)
        c = self.color
        line = f"{c.yellow}validate step: {step:2}  {c.green}loss: {loss:7.4f}  "
        if loss >= 0:
            line += f"perplexity: {perplexity(loss)}  "
        if isinstance(memory, ProcessMemStats):
            of_memory = {f"{tags.VALIDATION}/{tag}": value for tag, value in memory.metrics().items()}
            losses = {tags.VALIDATION_LOSS: loss, tags.VALIDATION_TOKENS_PER_SECOND: tps}
            self.logger.log({**losses, **of_memory, **extra_metrics}, step)
            line += f"{c.turquoise}process memory: {memory.rss_gib:5.2f}GiB  "
            self._restart_interval()
        else:
            # Its line is replaced by the one below, which has the perplexity.
            with _silent(logger):
                super().log_validation(loss, step, extra_metrics)
            line += f"{c.turquoise}memory: {memory.max_reserved_gib:5.2f}GiB({memory.max_reserved_pct:.2f}%)  "
        logger.info(f"{line}{c.blue}tps: {round(tps):,}{c.reset}")

    @contextmanager
    def counting_validation(self) -> Iterator[None]:
        """While open, tokens per expert are counted in evaluation mode, for `log_validation`."""
        self.validation_counts = ValidationCounts(self._layers())
        try:
            yield
        finally:
            self.validation_counts.end()
            self.validation_counts = None

    def not_counting(self) -> AbstractContextManager[None]:
        """A context whose tokens are not counted in the validation that is open: for a batch of no tokens."""
        return self.validation_counts.unchanged() if self.validation_counts else nullcontext()

    def _validation_metrics(self, loss: float) -> dict[str, float]:
        metrics = {tags.VALIDATION_PERPLEXITY: math.exp(min(loss, 100.0))} if loss >= 0 else {}
        if self.validation_counts is None:
            return metrics
        device = torch.device("cuda" if self.on_gpu else "cpu")
        balancer = getattr(self.optimizers, "load_balancer", None)
        counts_LE = self.validation_counts.sum(balancer, *self._all_layers(), device)
        if counts_LE.size:
            maxvio_L = maxvio(counts_LE)
            self.totals.validation_maxvio = float(maxvio_L.max())
            metrics |= {
                tags.MAXVIO_GLOBAL_MEAN: float(maxvio_L.mean()),
                tags.MAXVIO_GLOBAL_MAX: float(maxvio_L.max()),
                tags.VALIDATION_DEAD_EXPERTS: float((counts_LE == 0).sum()),
            }
        return metrics

    def _all_layers(self) -> tuple[list[int], int]:
        """The MoE layers of all pipeline stages, as far as they are known, and their number of experts."""
        if self.model_args is not None:
            return self.model_args.moe_layer_ids, self.model_args.moe_args.num_experts
        layers = self._layers()
        return sorted(layers), next(iter(layers.values())).expert_bias.numel() if layers else 1

    def _layers(self) -> dict[int, BalancedMoE]:
        """This rank's MoE layers by their index in the model."""
        return {
            int(layer_id): module
            for part in self.model_parts or ()
            for layer_id, block in cast(torch.nn.ModuleDict, part.layers).items()
            for module in block.modules()
            if isinstance(module, BalancedMoE)
        }

    def _gather(
        self, memory: titan.DeviceMemStats | ProcessMemStats, loss: float | torch.Tensor
    ) -> Callable[[], JobState]:
        """The job's state over all ranks, by one reduction. Also starts a new record of the router entropy."""
        layers = self._layers()
        balancer = getattr(self.optimizers, "load_balancer", None)
        counted = {}
        if balancer is not None and balancer.counts_LE is not None:
            counts = {id(layer): counts_E for layer, counts_E in zip(balancer.layers, balancer.counts_LE, strict=True)}
            counted = {i: (layer, counts[id(layer)]) for i, layer in layers.items()}
        layer_ids, num_experts = self._all_layers()
        here = self._rank_state(memory, list(layers.values()), loss)
        device = torch.device("cuda" if self.on_gpu else "cpu")
        state = gather(counted, layer_ids, num_experts, here, device)
        self._restart_entropy()
        return state

    def _restart_entropy(self) -> None:
        if layers := self._layers():
            routers = [layer.router for layer in layers.values()]
            totals = [total for router in routers for total in (router.entropy_and_tokens, router.loss_sums)]
            torch._foreach_zero_(totals)  # pyright: ignore[reportPrivateImportUsage]  one launch for all layers

    def _rank_state(
        self, memory: titan.DeviceMemStats | ProcessMemStats, layers: list[BalancedMoE], loss: float | torch.Tensor
    ) -> RankState:
        if isinstance(memory, ProcessMemStats):
            in_use, peak, retries, ooms = memory.rss_gib, memory.peak_rss_gib, 0, 0
        else:
            in_use, peak = memory.max_active_gib, memory.max_reserved_gib
            retries, ooms = memory.num_alloc_retries, memory.num_ooms
        ours = [(e, layer.router.top_k) for layer in layers if isinstance(e := layer.experts, SavingExperts)]
        budgets = {budget for experts, _ in ours if (budget := experts.activation_budget) is not None}  # one or none
        guard = getattr(self.optimizers, "non_finite_guard", None)
        return RankState(
            in_use=in_use,
            peak=peak,
            capacity=self.device_memory_monitor.device_capacity_gib,
            alloc_retries=retries,
            ooms=ooms,
            kernel_compiles=compile_count(),
            experts_saved=sum(self._saved_gib(*of_layer, of_layer[0].save_percent) for of_layer in ours),
            experts_saved_at_100=sum(self._saved_gib(*of_layer, 100) for of_layer in ours),
            skipped_steps=0 if guard is None else guard.skipped_steps,
            experts_evicted=sum(budget.evicted_bytes for budget in budgets) / GIB,
            loss=loss,
        )

    def _saved_gib(self, experts: SavingExperts, top_k: int, save_percent: float) -> float:
        """GiB that the experts of a layer save of a rank's local batch for the backward, besides input and routing.

        Computed from shapes, as if all ranks had routed the same number of rows. Pipeline stages save what the
        microbatches under way need, which is at most this.
        """
        training, dims = self.job_config.training, self.parallel_dims
        tokens = training.local_batch_size * training.seq_len // dims.cp
        rows = num_saved_rows(tokens * top_k, save_percent)
        item = TORCH_DTYPE_MAP[training.mixed_precision_param].itemsize
        return rows * 2 * experts.hidden_dim // dims.tp * item / GIB

    def _state_metrics(self, state: JobState) -> dict[str, float]:
        ranks = state.ranks
        scalars = {
            tags.WORST_RANK_ACTIVE if self.on_gpu else tags.WORST_RANK_RSS: ranks.in_use.max(),
            tags.WORST_RANK_RESERVED if self.on_gpu else tags.WORST_RANK_PEAK_RSS: ranks.peak.max(),
            tags.WORST_RANK: ranks.peak.argmax(),
            tags.CAPACITY: ranks.capacity.min(),
            tags.ALLOC_RETRIES: ranks.alloc_retries.sum(),
            tags.OOMS: ranks.ooms.sum(),
            tags.NON_FINITE: self.non_finite,
            tags.SKIPPED_STEPS: ranks.skipped_steps.max(),
            tags.RESUMES: self.resumes,
            tags.KERNEL_COMPILES: ranks.kernel_compiles.max(),
        }
        if state.ours:
            scalars[tags.SAVE_PERCENT] = state.save_percent_L.mean()
            scalars[tags.EXPERTS_SAVED] = ranks.experts_saved.max()
            scalars[tags.EXPERTS_EVICTED] = ranks.experts_evicted.max()
        if state.counts_LE.size:
            maxvio_L, entropy_L = state.maxvio_L, state.entropy_L
            scalars |= {
                tags.MAXVIO_MEAN: maxvio_L.mean(),
                tags.MAXVIO_MAX: maxvio_L.max(),
                tags.DEAD_EXPERTS: (state.counts_LE == 0).sum(),
                tags.BIAS_MIN: state.bias_LE.min(),
                tags.BIAS_MAX: state.bias_LE.max(),
                # every token reaches all experts it chose: there is no capacity limit
                tags.DROPPED_TOKENS: 0,
                tags.ENTROPY_MEAN: entropy_L.mean(),
                tags.ENTROPY_MIN: entropy_L.min(),
                **{tags.maxvio_layer(i): maxvio for i, maxvio in zip(state.layer_ids, maxvio_L, strict=True)},
            }
            if (args := self.model_args) is not None and args.aux_loss_weight:
                scalars[tags.AUX_LOSS] = state.aux_loss_L.mean()
            if args is not None and args.router_z_loss_weight:
                scalars[tags.Z_LOSS] = state.z_loss_L.mean()
            if (ranks_of_experts := getattr(self.parallel_dims, "ep", 1)) > 1:
                scalars[tags.WORST_RANK_LOAD] = worst_rank_load(state.counts_LE, ranks_of_experts)
        return {tag: float(value) for tag, value in scalars.items()}

    def _count_resumes(self) -> int:
        if self.first_step == 1:
            return 0
        # One event file per start, this one's among them.
        config = self.job_config
        folder = Path(config.job.dump_folder, config.metrics.save_tb_folder)
        return max(1, len(list(folder.rglob(tags.EVENT_FILES))) - 1)

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
            "config": flat_config(config),
        }
        if state.ours:
            description["save_percent"] = state.save_percent_L.tolist()
            description["experts_kept_at_100_gib"] = state.ranks.experts_saved_at_100.max()
        if args is not None:
            description["backend"] = args.backend
            description["num_experts"] = args.moe_args.num_experts
            description["top_k"] = args.moe_args.top_k
        assert self.first_step is not None  # should_log has seen it
        layout = custom_scalars_layout(state.layer_ids, self.on_gpu, getattr(self.parallel_dims, "ep", 1))
        self.recorder.start(description, layout, self.first_step)

    def _tokens_per_second(self, seconds: float) -> float:
        """Tokens per second and device, as TorchTitan counts them."""
        return self.ntokens_since_last_log / (seconds * self.parallel_dims.non_data_parallel_size)

    def _restart_interval(self) -> None:
        self.ntokens_since_last_log = 0
        self.time_last_log = time.perf_counter()


def flat_config(config: JobConfig) -> dict[str, Any]:
    """The job's configuration by "section.field", as far as JSON can hold it."""
    flat = {}
    for section, fields in dataclasses.asdict(config).items():
        for name, value in fields.items():
            if isinstance(value, dict):
                flat |= {f"{section}.{name}.{key}": part for key, part in value.items()}
            else:
                flat[f"{section}.{name}"] = value
    return {name: value if _fits_json(value) else str(value) for name, value in flat.items()}


def _fits_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def balance_advice(args: MomoeLlamaArgs) -> str:
    """Advice for collapsed layers, given the settings of the model."""
    if not args.load_balance_rate:
        return "Balancing is off: set momoe.load_balance_rate above 0 (docs/balancing.md)"
    steps = ["lower optimizer.lr or lengthen lr_scheduler.warmup_steps"]
    if args.load_balance_rule != QUANTILE:
        rate = f"raise momoe.load_balance_rate (now {args.load_balance_rate:g})"
        steps = [f'set momoe.load_balance_rule = "{QUANTILE}" (now "{args.load_balance_rule}")', rate, *steps]
    return f"What helps, in this order: {'; '.join(steps)} (docs/balancing.md)"


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
    """While open, the logger drops what this thread gives to it."""
    thread = threading.get_ident()

    def is_from_another(record: logging.LogRecord) -> bool:
        return record.thread != thread

    log.addFilter(is_from_another)
    try:
        yield
    finally:
        log.removeFilter(is_from_another)
