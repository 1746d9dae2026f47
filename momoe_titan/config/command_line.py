"""The options of a job as they stand on its command line, before TorchTitan reads them."""

import tomllib
from collections.abc import Sequence

SECTION_OPTION = "--job.custom_config_module=momoe_titan.job_config"


def was_given(field: str, args: Sequence[str]) -> bool:
    """Whether `field` ("section.name") is set on the command line, or in the TOML file that the command line names."""
    section, name = field.split(".")
    options: dict[str, str] = {}
    for i, arg in enumerate(args):
        key, has_value, value = arg.partition("=")
        following = args[i + 1] if i + 1 < len(args) else ""
        options[key.replace("-", "_")] = value if has_value else following
    if f"__{field}" in options:
        return True
    try:
        with open(options["__job.config_file"], "rb") as f:
            return name in tomllib.load(f).get(section, {})
    except (KeyError, OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return False  # no file; TorchTitan says what is wrong with one that is named


def missing_section_option(args: Sequence[str]) -> list[str]:
    """What to add to these options so that TorchTitan knows the section [momoe]; nothing where they name a module."""
    return [] if was_given("job.custom_config_module", args) else [SECTION_OPTION]
