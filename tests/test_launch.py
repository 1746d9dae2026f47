"""The launch on several machines that docs/parallelism.md shows, as agents of torchrun on this one."""

import re
from pathlib import Path

import pytest

from tests.support import commands
from tests.test_train import SMALL, losses

PAGE = Path(__file__).parents[1] / "docs/parallelism.md"


def on_the_page() -> list[str]:
    """The command for all nodes, without `torchrun`."""
    (command,) = re.findall(r"\ntorchrun (--nnodes \d+ (?:.|\\\n)*?)\n(?!    )", PAGE.read_text())
    return command.replace("\\\n", " ").split()


def on_this_machine(command: list[str], port: int, *changes: tuple[str, str]) -> list[str]:
    """The page's command for two agents of one process, which meet at a port, with other changes to its text."""
    line = " ".join(command)
    nodes = ("--nnodes 4 --nproc_per_node 8", "--nnodes 2 --nproc_per_node 1")
    for old, new in (nodes, ("HOST:29500", f"localhost:{port}"), *changes):
        assert old in line
        line = line.replace(old, new)
    return line.split()


@pytest.mark.slow
def test_two_agents_train_one_job(tmp_path):
    changes = ("7b.toml", "debug_model.toml"), ("expert_parallel_degree 8", "expert_parallel_degree 2")
    command = on_this_machine(on_the_page(), commands.free_port(), *changes)
    job = [*SMALL, "--training.steps=3", "--training.local_batch_size=2", f"--job.dump_folder={tmp_path}"]
    done = commands.run("-m", "tests.support.agents", "2", *command, *job, merge=True, timeout=120)
    assert done.returncode == 0, done.stdout[-5000:]
    assert sorted(losses(done.stdout)) == [1, 2, 3]
    assert "Trained to step 3" in done.stdout
