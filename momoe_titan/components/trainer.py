"""Runs a training job, from reading its configuration to its last checkpoint, with TorchTitan's trainer."""

import contextlib
import dataclasses
import functools
import os
import signal
import sys
import textwrap
import time
import warnings
from collections.abc import Callable
from typing import Any, NoReturn
from unittest import mock

import torch
from torchtitan import train as titan
from torchtitan.config import JobConfig
from torchtitan.tools.logging import logger

from momoe_titan.components.batches import BatchesToDevice
from momoe_titan.components.checkpoint import CheckpointError, CheckpointManager, SaveError, resumed_checkpoint
from momoe_titan.components.compile_ahead import compile_kernels_ahead
from momoe_titan.components.console_log import ConsoleFilter, quiet_before_start, set_up_console
from momoe_titan.components.cuda_graph import StepFromGraph
from momoe_titan.components.hugging_face import check_hf_weights, keep_published_routing
from momoe_titan.components.loss import LossInModel
from momoe_titan.components.pipeline_step import PipelineStep
from momoe_titan.components.resumed_settings import keep_balance_rule
from momoe_titan.components.stopping import SIGNALS, StoppedError, StopRequest
from momoe_titan.components.summary import Totals, data_line, next_commands, results, resume_line
from momoe_titan.components.training_step import TrainingStep
from momoe_titan.config.checks.fields import check_fields
from momoe_titan.config.checks.folders_and_data import check_cpu, check_datasets, check_folders, check_tokenizer
from momoe_titan.config.checks.job import check_job
from momoe_titan.config.command_line import was_given
from momoe_titan.config.flavor import MODEL_NAME, configured_args
from momoe_titan.config.reading import check_file
from momoe_titan.data.errors import DataError
from momoe_titan.data.tokenizer import build_tokenizer, resolve_assets_path
from momoe_titan.model.hugging_face.config import saved_dtype, write_hf_config

Sampler = Callable[[Any, Any], str]
OTHER_RANKS_WAIT = 10.0  # seconds; torchrun ends the other processes as soon as one has failed


def prepare_cpu_job(config: JobConfig, args: list[str]) -> None:
    """Adapt a configuration to the CPU, in place.

    Mixed precision becomes float32 unless `training.mixed_precision_param` was
    given: bfloat16 saves no memory worth having there and is slower.

    Raises:
        ValueError: the job asks for something that only a GPU has.
    """
    check_cpu(config)
    if not was_given("training.mixed_precision_param", args):
        config.training.mixed_precision_param = "float32"
    threads = torch.get_num_threads()
    logger.info(
        f"No GPU: training on the CPU with {threads} thread{'s' if threads > 1 else ''} per process, "
        f"{config.training.mixed_precision_param} arithmetic"
    )
    # Every process of the job is on the one device "cpu:0".
    os.environ["LOCAL_RANK"] = "0"
    # TorchTitan turns autocast on with float32 too, which is the same as off.
    warnings.filterwarnings("ignore", "In CPU autocast, but the target dtype")


def check_config(config: JobConfig) -> None:
    """Refuse a job that would fail later, before anything is built.

    Also resolves `model.hf_assets_path` where it names a folder of this package.

    Raises:
        ValueError: names the field and its value.
    """
    config.model.hf_assets_path = resolve_assets_path(config.model.hf_assets_path)
    model_args = check_job(config)
    check_folders(config)
    check_hf_weights(config, model_args)
    num_ids = build_tokenizer(config).num_ids
    check_tokenizer(config, num_ids, getattr(model_args, "vocab_size", num_ids))
    check_datasets(config)


def complete_hf_folder(config: JobConfig) -> None:
    """Give the last checkpoint, if it was saved in Hugging Face's format, the config.json and the
    tokenizer that transformers needs; TorchTitan writes the weights alone.

    A run that was at its end before has saved nothing: its last checkpoint stays what it is, and a
    warning says so.
    """
    checkpoint = config.checkpoint
    if not (checkpoint.enable and checkpoint.last_save_in_hf and config.model.name == MODEL_NAME):
        return
    folder = os.path.join(config.job.dump_folder, checkpoint.folder, f"step-{config.training.steps}")
    if os.environ["RANK"] == "0" and os.path.isdir(folder):
        if not any(name.endswith(".safetensors") for name in os.listdir(folder)):
            logger.warning(
                f"checkpoint.last_save_in_hf is true, but {folder!r} is of an earlier run and not in "
                "Hugging Face's format: this run saved nothing. python -m momoe_titan.export converts it"
            )
            return
        write_hf_config(folder, configured_args(config), config.model.hf_assets_path, saved_dtype(folder))


@dataclasses.dataclass
class Run:
    """One run, seen from outside of its trainer.

    Attributes:
        args: the options of the process.
        shown: what is filtered out of the console.
        stop: takes the signals.
        sample: see `train`.
        config: the job's, once it was accepted.
        stopped_by: the signal that ended training between two steps, or 0.
        has_trained: whether a step was left to train.
        lines: what is to be said at the end.
    """

    args: list[str]
    shown: ConsoleFilter
    stop: StopRequest
    sample: Sampler | None = None
    config: JobConfig | None = None
    stopped_by: int = 0
    has_trained: bool = False
    lines: list[str] = dataclasses.field(default_factory=list)


class Trainer(BatchesToDevice, TrainingStep, StepFromGraph, PipelineStep, LossInModel, titan.Trainer):
    """TorchTitan's, for a job that has been checked. Stops between two steps, and says at its end what came out."""

    checkpointer: CheckpointManager

    def __init__(self, run: Run, job_config: JobConfig):
        self.run = run
        set_up_console(run.shown)
        if not torch.cuda.is_available():
            prepare_cpu_job(job_config, run.args)
        check_fields(job_config)
        keep_balance_rule(job_config, run.args, resumed_checkpoint(job_config))
        keep_published_routing(job_config, run.args)
        check_config(job_config)
        logger.info(data_line(job_config))
        compile_kernels_ahead(job_config)
        run.config = job_config
        super().__init__(job_config)
        self.set_up_precision()
        self.set_up_cuda_graphs()
        self.checkpointer.before_save = self.finish_log

    def train(self) -> None:
        """Train to the last step, or to the one after which a signal was heard."""
        run = self.run
        begin = time.monotonic()
        run.stop.in_training = True
        try:
            super().train()
        except BaseException:
            if torch.distributed.get_world_size() == 1:  # the wait for others might not end
                with contextlib.suppress(Exception):  # of a broken device: what ended training is to be heard
                    self.finish_log()
            raise
        self.finish_log()
        if run.stopped_by:
            name = signal.Signals(run.stopped_by).name
            run.lines = [f"{name}: stopped after step {self.step}; {resume_line(self.job_config, run.args, self.step)}"]
        elif run.has_trained:
            totals = getattr(self.metrics_processor, "totals", Totals())
            run.lines = results(totals, self.step, time.monotonic() - begin) + self._sampled()

    def finish_log(self) -> None:
        """Log the last step now, before what does not belong to its time: a save, or the end of training."""
        finish = getattr(self.metrics_processor, "finish_log", None)  # TorchTitan's own has logged all
        if finish is not None:
            finish()

    def should_continue_training(self) -> bool:
        """Whether another step is to be trained; TorchTitan asks before each.

        Raises:
            CheckpointError: the checkpoint is of a later step than the last one.
        """
        run, steps = self.run, self.job_config.training.steps
        if self.step >= steps:
            if not run.has_trained:
                self._nothing_to_train()
            self.finish_log()  # TorchTitan sleeps now
            return False
        if run.has_trained and (signum := run.stop.agree()):
            run.stopped_by = signum
            self.finish_log()
            self.checkpointer.save_now(self.step)
            return False
        run.has_trained = True
        return True

    def _nothing_to_train(self) -> None:
        step, steps = self.step, self.job_config.training.steps
        advice = f"set training.steps above {step} to go on, or another job.dump_folder to start anew"
        if step > steps:
            raise CheckpointError(f"training.steps is {steps}, but the checkpoint is of step {step}; {advice}")
        logger.warning(f"NOTHING TO TRAIN: the checkpoint is of step {step}, the last of training.steps; {advice}")

    def _sampled(self) -> list[str]:
        """A text by the model, where someone watches and one process has the whole model."""
        run, config = self.run, self.job_config
        is_plain = config.model.name == MODEL_NAME and not config.compile.enable
        if run.sample is None or not is_plain or os.environ["WORLD_SIZE"] != "1" or not sys.stdout.isatty():
            return []
        with self.maybe_enable_amp:
            text = run.sample(self.model_parts[0], self.tokenizer)
        return ["a text by this model:", textwrap.indent(text.strip("\n"), "  | ", lambda line: True)]


def train(args: list[str], log_level: str = "info", sample: Sampler | None = None) -> int:
    """Read the configuration, check it, train. Ends the process with status 2 where the configuration is unusable.

    Args:
        args: Those of the process, which TorchTitan reads by itself.
        log_level: a key of `console_log.LEVELS`.
        sample: gives a text by a model and its tokenizer, for the end of a run that someone watches.

    Returns:
        The exit status: 0 after the last step, 1 where a checkpoint could not be written, 128 and the number of the
        signal that stopped the run.
    """
    shown = quiet_before_start(log_level)
    try:
        with StopRequest() as stop:
            return _train(Run(args, shown, stop, sample))
    except StoppedError as e:
        _say(f"{e}: ended at once, in the middle of what it did; nothing of that was saved")
        return 128 + e.signum
    finally:
        logger.removeFilter(shown)


def _train(run: Run) -> int:
    build: Any = functools.partial(Trainer, run)  # TorchTitan calls it as it would call a class
    try:
        check_file(run.args)
        # TorchTitan's train spec names no checkpoint manager: the trainer takes the one of its module.
        with mock.patch.object(titan, "CheckpointManager", CheckpointManager):
            titan.main(build)
        if run.config is not None and not run.stopped_by:
            complete_hf_folder(run.config)
            run.lines += next_commands(run.config, run.args) if run.has_trained else []
    except SaveError as e:
        _fail(str(e), 1)
    except (ValueError, OSError) as e:  # OSError: the configuration file itself
        if run.config is not None and not isinstance(e, (DataError, CheckpointError)):
            raise
        # The message says which field to change; a traceback would bury it.
        _fail(f"error: {e}", 2)
    for line in run.lines:
        _say(line)
    return 128 + run.stopped_by if run.stopped_by else 0


def _say(line: str) -> None:
    """Print a line once, however many ranks there are."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


def _fail(message: str, status: int) -> NoReturn:
    """End the process. Of several ranks with the same message, the first is to be heard."""
    if os.environ.get("RANK", "0") != "0":
        # Its launcher ends this process meanwhile, if the first rank has failed too.
        for signum in SIGNALS:
            signal.signal(signum, signal.SIG_DFL)
        time.sleep(OTHER_RANKS_WAIT)
        message = f"rank {os.environ['RANK']}: {message}"
    print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr, flush=True)
    sys.exit(status)
