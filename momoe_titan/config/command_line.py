"""Reads a few options of a job's command line before TorchTitan does, and writes commands for users to type."""

import os
import shlex
import shutil
import sys
import tomllib
from collections.abc import Sequence

SECTION_OPTION = "--job.custom_config_module=momoe_titan.job_config"
LOG_LEVELS = ("debug", "info", "warning", "error")


def option_value(field: str, args: Sequence[str]) -> str | None:
    """The value that the command line gives `field` ("section.name"), the last of several; None if it has none."""
    found = None
    for i, arg in enumerate(args):
        key, has_value, value = arg.partition("=")
        if key.replace("-", "_") == f"__{field}":
            found = value if has_value else args[i + 1] if i + 1 < len(args) else ""
    return found


def was_given(field: str, args: Sequence[str]) -> bool:
    """Whether `field` ("section.name") is set on the command line, or in the TOML file that the command line names."""
    if option_value(field, args) is not None:
        return True
    section, name = field.split(".")
    try:
        with open(option_value("job.config_file", args) or "", "rb") as f:
            return name in tomllib.load(f).get(section, {})
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return False  # no file; `reading.check_file` says what is wrong with one that is named


def take_log_level(args: list[str]) -> str:
    """Take --log_level and its value out of these options, which TorchTitan would refuse.

    Returns:
        The level; "info" where none is given.

    Raises:
        ValueError: no such level.
    """
    level = "info"
    for i, arg in enumerate(args):
        name, has_value, value = arg.partition("=")
        if name.replace("-", "_") != "__log_level":
            continue
        if not has_value:
            value = args[i + 1] if i + 1 < len(args) else ""
        del args[i : i + (1 if has_value else 2)]
        level = value.lower()
        break
    if level not in LOG_LEVELS:
        raise ValueError(f"--log_level is {level!r}, must be one of {', '.join(map(repr, LOG_LEVELS))}")
    return level


def missing_section_option(args: Sequence[str]) -> list[str]:
    """What to add to these options so that TorchTitan knows the section [momoe]; nothing where they name a module."""
    return [] if was_given("job.custom_config_module", args) else [SECTION_OPTION]


def program(name: str) -> str:
    """The command for a program of this Python's environment: its name alone if PATH leads to it, else its path."""
    beside = os.path.join(os.path.dirname(sys.executable), name)
    if shutil.which(name) == beside:
        return name
    here = os.path.relpath(beside)
    return beside if here.startswith("..") else here


def install_command(extra: str) -> str:
    """The command that adds an extra of this package to this Python's environment."""
    return shlex.join([program("python"), "-m", "pip", "install", f"momoe_titan[{extra}]"])
