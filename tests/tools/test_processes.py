"""The processes that run the tests."""

import os
from pathlib import Path

import pytest
import torch

IMPORTED_BY = os.getpid()

pytestmark = [
    pytest.mark.skipif("'PYTEST_XDIST_WORKER' not in os.environ", reason="one process runs the tests"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="each process has a GPU of its own to initialise"),
]


def test_they_are_forks_of_one_that_has_imported_for_all():
    assert b"preloaded_workers" in Path(f"/proc/{os.getppid()}/cmdline").read_bytes()


def test_it_has_imported_the_tests_too():
    assert os.getppid() == IMPORTED_BY
