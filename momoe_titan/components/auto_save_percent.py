"""Runs `momoe.save_percent = "auto"`: plans the job in a separate process and passes the choice to the MoE layers."""

import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchtitan.config import JobConfig
from torchtitan.tools.logging import logger

from momoe_titan.memory.auto_save_percent import (
    FILE_NAME,
    AutoSavePercent,
    CudaMemory,
    _on_rank_0,
    _world_size,
)
from momoe_titan.memory.plan import PLAN_FAILED, MemoryPlan
from momoe_titan.model.experts import SavingExperts
from momoe_titan.save_percent import AUTO

# What the choice depends on; a stored one is taken where all of it is as it was.
_SECTIONS = ("model", "training", "parallelism", "activation_checkpoint", "compile", "optimizer")
_NOT_MEMORY = {"steps", "dataset", "dataset_path", "lr", "gc_freq", "max_norm", "dataloader", "hf_assets_path"}
_MOMOE_NOT_MEMORY = ("save_percent", "check_ids", "data", "load_balance_")  # how names in [momoe] begin


def set_up_auto_save_percent(model: nn.Module, job_config: JobConfig) -> None:
    """Choose the save_percent of this model's layers now; `model.auto_save_percent` is what
    corrects it later, for `build_momoe_optimizers`.

    Call it on every rank, before the model is compiled. Does nothing unless the job says "auto".
    Without a GPU, or where the plan cannot be made, all is 0.
    """
    layers = [module for module in model.modules() if isinstance(module, SavingExperts)]
    momoe = getattr(job_config, "momoe", None)
    if momoe is None or momoe.save_percent != AUTO or not layers:
        return
    if not torch.cuda.is_available():
        logger.info("save_percent = auto: 0, since there is no GPU whose memory would be planned")
        return
    plan = _on_rank_0(lambda: plan_in_child(job_config))
    if plan is None:
        return
    memory = CudaMemory()
    compiled = job_config.compile.enable
    if compiled:
        logger.info("save_percent = auto: not corrected by measurement, which would compile the model again")
    model.auto_save_percent = AutoSavePercent(  # pyright: ignore[reportArgumentType] - no part of the model
        layers,
        MemoryPlan.from_dict(plan),
        momoe.memory_budget,
        memory,
        Path(job_config.job.dump_folder) / FILE_NAME,
        {**job_fields(job_config), "gpu_bytes": memory.total(), "world_size": _world_size()},
        correct=not compiled,
    )


def job_fields(job_config: JobConfig) -> dict[str, Any]:
    """The fields of a job that its memory depends on. A stored choice is reused only if they are the same."""
    momoe = job_config.momoe  # pyright: ignore[reportAttributeAccessIssue] - of job.custom_config_module
    fields = {f"momoe.{name}": value for name, value in vars(momoe).items() if not name.startswith(_MOMOE_NOT_MEMORY)}
    for section in _SECTIONS:
        for name, value in dataclasses.asdict(getattr(job_config, section)).items():
            if name not in _NOT_MEMORY:
                fields[f"{section}.{name}"] = value
    return fields


def plan_in_child(job_config: JobConfig) -> dict | None:
    """The plan as `MemoryPlan.to_dict` has it, made in a process of its own that has no GPU; None,
    with a warning, where that fails.

    In this process TorchTitan knows the GPU, and the process group is in use.
    """
    values = dataclasses.asdict(job_config)
    values["job"]["custom_config_module"] = values["job"]["custom_config_module"] or "momoe_titan.job_config"
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    command = [sys.executable, "-m", "momoe_titan.plan", "--job_json", "--json"]
    command += ["--world_size", str(_world_size()), "--capability", f"{major}.{minor}"]
    logger.info("save_percent = auto: planning the memory of this job")
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.run(command, input=json.dumps(values), text=True, stdout=subprocess.PIPE, stderr=errors)
        if child.returncode == 0:
            return json.loads(child.stdout)["plan"]
        errors.seek(0)
        said = errors.read().strip()
    _, named, reason = said.rpartition(PLAN_FAILED)
    if not named:  # killed, or not even started
        reason = "".join(said.splitlines()[-1:]) or f"the plan's process ended with exit status {child.returncode}"
    logger.warning(f"save_percent = auto: 0, since the memory could not be planned: {' '.join(reason.split())}")
    return None
