"""Whole jobs that are killed by kill -9 at random moments and go on with other numbers of ranks.

    MOMOE_TITAN_KILLS=20 python -m pytest -s tests/test_kills.py

Two sources are mixed by weight, and threads tokenize ahead. What each step took is counted by document: all documents
of a pass are read exactly once, whatever steps were lost.
"""

import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from momoe_titan.data.local_files import load_local
from momoe_titan.data.order import Order
from momoe_titan.data.position import unpack_position
from tests.support import commands, faults

ROOT = Path(__file__).parent.parent
KILLS = int(os.environ.get("MOMOE_TITAN_KILLS", "1"))
SOURCES = {"a": (1, 120, 0.7), "b": (121, 30, 0.3)}  # first document, documents, weight


def write_data(folder: Path) -> dict[int, int]:
    """Documents of one word each, said one to forty times, and a tokenizer that knows these words.

    Returns:
        For each document the number of its words.
    """
    chosen, lengths = random.Random(0), {}
    for name, (first, documents, _) in SOURCES.items():
        of_source = {first + i: chosen.randrange(1, 41) for i in range(documents)}
        lines = (json.dumps({"text": " ".join([f"w{document}"] * n)}) + "\n" for document, n in of_source.items())
        (folder / f"{name}.jsonl").write_text("".join(lines))
        lengths.update(of_source)
    words = {"<eos>": 0} | {f"w{document}": document for document in lengths}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<eos>"])
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    table = '[[momoe.data]]\npath = "{}/{}.jsonl"\nweight = {}\n'
    tables = [table.format(folder, name, weight) for name, (*_, weight) in SOURCES.items()]
    job = (ROOT / "train_configs/debug_model.toml").read_text()
    (folder / "job.toml").write_text("\n".join([job, *tables]))
    return lengths


class Job:
    """A job in a folder, and what of its steps counts."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.env = commands.environment(HF_HOME=str(folder / "hf"), MOMOE_TITAN_RECORD=str(folder))
        self.seen: list[tuple[int, Counter]] = []  # step, tokens of all ranks
        self.states: dict[int, list[bytes]] = {}  # by step, of all ranks

    def start(self, ranks: int, *extra: str) -> list:
        for file in self.folder.glob("rank-*"):
            file.unlink()
        port = str(commands.free_port())
        options = (
            f"--job.config_file {self.folder}/job.toml --job.dump_folder {self.folder}/out --model.flavor tiny "
            f"--model.hf_assets_path {self.folder}/tokenizer --experimental.custom_import tests.support.recorded_data "
            "--training.dataset local --training.seq_len 15 --training.local_batch_size 8 --training.steps 100000 "
            "--training.dataloader.num_workers 2 --validation.no-enable --metrics.no-enable_tensorboard "
            "--checkpoint.enable --checkpoint.interval 2 --checkpoint.keep_latest_k 2"
        ).split()
        with open(self.folder / "log", "a") as log:
            return [
                commands.start(
                    *("-m", "momoe_titan.train", *options, *extra),
                    stdout=log.fileno(),
                    env={
                        **{**self.env, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)},
                        **{"MASTER_ADDR": "localhost", "MASTER_PORT": port},
                    },
                    before=[faults.wait_no_longer],
                )
                for rank in range(ranks)
            ]

    def taken(self, rank: int) -> list[tuple[int, Counter, bytes]]:
        file = self.folder / f"rank-{rank}"
        lines = file.read_text().split("\n")[:-1] if file.exists() else []
        found = [json.loads(line) for line in lines]
        return [(step, Counter({int(k): n for k, n in tokens.items()}), at.encode()) for step, tokens, at in found]

    def count(self, ranks: int) -> None:
        """Take over what these ranks have read; steps that an earlier run had read and lost count no more."""
        of_ranks = [self.taken(rank) for rank in range(ranks)]
        first = min(taken[0][0] for taken in of_ranks)
        self.seen = [(step, counts) for step, counts in self.seen if step < first]
        self.seen += [(step, counts) for taken in of_ranks for step, counts, _ in taken]
        self.states = {
            step: states
            for step in range(first, min(taken[-1][0] for taken in of_ranks) + 1)
            if (states := [state for taken in of_ranks for at, _, state in taken if at == step])
        }

    def last_checkpoint(self) -> int:
        return max((int(p.parent.name[5:]) for p in self.folder.glob("out/checkpoint/step-*/.metadata")), default=0)


def expected(order: Order, states: list[bytes]) -> Counter:
    """How many tokens of each document must have been in batches, by the positions of all ranks."""
    places = [unpack_position(state)[1] for state in states]
    farthest = max(place.next for place in places)
    parts: dict[int, int | None] = dict.fromkeys(range(farthest), None)  # tokens of the document at a position, or all
    for place in places:
        parts.update(dict.fromkeys(range(place.next, farthest, place.step), 0))
        parts.update(dict(place.left))
    tokens: Counter = Counter()
    for position, (source, document, _) in zip(parts, order.find(list(parts)), strict=True):
        (text,) = order.sources[source].read([document])
        words, part = str(text).split(), parts[position]
        tokens[int(words[0][1:])] += len(words) if part is None else min(part, len(words))  # EOS is behind the words
    return +tokens


@pytest.mark.slow
def test_every_document_of_a_pass_is_read_once_however_often_a_job_is_killed(tmp_path, capsys, monkeypatch):
    lengths = write_data(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    job, chosen, lost = Job(tmp_path), random.Random(KILLS), 0
    all_ranks = [2, 3, 1, *(chosen.choice([1, 2, 3]) for _ in range(KILLS))][: KILLS + 1]
    for kill, ranks in enumerate(all_ranks):
        is_last = kill == KILLS
        saved = job.last_checkpoint()
        wanted = saved + (chosen.randrange(1, 8) if not is_last else 32)  # in the end more than one pass
        processes = job.start(ranks, *(["--training.steps", str(wanted)] if is_last else []))
        while not is_last and not all((taken := job.taken(r)) and taken[-1][0] >= wanted for r in range(ranks)):
            assert all(process.is_alive() for process in processes), (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.01)
        if not is_last:
            time.sleep(chosen.random() / 10)
            for process in chosen.sample(processes, ranks):
                os.kill(process.pid, signal.SIGKILL)
        for process in processes:
            process.join()
            assert process.exitcode == (0 if is_last else -signal.SIGKILL), (tmp_path / "log").read_text()[-3000:]
        before = len(job.seen)
        job.count(ranks)
        first = min(step for step, _, _ in job.taken(0))
        assert first == saved + 1
        lost += before - sum(step < first for step, _ in job.seen)
    order = Order([load_local(str(tmp_path / f"{name}.jsonl")) for name in SOURCES], [w for *_, w in SOURCES.values()])
    seen: Counter = sum((counts for _, counts in job.seen), Counter())
    seen.pop(0, None)
    step = max(job.states)
    assert seen == expected(order, job.states[step])
    assert all(seen[document] >= tokens for document, tokens in lengths.items())  # a pass was read to its end
    with capsys.disabled():
        print(
            f"\n{KILLS} kills, ranks {all_ranks}, {step} steps, {lost} batches of lost steps read again; "
            f"{len(seen)} documents, {sum(seen.values())} tokens: each as often as its pass says"
        )
