"""Which values `save_percent` may have, and how many rows of pre-activations each saves in an MoE layer."""

from typing import Any, Literal

AUTO: Literal["auto"] = "auto"  # as much as fits into the memory that the job names


def num_saved_rows(num_rows: int, save_percent: float) -> int:
    """S = floor(R * save_percent / 100), in integers so that it also traces for a symbolic R."""
    return num_rows * round(save_percent * 10**6) // 10**8


def validate_save_percent(value: Any, field: str = "save_percent") -> float:
    """``value`` as a float if it is a number from 0 to 100; ValueError naming ``field`` otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 100:  # NaN neither
        raise ValueError(f"{field} must be a number from 0 to 100, got {value!r}")
    return float(value)


def parse_save_percent(value: Any, field: str = "save_percent") -> list[float] | Literal["auto"]:
    """What a user writes: "auto", one number, or a list with one number for all MoE layers or one per MoE layer.

    Returns:
        "auto", or the list of numbers.

    Raises:
        ValueError: names the field and its value.
    """
    if value == AUTO:
        return AUTO
    if not isinstance(value, (list, tuple)):
        return [validate_save_percent(value, field)]
    if not value:
        raise ValueError(f"{field} must be a number or a list with one number per MoE layer, got []")
    return [validate_save_percent(percent, f"{field}[{i}]") for i, percent in enumerate(value)]


def check_num_layers(percents: list[float], num_layers: int, field: str = "save_percent") -> None:
    """Refuse a list that has neither one number nor one per MoE layer.

    Raises:
        ValueError: names the field and how many numbers it has.
    """
    if len(percents) not in (1, num_layers):
        raise ValueError(f"{field} has {len(percents)} numbers, must have 1 or one per MoE layer, {num_layers}")
