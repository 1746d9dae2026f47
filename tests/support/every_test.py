"""What all tests share: they run on the GPU if there is one, and Triton kernels through the interpreter otherwise."""

import os
import random
import zlib

import numpy as np
import pytest
import torch

from tests.support.command_lines import read_sources_once

read_sources_once()
if not torch.cuda.is_available():
    # Triton reads this when a kernel is defined, so it must be set before the package is imported
    os.environ["TRITON_INTERPRET"] = "1"
    from tests.support.interpreter import without_repeated_work

    without_repeated_work()


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def seed_everything(name: str) -> None:
    seed = zlib.crc32(name.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef):
    """A fixture draws the same random numbers whichever test needs it first."""
    if fixturedef.argname != "request":
        seed_everything(fixturedef.argname)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    """A test draws the same random numbers whichever tests have run before it, and in whichever process."""
    seed_everything(item.name)


@pytest.fixture(autouse=True)
def z_is_gone_after_its_last_use(monkeypatch):
    """NaN takes the place of z where dz may: the torch backend, which leaves z alone, shows so who reads it again."""
    from momoe_titan.kernels import op as autograd

    over_z = []
    is_last_use, torch_backward = autograd._is_last_use, autograd.torch_backward

    def backward(dout, x, experts, scores, z, routing):
        grads = torch_backward(dout, x, experts, scores, z, routing)
        if over_z and over_z.pop():
            with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(z):
                z.fill_(float("nan"))
        return grads

    monkeypatch.setattr(autograd, "_is_last_use", lambda *args: over_z.append(is_last_use(*args)) or over_z[-1])
    monkeypatch.setattr(autograd, "torch_backward", backward)


@pytest.fixture(scope="module")
def hopper_kernels_under_any_release():
    """Plans of a Hopper GPU are of its own kernels, also under a release of Triton that has the portable ones run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOMOE_TITAN_ANY_TRITON", "1")
        yield


@pytest.fixture(autouse=True)
def freed_gpu_memory():
    """What a test's process keeps in PyTorch's cache, tests in other processes can't have."""
    yield
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True, scope="session")
def forks_can_run_backwards():
    """PyTorch 2.15 for CUDA starts a thread for a GPU, also where there is none, if a process runs its first backward
    on fake tensors; none of its forks could then run one."""
    if not torch.cuda.is_available():
        torch.ones((), requires_grad=True).backward()


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Threads only get in each other's way on tensors as small as those of the tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
