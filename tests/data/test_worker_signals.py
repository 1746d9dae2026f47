"""Worker processes of a loader when signals stop the run."""

import os
import signal
import subprocess
import time

import pytest
import torch
from torch.utils.data import IterableDataset

from momoe_titan.data import streamed
from momoe_titan.data.tokenizer import TextTokenizer


class Pids(IterableDataset):
    """Without an end: the process that reads."""

    def __init__(self, *args):
        pass

    def __iter__(self):
        while True:
            time.sleep(0.01)
            yield torch.tensor(os.getpid())


@pytest.fixture
def loader(monkeypatch):
    monkeypatch.setattr(streamed, "HuggingFaceTextDataset", Pids)
    config = streamed.Training(local_batch_size=1)
    config.dataloader.num_workers, config.dataloader.prefetch_factor = 1, 1
    return streamed.build_streamed(config, TextTokenizer, 0, 1, True)


def has_ended(pid: int) -> bool:
    with open(f"/proc/{pid}/stat") as f:
        return f.read().rsplit(")")[1].split()[0] == "Z"


@pytest.mark.filterwarnings("ignore")
def test_workers_outlive_the_signals_of_others(loader):
    """torchrun and terminals signal all processes of a group; the trainer goes on to its last checkpoint."""
    batches = iter(loader)
    pid = int(next(batches))
    assert pid != os.getpid()
    for name in ("TERM", "INT", "TERM"):
        subprocess.run(["kill", f"-{name}", str(pid)], check=True)
    assert [int(next(batches)) for _ in range(8)] == [pid] * 8  # more than were ready before
    os.kill(pid, signal.SIGTERM)  # as torch does where a worker does not end by itself
    deadline = time.monotonic() + 10
    while not has_ended(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert has_ended(pid)
