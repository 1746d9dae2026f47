"""The fields of `[momoe]`, each by itself."""

from typing import Any

from momoe_titan.config.checks.types import check_types


def check_section(section: Any) -> None:
    """Refuse a section `[momoe]` (a `config.section.Momoe`) one of whose fields cannot be used.

    `save_percent` has been read by `parse_save_percent`, which refuses what is wrong with it.

    Raises:
        ValueError: names the field, as written in TOML, its value, and what it must be.
    """
    check_types("momoe", section)
    infinity = float("inf")
    # Written so that NaN is refused too.
    for name, is_good, must in (
        (
            "memory_budget",
            0 < section.memory_budget < infinity,
            "above 0: up to 1 a share of a GPU's memory, above 1 GiB",
        ),
        ("load_balance_rate", 0 <= section.load_balance_rate < infinity, "a finite number of at least 0"),
        (
            "load_balance_off_layers",
            all(layer >= 0 for layer in section.load_balance_off_layers),
            "a list of layer indices from 0",
        ),
        ("vocab_size", section.vocab_size >= 0, "0 (the flavor's own) or a positive number of tokens"),
        ("data_text_field", section.data_text_field != "", "the name of a field"),
    ):
        if not is_good:
            raise ValueError(f"momoe.{name} is {getattr(section, name)!r}, must be {must}")
