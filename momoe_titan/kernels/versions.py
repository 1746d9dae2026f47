"""What differs between the releases of Triton that this package runs on, and which of them the Hopper kernels take.

    Triton                                   3.6, 3.7                       3.8                3.9
    copies by TMA, and by cp.async           async_copy_global_to_shared,   async_load,        async_load,
                                             async_copy_shared_to_global    async_store        async_store
    shared memory read in another shape      _reinterpret                   _reinterpret       reinterpret
    a part of a buffer in another shape      yes                            of an index only   of an index only
    a launcher in C for each signature       3.6 only                       no                 no

The last but one is a rule that the kernels keep: they read a whole buffer in another shape, and then take a part.
"""

# The names of releases that are not installed:
# pyright: reportAttributeAccessIssue=false

import functools
import logging
import os

import triton
from triton.backends.nvidia import driver
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, tma

logger = logging.getLogger(__name__)

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])

# The Hopper kernels are written in Gluon, which changes from release to release without a promise. They compile under
# 3.8 and 3.9 too; docs/get_started.md has a table of what ran where.
HOPPER_RELEASES = ((3, 6), (3, 7))
ANY_RELEASE = "MOMOE_TITAN_ANY_TRITON"  # environment variable: 1 has the Hopper kernels run under every release

# Gluon's functions by the names of Triton 3.9.
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
cp_async = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
_BUFFER = gl.shared_memory_descriptor
reinterpret = _BUFFER.reinterpret if hasattr(_BUFFER, "reinterpret") else _BUFFER._reinterpret

# Triton 3.6 compiles a function in C for each signature of a kernel; later releases have one for all.
signature_launcher = driver.CudaLauncher if hasattr(driver, "make_launcher") else None


def takes_hopper_kernels() -> bool:
    """Whether the Hopper kernels are used under this release of Triton."""
    return TRITON in HOPPER_RELEASES or os.environ.get(ANY_RELEASE) == "1"


def hopper_releases() -> str:
    """Those with Hopper kernels, in words."""
    return " and ".join(".".join(map(str, release)) for release in HOPPER_RELEASES)


@functools.cache
def warn_of_release() -> None:
    """Say once that this release has no Hopper kernels, for a GPU that could run them."""
    logger.warning(
        "momoe_titan: the Hopper kernels are not used under Triton %s, and the portable ones are slower. "
        "Releases with them: %s. %s=1 uses them here too, where they compile but were never run.",
        triton.__version__,
        hopper_releases(),
        ANY_RELEASE,
    )
