"""Counts the Triton kernels that this process has compiled; the count must stop growing early in training.

What may add kernels later: the first forward without gradients where save_percent is above 0, the first one that saves
no z, and without gradients the first of at most 16 tokens, or of more.
"""

import threading

_lock = threading.Lock()
_compiles = 0
_cache_loads = 0
_installed = None


def install() -> bool:
    """Start counting (idempotent). A listener that is already there is still called.

    Returns:
        False where Triton is missing or too old to tell (before 3.4); the counts then stay 0.
    """
    global _installed
    try:
        from triton import knobs
    except ImportError:
        return False
    compilation = getattr(knobs, "compilation", None)
    if compilation is None or not hasattr(compilation, "listener"):
        return False
    with _lock:
        if _installed is not None:
            return True
        before = compilation.listener

        def listener(*args, **kwargs):
            global _compiles, _cache_loads
            with _lock:
                if kwargs.get("cache_hit"):
                    _cache_loads += 1
                else:
                    _compiles += 1
            if before is not None:
                before(*args, **kwargs)

        compilation.listener = _installed = listener
    return True


def compile_count() -> int:
    """Kernels compiled since the first call of `install` or of this function.

    Every new combination of constants, dtypes and alignments counts once; a kernel found in
    Triton's cache on disk does not (see `cache_load_count`).
    """
    install()
    return _compiles


def cache_load_count() -> int:
    """Kernels loaded from Triton's cache on disk since counting began.

    The sum of both counts tells, with a warm cache too, whether a new token count asked for a
    new kernel.
    """
    install()
    return _cache_loads
