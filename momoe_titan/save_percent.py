"""`save_percent`: what it may be, and how much of an MoE layer's z it keeps. Every other module asks here."""


def num_saved_rows(num_rows: int, save_percent: float) -> int:
    """S = floor(R * save_percent / 100), in integers so that it also traces for a symbolic R."""
    return num_rows * round(save_percent * 10**6) // 10**8


def validate_save_percent(value, field: str = "save_percent") -> float:
    """``value`` as a float if it is a number from 0 to 100; ValueError naming ``field`` otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 100:  # NaN neither
        raise ValueError(f"{field} must be a number from 0 to 100, got {value!r}")
    return float(value)
