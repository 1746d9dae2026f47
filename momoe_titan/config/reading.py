"""Reads a job's configuration, with clear messages for mistakes that TorchTitan reports badly or not at all."""

import dataclasses
import importlib
import os
import re
import tomllib
from collections.abc import Sequence
from typing import Any

from torchtitan.config import ConfigManager, JobConfig

from momoe_titan.config.command_line import missing_section_option, option_value
from momoe_titan.config.suggestions import did_you_mean

Fields = dict[str, Any]  # by name; of a section its own fields, of anything else None


def read_job(args: Sequence[str]) -> JobConfig:
    """The job that these options of `momoe_titan.train` describe, with the section [momoe].

    Raises:
        ValueError: a file that cannot be used; names the file, and the line or the field.
        SystemExit: an option that there is not, or with a wrong value; a message was printed. Also after --help.
    """
    args = [*args, *missing_section_option(args)]
    check_file(args)
    return ConfigManager().parse_args(args)


def check_file(args: Sequence[str]) -> None:
    """Refuse a configuration file that cannot be read, or that has fields which no job has.

    Args:
        args: the options of a job, of which one may name a file; with `missing_section_option`.

    Raises:
        ValueError: names the file, and the line or the field.
    """
    values: dict[str, Any] = {}
    if (path := option_value("job.config_file", args)) is not None:
        text = _read(path)
        try:
            values = tomllib.loads(text)
        except tomllib.TOMLDecodeError as e:  # says the line
            raise ValueError(f"job.config_file {path!r} is no TOML: {e}") from e
        _check_fields(path, text, values, _fields_of_a_job(args, values))
    assets = option_value("model.hf_assets_path", args) or values.get("model", {}).get("hf_assets_path", "")
    if str(assets).endswith("tokenizer.model"):
        raise ValueError(f"model.hf_assets_path is {assets!r}, must be a folder with a tokenizer.json")


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as f:
            return f.read()
    except FileNotFoundError as e:
        folder, name = os.path.split(path)
        files = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
        hint = did_you_mean(name, [file for file in files if file.endswith(".toml")])
        raise ValueError(f"job.config_file {path!r}: there is no such file{hint}") from e
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"job.config_file {path!r} cannot be read: {e}") from e


def _fields_of_a_job(args: Sequence[str], values: dict[str, Any]) -> Fields:
    job = values.get("job", {})
    module = option_value("job.custom_config_module", args) or (
        isinstance(job, dict) and job.get("custom_config_module")
    )
    known = _fields(JobConfig)
    if module:
        try:
            custom = importlib.import_module(module).JobConfig
        except (ModuleNotFoundError, AttributeError) as e:
            raise ValueError(f"job.custom_config_module {module!r}: {e}") from e
        for name, of_section in _fields(custom).items():
            known[name] = {**(known.get(name) or {}), **of_section} if of_section else of_section
    return known


def _fields(section: Any) -> Fields:
    return {f.name: _fields(f.type) if dataclasses.is_dataclass(f.type) else None for f in dataclasses.fields(section)}


def _check_fields(path: str, text: str, values: dict[str, Any], known: Fields, section: str = "") -> None:
    for name, value in values.items():
        place = f"{path}, line {_line(text, section, name)}"
        if name not in known:
            what = f"[{section}] has no field {name!r}" if section else f"there is no section [{name}]"
            elsewhere = [s for s, fields in known.items() if not section and fields and name in fields]
            hint = f"; {name} is a field of [{elsewhere[0]}]" if elsewhere else did_you_mean(name, known)
            raise ValueError(f"{place}: {what}{hint}")
        if (fields := known[name]) is None:
            continue
        full = f"{section}.{name}" if section else name
        if not isinstance(value, dict):
            raise ValueError(f"{place}: {full} is {value!r}, must be a section [{full}]")
        _check_fields(path, text, value, fields, full)


def _line(text: str, section: str, name: str) -> int:
    """The line of a field, or of the header of a section where `section` is empty; the last where it is not found."""
    full = f"{section}.{name}" if section else name
    header, inside = re.compile(r"\s*\[\s*([\w.\"-]+)\s*\]"), ""
    number = 0
    for number, line in enumerate(text.splitlines(), start=1):
        if found := header.match(line):
            inside = found[1]
            if inside == full or inside.startswith(f"{full}."):
                return number
        elif inside == section and re.match(rf"\s*[\"']?{re.escape(name)}[\"']?\s*[.=]", line):
            return number
    return number
