"""Finds the model arguments that a job's `model.name` and `model.flavor` select."""

import copy
import importlib
from typing import Any

from torchtitan.config import JobConfig
from torchtitan.protocols.train_spec import get_train_spec

from momoe_titan.config.suggestions import did_you_mean

MODEL_NAME = "momoe_llama"  # `model.name` of a job with this package's own model


def import_custom_module(job_config: JobConfig) -> None:
    """Import `experimental.custom_import`, which makes models and flavors known to TorchTitan.

    Raises:
        ValueError: there is no such module, or a module that it imports is missing.
    """
    module = job_config.experimental.custom_import
    if module:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as e:
            raise ValueError(f"experimental.custom_import {module!r}: {e}") from e


def flavor_args(job_config: JobConfig) -> Any:
    """A copy of the model arguments that `model.flavor` names, before they take the job's settings.

    Raises:
        ValueError: `model.name` or `model.flavor` is not known.
    """
    try:
        spec = get_train_spec(job_config.model.name)
    except ValueError as e:
        raise ValueError(f"model.name {job_config.model.name!r}: {e}{_how_to_register(job_config.model.name)}") from e
    if (flavor := job_config.model.flavor) not in spec.model_args:
        names = ", ".join(map(repr, spec.model_args))
        raise ValueError(f"model.flavor {flavor!r} is none of {names}{did_you_mean(flavor, spec.model_args)}")
    return copy.deepcopy(spec.model_args[job_config.model.flavor])


def _how_to_register(name: str) -> str:
    if name == MODEL_NAME:
        return '; set experimental.custom_import to "momoe_titan.register"'
    return did_you_mean(name, [MODEL_NAME])


def configured_args(job_config: JobConfig) -> Any:
    """The arguments that `model.flavor` names with the settings of a job that has been checked.

    Raises:
        ValueError: `model.name` or `model.flavor` is not known.
    """
    args = flavor_args(job_config)
    take_settings = getattr(args, "take_settings", args.update_from_config)  # another model's has one method for all
    take_settings(job_config)
    return args
