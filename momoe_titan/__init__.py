"""Memory-optimised Mixture-of-Experts layers and a TorchTitan pretraining component built on them."""

import importlib
from typing import Any

__version__ = "0.1.0"
# pyright: reportUnsupportedDunderAll=false
# by __getattr__, which pyright does not ask
__all__ = ["MoE", "MoMoE", "TopKRouter", "__version__", "momoe_grouped_mlp", "momoe_mlp"]

_HOME = {
    "MoE": "moe.layers",
    "MoMoE": "moe.layers",
    "TopKRouter": "moe.layers",
    "momoe_grouped_mlp": "kernels",
    "momoe_mlp": "kernels",
}


def __getattr__(name: str) -> Any:
    # Imported on first use: most imports of the package need only one of its parts.
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
