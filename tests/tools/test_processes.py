"""The processes that run the tests."""

import os
from pathlib import Path

import pytest
import torch

from tests.support.preloaded_workers import imports_of_tests


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="one process runs the tests")
@pytest.mark.skipif(torch.cuda.is_available(), reason="each process has a GPU of its own to initialise")
def test_they_are_forks_of_one_that_has_imported_for_all():
    assert b"preloaded_workers" in Path(f"/proc/{os.getppid()}/cmdline").read_bytes()


def test_what_is_imported_for_all_is_what_the_tests_need():
    found = imports_of_tests()
    assert {"torch", "hypothesis", "numpy", "momoe_titan.config.command_line"} <= {*found}
    assert not any(name.partition(".")[0] in ("tests", "pytest") for name in found)
