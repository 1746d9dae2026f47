"""Compares the settings of a resumed job with those it was started with: what has changed, and which value is used.

A checkpoint keeps the configuration of the job that wrote it, as JSON beside its tensors. Of settings that the states
of the optimizer and of the schedule hold too, the job's own values are put in place of the loaded ones.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchtitan.config import JobConfig
from torchtitan.tools.logging import logger

from momoe_titan.config.command_line import was_given

JOB_FILE = "job_config.json"  # in the folder of a checkpoint
BALANCE_RULE = "load_balance_rule"
RULE_WITHOUT_JOB_FILE = "sign"  # the default when checkpoints did not yet keep their configuration

# What holds of a setting that has changed, by the beginning of its name; the first that fits.
HOLDS = (
    ("optimizer.", "the job's, on the checkpoint's moments"),
    ("lr_scheduler.", "the job's: the rate is that of its schedule at this step"),
    ("training.steps", "the job's: the rate is that of its schedule at this step"),
    ("training.dataset", "the job's; the position is the checkpoint's, if it is one in this data"),
    ("training.dataloader", "the job's"),
    ("momoe.data", "the job's; the position is the checkpoint's, if it is one in this data"),
    ("training.seq_len", "the job's; the position in the data is the checkpoint's"),
    ("debug.seed", "neither: weights and position are the checkpoint's"),
    ("checkpoint.initial_load", "neither: the run has begun already"),
)


class Difference(NamedTuple):
    """A setting that the job has otherwise than the one that wrote the checkpoint."""

    field: str
    saved: Any
    now: Any
    holds: str


def save_job(folder: str, job_config: JobConfig) -> None:
    """Write the configuration into the folder of a checkpoint, which is made if it is missing."""
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, JOB_FILE), "w") as f:
        json.dump(dataclasses.asdict(job_config), f, indent=1, default=str)


def saved_job(folder: str) -> dict[str, Any] | None:
    """The configuration by section, as `save_job` wrote it; None where there is none that can be read."""
    try:
        with open(os.path.join(folder, JOB_FILE)) as f:
            saved = json.load(f)
    except (OSError, ValueError):
        return None
    return saved if isinstance(saved, dict) else None


def differences(saved: Mapping[str, Any], job_config: JobConfig) -> list[Difference]:
    """The fields, by name, that both configurations have with different values."""
    now = dict(_fields(json.loads(json.dumps(dataclasses.asdict(job_config), default=str))))
    return [
        Difference(field, value, now[field], what_holds(field))
        for field, value in sorted(_fields(saved))
        if field in now and now[field] != value
    ]


def what_holds(field: str) -> str:
    """Whose value of this field a resumed run takes."""
    return next((holds for name, holds in HOLDS if field.startswith(name)), "the job's")


def log_differences(folder: str, job_config: JobConfig) -> None:
    """Say once what has changed since the checkpoint in this folder was written."""
    saved = saved_job(folder)
    if saved is None:
        logger.warning(
            f"{folder} has no readable {JOB_FILE}, so that what has changed since cannot be listed. The job's own "
            "settings hold, also for the learning rate"
        )
    elif changed := differences(saved, job_config):
        lines = [f"  {field}: {old!r} -> {new!r}; holds: {holds}" for field, old, new, holds in changed]
        logger.warning(f"Settings that are not those of the checkpoint {folder}, {len(changed)}:\n" + "\n".join(lines))


def apply_job_settings(optimizers: Iterable[Optimizer], schedulers: Iterable[LambdaLR]) -> None:
    """Put the settings that these were built with in place of those that a checkpoint has brought.

    Loaded states hold the rate, the decay, the betas and the implementation of the run that wrote them, and nothing
    tells. Moments and the number of the step stay as they were loaded.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.update({**optimizer.defaults, "initial_lr": optimizer.defaults["lr"]})
            if group["fused"]:
                _place_steps(optimizer, group["params"])
    for scheduler in schedulers:
        groups = scheduler.optimizer.param_groups
        for group, factor in zip(groups, scheduler.lr_lambdas, strict=True):
            group["lr"] = group["initial_lr"] * factor(scheduler.last_epoch)
        rates = {"base_lrs": [group["initial_lr"] for group in groups], "_last_lr": [group["lr"] for group in groups]}
        scheduler.load_state_dict({**scheduler.state_dict(), **rates})


def keep_balance_rule(job_config: JobConfig, args: list[str], folder: str | None) -> None:
    """Let a resumed job keep its checkpoint's balancing rule, unless its TOML file or command line names one.

    Args:
        job_config: gets the rule.
        args: the options of the process.
        folder: the checkpoint that the job goes on from, or None.
    """
    section: Any = getattr(job_config, "momoe", None)
    if section is None or folder is None:
        return
    job = saved_job(folder)
    saved = RULE_WITHOUT_JOB_FILE if job is None else job.get("momoe", {}).get(BALANCE_RULE)
    now = getattr(section, BALANCE_RULE)
    if saved is None or saved == now:
        return
    field = f"momoe.{BALANCE_RULE}"
    if was_given(field, args):
        logger.warning(f"{field} is {now!r} from here on; the checkpoint {folder} was balanced by {saved!r}")
        return
    setattr(section, BALANCE_RULE, saved)
    logger.warning(
        f"{field} stays {saved!r}, as in the checkpoint {folder}; name {now!r} in the TOML file to change it"
    )


def _place_steps(optimizer: Optimizer, parameters: list[torch.nn.Parameter]) -> None:
    """A fused optimizer wants the number of the step on the device; others, which may have saved it, do not."""
    for parameter in parameters:
        state = optimizer.state.get(parameter, {})
        if isinstance(step := state.get("step"), torch.Tensor):
            state["step"] = step.to(parameter.device)


def _fields(sections: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in sections.items():
        if isinstance(value, dict):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
