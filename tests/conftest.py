"""In which processes tests run, and what they begin with."""

from pathlib import Path

import pytest

from tests.support import preloaded_workers

# What takes longest begins first: of several processes none is left at the end with a minute's work alone.
FIRST = (
    *("test_finds_nothing[basedpyright]", "test_parallel.py", "test_expert_parallel.py", "test_kills.py"),
    *("test_two_processes_learn", "test_ctrl_c_under_torchrun", "kernels/test_fuzz.py", "test_compile_ahead.py"),
    *("within_limits", "test_growth_foresees", "test_agents.py", "test_inductor_copies_nothing"),
    *("test_where_nothing_fits", "test_ctrl_c_before", "test_launch.py", "test_command_line_and_shards"),
    *("test_transformers_continues", "test_fsdp.py", "test_same_seed_same_losses", "test_other_layouts"),
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: next((i for i, name in enumerate(FIRST) if name in item.nodeid), len(FIRST)))


def pytest_configure(config):
    """What tests share is imported where they run, which is not the process that only hands them out."""
    if config.getoption("dist", "no") == "no":
        from tests.support import every_test

        config.pluginmanager.register(every_test)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config, specs):
    """Where there is no GPU, test processes are forks of one that has imported torch and the tests."""
    if not any(any(Path("/dev").glob(name)) for name in ("nvidia[0-9]*", "dxg")):  # dxg: under Windows
        python = preloaded_workers.start(config.args, config.invocation_params.dir)
        specs[:] = [type(spec)(f"{spec}//python={python}") for spec in specs]
