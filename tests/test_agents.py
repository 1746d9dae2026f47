"""A machine that fails while a job runs on two: torchrun goes on from the last checkpoint when it is back."""

import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.support import commands
from tests.test_launch import PAGE, on_the_page, on_this_machine

JOB = (
    *("--model.flavor=tiny", "--experimental.custom_import=tests.support.tiny_flavor", "--validation.no-enable"),
    *("--training.seq_len=32", "--training.local_batch_size=2", "--metrics.log_freq=1", "--debug.seed=1"),
    *("--metrics.disable_color_printing", "--checkpoint.enable", "--checkpoint.interval=2"),
    *("--checkpoint.no-last_save_model_only", "--checkpoint.keep_latest_k=0", "--training.steps=100000"),
)


class Agent:
    """torchrun on one machine, and the process of the job that it has started."""

    def __init__(self, command: list[str], log: Path):
        self.log = log
        # the page's variable for machines that fail
        (variable,) = re.findall(r"^export (\w+)=(\d)$", PAGE.read_text(), re.M)
        with open(log, "a") as output:
            self.process = commands.start(
                *("-m", "tests.support.agents", "1", *command),
                stdout=output.fileno(),
                env=commands.environment(**dict([variable])),
                before=[os.setsid],
            )

    def lose_power(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()


def wait_for(happened, agents: list[Agent], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not happened():
        ended = [agent.log.read_text()[-3000:] for agent in agents if not agent.process.is_alive()]
        assert not ended and time.monotonic() < end, ended or [agent.log.read_text()[-3000:] for agent in agents]
        time.sleep(0.1)


@pytest.mark.slow
def test_a_machine_that_is_killed_and_started_again(tmp_path):
    page, port = on_the_page(), commands.free_port()
    launch = [*on_this_machine(page[: page.index("-m")], port), "--max_restarts", "3"]
    config = "--job.config_file", "train_configs/debug_model.toml", f"--job.dump_folder={tmp_path / 'out'}"
    command = [*launch, "-m", "momoe_titan.train", *config, *JOB]

    def listening() -> bool:
        with socket.socket() as client:
            return client.connect_ex(("localhost", port)) == 0

    def saved(step: int) -> bool:
        return (tmp_path / "out" / "checkpoint" / f"step-{step}" / ".metadata").exists()

    agents = [first := Agent(command, tmp_path / "first")]  # which has the agents' meeting point
    try:
        wait_for(listening, agents)
        agents.append(second := Agent(command, tmp_path / "second"))
        wait_for(lambda: saved(4), agents)
        agents.remove(second)
        second.lose_power()
        agents.append(again := Agent(command, tmp_path / "second again"))
        wait_for(lambda: len(starts(first, second, again)) == 2, agents)
        resumed = starts(first, second, again)[-1]
        wait_for(lambda: saved(resumed + 3), agents)
    finally:
        for agent in agents:
            agent.lose_power()
    assert starts(first, second, again) == [1, resumed] and resumed >= 5 and resumed % 2 == 1


def starts(*agents: Agent) -> list[int]:
    """The step at which the job began, for each time that it did: rank 0 says so, wherever it is."""
    lines = [line for agent in agents for line in agent.log.read_text().splitlines()]
    return sorted(int(line.split()[-1]) for line in lines if "Training starts at step" in line)
