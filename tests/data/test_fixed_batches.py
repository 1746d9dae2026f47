"""Validation reads the same batches each time, and on any number of ranks the same in all."""

import json
from collections import Counter

import pytest
import torch
from datasets import Dataset
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS

from momoe_titan.data.loader import build_validation_dataloader
from momoe_titan.data.tokenizer import load_tokenizer
from tests.support.text_data import read_job

TOKENIZER = load_tokenizer("momoe_titan/assets/tokenizer", "--tokenizer")
TEXTS = [f"document {i} " + "word " * (7 * i % 11) for i in range(41)]
SIZE, LENGTH = 4, 16


@pytest.fixture
def options(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return [
        "--job.custom_config_module=momoe_titan.job_config",
        "--validation.dataset=local",
        f"--validation.dataset_path={tmp_path / 'a.jsonl'}",
        f"--validation.local_batch_size={SIZE}",
        f"--validation.seq_len={LENGTH}",
    ]


def build(options, steps, ranks=1, rank=0):
    config = read_job(*options, f"--validation.steps={steps}")
    return build_validation_dataloader(ranks, rank, TOKENIZER, config)


def real_sequences(batches) -> list[tuple[int, ...]]:
    """Input and labels of each sequence that has a label; the shapes are always the same."""
    found = []
    for inputs, labels in batches:
        assert labels.shape == inputs["input"].shape == (SIZE, LENGTH)
        rows = zip(inputs["input"].tolist(), labels.tolist(), strict=True)
        found += [(*x, *y) for x, y in rows if any(label != IGNORE_INDEX for label in y)]
    return found


@pytest.mark.parametrize("steps", [5, 1, -1])
def test_ranks_share_the_batches_of_one(options, steps):
    alone = real_sequences(build(options, steps))
    if steps > 0:
        assert len(alone) == steps * SIZE
    else:
        assert len(alone) % SIZE, "a last batch that is not full"
    for ranks in (2, 3, 8):
        shares = [list(build(options, steps, ranks, rank)) for rank in range(ranks)]
        assert len({len(batches) for batches in shares}) == 1, "as many collectives on each rank"
        assert Counter(row for batches in shares for row in real_sequences(batches)) == Counter(alone)


def test_all_of_the_data_is_read_to_its_last_token(options):
    rows = real_sequences(build(options, -1))
    tokens = [token for ids in TOKENIZER.encode_documents(TEXTS) for token in ids]
    packed = [tokens[i : i + LENGTH + 1] for i in range(0, len(tokens), LENGTH + 1)]
    labels = [[label for label in row[LENGTH:] if label != IGNORE_INDEX] for row in rows]
    assert labels == [row[1:] for row in packed if len(row) > 1]


@pytest.mark.parametrize("steps", [3, -1])
@pytest.mark.parametrize("source", ["local", "streamed by TorchTitan"])
def test_each_validation_begins_at_the_beginning(options, monkeypatch, source, steps):
    """Also one that was not read to its end."""
    if source != "local":
        texts = Dataset.from_dict({"text": TEXTS})
        stream = DatasetConfig("x", lambda path: texts.to_iterable_dataset(), lambda row: row["text"])
        monkeypatch.setitem(DATASETS, "a_stream", stream)
        options[1:3] = ["--validation.dataset=a_stream"]
    loader = build(options, steps, ranks=2, rank=1)
    next(iter(loader))
    first, second = ([(x["input"], y) for x, y in loader] for _ in range(2))
    assert len(first) == len(second) > 1
    for (x, y), (x_again, y_again) in zip(first, second, strict=True):
        assert torch.equal(x, x_again) and torch.equal(y, y_again)


def test_documents_are_numbered_in_all_sequences(options):
    for inputs, labels in build([*options, "--momoe.document_mask"], -1, ranks=3, rank=2):
        assert inputs["positions"].shape == labels.shape
        assert (inputs["positions"][:, 0] == 0).all()
