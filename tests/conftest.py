"""Where tests run: on the GPU if there is one; Triton kernels through the interpreter otherwise."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this when a kernel is defined, so it must be set before the package is imported
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def freed_gpu_memory():
    """What a test's process keeps in PyTorch's cache, tests in other processes can't have."""
    yield
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
