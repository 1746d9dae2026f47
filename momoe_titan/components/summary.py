"""Writes the closing summary of a run: results, folders, and commands to continue with."""

import math
import os
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from statistics import median

from torchtitan.config import JobConfig

from momoe_titan.components.checkpoint import find_fault, saved_steps, step_folder
from momoe_titan.config.command_line import SECTION_OPTION, install_command, program
from momoe_titan.config.flavor import MODEL_NAME
from momoe_titan.dashboard.console import duration

MODEL_FIELDS = ("job.config_file", "job.custom_config_module", "experimental.", "model.", "momoe.", "training.seq_len")


@dataclass
class Totals:
    """Results of a run, collected from its log steps and validations.

    Attributes:
        tps: tokens per second and device, of each log step.
        peak_gib: highest memory of any rank.
        maxvio: in the last log step, of the worst layer; None without MoE layers.
        dead_experts: experts without a token in the last log step, over all layers.
        validation_maxvio: in the last validation, of the worst layer.
    """

    loss: float | None = None
    tps: list[float] = field(default_factory=list)
    peak_gib: float = 0.0
    memory_name: str = "memory"
    maxvio: float | None = None
    dead_experts: int = 0
    validation_loss: float | None = None
    validation_maxvio: float | None = None


def results(totals: Totals, step: int, seconds: float) -> list[str]:
    """The lines with the results of the run."""
    losses = [] if totals.loss is None else [f"loss {totals.loss:.4f}"]
    if totals.validation_loss is not None:
        losses.append(f"validation loss {totals.validation_loss:.4f} (perplexity {perplexity(totals.validation_loss)})")
    lines = [f"Trained to step {step} in {duration(seconds)}" + (f": {', '.join(losses)}" if losses else "")]
    if totals.tps:
        # The first log steps compile and warm up.
        speed = median(totals.tps[len(totals.tps) // 2 :])
        lines.append(f"{round(speed):,} tokens/s per device, peak {totals.memory_name} {totals.peak_gib:.2f} GiB")
    if totals.maxvio is not None:
        of_validation = (
            "" if totals.validation_maxvio is None else f", {totals.validation_maxvio:.2f} over the validation set"
        )
        lines.append(
            f"balance: MaxVio {totals.maxvio:.2f} in the last step{of_validation}; experts without a token: "
            f"{totals.dead_experts}"
        )
    return lines


def perplexity(loss: float) -> str:
    """exp(loss), as text."""
    return f"{math.exp(loss):,.1f}" if loss < 100 else "over 1e43"


def train_command(args: Sequence[str], *more: tuple[str, str]) -> str:
    """The command that this process, or its launcher, was started by.

    Args:
        args: the options of the job.
        more: further options as (option, value), which replace those of the same fields.
    """
    launcher = [program("python")]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
        launcher = [program("torchrun"), f"--nproc_per_node={ranks}"]
        world = int(os.environ["WORLD_SIZE"])
        if world > int(ranks):
            launcher.append(f"--nnodes={world // int(ranks)}")
    set_anew = {option.removeprefix("--") for option, _ in more}
    given = _joined(option for option in _options(args) if option[0] not in set_anew)
    # In the style in which the others are written: --option=value, or --option value.
    with_equals = any(part.startswith("--") and "=" in part for part in given)
    new = [part for option, value in more for part in ([f"{option}={value}"] if with_equals else [option, value])]
    return shlex.join([*launcher, "-m", "momoe_titan.train", *given, *new])


def resume_line(config: JobConfig, args: Sequence[str], step: int) -> str:
    """How to resume after a signal, or why the run cannot be resumed."""
    checkpoint = config.checkpoint
    if not checkpoint.enable or checkpoint.load_only:
        why = "checkpoint.load_only is true" if checkpoint.enable else "checkpoint.enable is false"
        return f"no checkpoint was kept ({why})"
    folder = step_folder(os.path.join(config.job.dump_folder, checkpoint.folder), step)
    return f"checkpoint {folder}; resume: {train_command(args)}"


def next_commands(config: JobConfig, args: Sequence[str]) -> list[str]:
    """The lines that say where things are and which commands go on from there."""
    checkpoint, folder = config.checkpoint, config.job.dump_folder
    checkpoints = os.path.join(folder, checkpoint.folder)
    steps = saved_steps(checkpoints) if checkpoint.enable else []
    lines = []
    if not steps:
        lines.append(f"{folder}: no checkpoint was kept (checkpoint.enable is false)")
    else:
        last = step_folder(checkpoints, max(steps))
        in_hf = os.path.isfile(os.path.join(last, "config.json"))
        fault = find_fault(last, checkpoint.exclude_from_loading, model_only=False)
        lines.append(f"{folder}: last checkpoint {last}" + (" (weights alone)" if fault else ""))
        if fault is None:
            twice = 2 * config.training.steps
            lines.append(f"  go on       {train_command(args, ('--training.steps', str(twice)))}")
            lines.append(f"              (up to step {twice:,}: training.steps doubled)")
        if config.model.name == MODEL_NAME:
            place, job = (last, []) if in_hf else (checkpoints, _of_model(args))
            lines.append(f"  sample      {_python('generate', place, *job, '--prompt', 'def main(')}")
            if not in_hf:
                out = os.path.join(folder, f"hf-step-{max(steps)}")  # a folder that no earlier export has filled
                lines.append(f"  export      {_python('export', place, out, *job)}")
                lines += _needs("hf", "safetensors")
    if config.metrics.enable_tensorboard:
        out = os.path.join(folder, "dashboard.html")
        lines.append(f"  dashboard   {_python('dashboard', folder, '-o', out)}")
        lines += _needs("dashboard", "plotly")
    return lines


def data_line(config: JobConfig) -> str:
    """What the job trains and validates on."""
    sources = [(each.dataset, each.path) for each in getattr(getattr(config, "momoe", None), "data", [])]
    sources = sources or [(config.training.dataset, config.training.dataset_path)]
    line = f"Training on {', '.join(_dataset(*source) for source in sources)}"
    if config.validation.enable:
        line += f"; validating on {_dataset(config.validation.dataset, config.validation.dataset_path)}"
    return line


def _dataset(name: str, path: str | list[str] | None) -> str:
    """The name of a dataset and where it is."""
    places = [path] if isinstance(path, str) else path or []
    return f"{name} ({', '.join(places)})" if any(places) else name


def _needs(extra: str, module: str) -> list[str]:
    """A line that says how to install what the command above needs, where it is missing."""
    return [] if find_spec(module) else [f"              (needs {install_command(extra)})"]


def _python(command: str, *options: str) -> str:
    return shlex.join([program("python"), "-m", f"momoe_titan.{command}", *options])


def _options(args: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each option with its field and all that belongs to it, but not what `momoe_titan.train` adds by itself."""
    options: list[tuple[str, list[str]]] = []
    for arg in args:
        if arg.startswith("--"):
            options.append((arg.partition("=")[0].removeprefix("--").replace("-", "_"), [arg]))
        elif options:
            options[-1][1].append(arg)
    return [(field_name, parts) for field_name, parts in options if parts != [SECTION_OPTION]]


def _joined(options: Iterable[tuple[str, list[str]]]) -> list[str]:
    return [part for _, parts in options for part in parts]


def _of_model(args: Sequence[str]) -> list[str]:
    """The options that say which model it is; how it was trained does not matter to a sample or an export."""
    return _joined(option for option in _options(args) if option[0].startswith(MODEL_FIELDS))
