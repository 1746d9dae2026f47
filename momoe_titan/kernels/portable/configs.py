"""Tile sizes of the portable GEMMs: a hand-picked table per kind of GPU, and an opt-in cache of tuned ones on disk."""

import functools
import json
import os
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton

from momoe_titan.kernels import gpu

KERNELS = ("up_proj", "down_proj", "down_proj_backward", "up_proj_backward", "weight_grad")


@dataclass(frozen=True)
class TileConfig:
    """Tile of one GEMM: block_m x block_n outputs (block_n of each half in up_proj), block_k of the inner dimension."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def options(self, dtype: torch.dtype) -> dict:
        """Compile-time arguments of a kernel with this tile, for operands of ``dtype``."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            # float32 products are exact, not tf32: whoever chooses float32 wants its precision
            "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
            "UPCAST": gpu.interpreting() and dtype == torch.bfloat16,
        }


ROW_TILE = 128  # block_m of the row-tiled 16-bit kernels, which share one list of row tiles

_TABLE: dict[str, dict[str, TileConfig]] = {
    "interpreter": dict.fromkeys(KERNELS, TileConfig(16, 32, 32, 1, 1)),
    "float32": dict.fromkeys(KERNELS, TileConfig(64, 32, 32, 8, 2)),
    "sm80": {  # also every GPU without a row of its own, and odd widths: 99 KiB of shared memory suffice
        "up_proj": TileConfig(128, 64, 32, 8, 3),
        "down_proj": TileConfig(128, 128, 32, 8, 3),
        "down_proj_backward": TileConfig(128, 64, 32, 8, 3),
        "up_proj_backward": TileConfig(128, 128, 32, 8, 3),
        "weight_grad": TileConfig(128, 128, 32, 8, 3),
    },
    "sm90": {
        "up_proj": TileConfig(128, 128, 64, 8, 4),
        "down_proj": TileConfig(128, 256, 64, 8, 3),
        "down_proj_backward": TileConfig(128, 128, 64, 8, 4),
        "up_proj_backward": TileConfig(128, 256, 64, 8, 3),
        "weight_grad": TileConfig(128, 256, 64, 8, 3),
    },
}


def tile_configs(x: torch.Tensor, ffn: int) -> dict[str, TileConfig]:
    """The tile of each GEMM for activations like ``x`` (.., D) and experts of hidden width ``ffn``.

    Depends on the device, the dtype, D and F, never on a token count.
    """
    if gpu.interpreting():
        return _TABLE["interpreter"]
    capability, name = gpu.device_properties(x.device)
    if x.dtype == torch.float32:
        return _TABLE["float32"]
    # masks and unaligned loads take registers: large tiles would spill
    kind = "sm90" if capability[0] == 9 and x.shape[-1] % 64 == 0 and ffn % 64 == 0 else "sm80"
    return _tuned(name).get(cache_key(x.dtype, x.shape[-1], ffn), _TABLE[kind])


def cache_key(dtype: torch.dtype, d_model: int, ffn: int) -> str:
    """Name of a shape bucket in the cache of tuned tiles."""
    return f"{str(dtype).removeprefix('torch.')}-D{d_model}-F{ffn}"


def cache_path(device_name: str) -> Path:
    """File of tuned tiles for a GPU: under MOMOE_TITAN_CACHE, by default ``~/.cache/momoe_titan``."""
    root = os.environ.get("MOMOE_TITAN_CACHE") or Path.home() / ".cache" / "momoe_titan"
    return Path(root) / f"tiles-{device_name.replace(' ', '-')}-triton{triton.__version__}.json"


@functools.cache
def _tuned(device_name: str) -> dict[str, dict[str, TileConfig]]:
    """Tuned tiles by shape bucket. A cache that can't be read or understood is left alone, with one warning."""
    path = cache_path(device_name)
    try:
        entries = json.loads(path.read_text())
        tuned: dict[str, dict[str, TileConfig]] = {}
        for key, kernels in entries.items():
            configs = {kernel: TileConfig(**kernels[kernel]) for kernel in KERNELS}
            if {configs[k].block_m for k in KERNELS if k != "weight_grad"} != {ROW_TILE}:
                raise ValueError(f"{key}: block_m of the row-tiled kernels must be {ROW_TILE}")
            tuned[key] = configs
        return tuned
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        warnings.warn(f"tile cache {path} is not usable ({error}); using the built-in tiles", stacklevel=2)
        return {}


def save_tuned(device_name: str, key: str, configs: dict[str, TileConfig]) -> bool:
    """Add one shape bucket to the cache on disk; False, with a warning, where that can't be written."""
    path = cache_path(device_name)
    merged = {k: {n: asdict(c) for n, c in v.items()} for k, v in _tuned(device_name).items()}
    merged[key] = {name: asdict(config) for name, config in configs.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}.tmp")
        scratch.write_text(json.dumps(merged, indent=1))
        scratch.replace(path)
    except OSError as error:
        warnings.warn(
            f"tile cache {path} can't be written ({error}); the tuned tiles last for this process", stacklevel=2
        )
        return False
    finally:
        _tuned.cache_clear()
    return True
