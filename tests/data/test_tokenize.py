"""Token shards: the format, the command that writes them, and what is refused before the first step."""

import itertools
import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from torchtitan.config import ConfigManager

import momoe_titan
from momoe_titan.config.section import DataSource
from momoe_titan.data import tokenize
from momoe_titan.data.errors import DataError
from momoe_titan.data.indexed import DTYPES, Shard, ShardWriter, dtype_for
from momoe_titan.data.loader import build_dataloader
from momoe_titan.data.registration import open_source
from momoe_titan.data.token_files import holds_shards, open_tokens
from momoe_titan.data.tokenizer import TextTokenizer

TOKENIZER = str(Path(momoe_titan.__file__).parent / "assets" / "tokenizer")
TEXTS = [f"document {i}: " + "naïve 漢字 <|end_of_text|> " * (i % 7) for i in range(100)]


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer(TOKENIZER)


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, part in (("a.jsonl", TEXTS[:60]), ("b.jsonl", TEXTS[60:])):
        (folder / name).write_text("".join(json.dumps({"body": text}) + "\n" for text in part))
    return str(folder)


def run(texts, output, *options):
    return tokenize.main([texts, *options_of(output), *options])


def options_of(output):
    options = ["-o", str(output), "--tokenizer", TOKENIZER, "--text_field", "body"]
    return [*options, "--shard_tokens", "500", "--processes", "1"]


def documents(source):
    return [ids.tolist() for ids in source.read(range(len(source)))]


def test_shards_hold_every_document_in_order(tmp_path, texts, tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(tokenize, "BATCH_BYTES", 1 << 10)
    assert run(texts, tmp_path / "one") == 0
    assert "100 documents" in capsys.readouterr().out
    assert run(texts, tmp_path / "two", "--processes", "2") == 0
    files = sorted(path.name for path in (tmp_path / "one").iterdir() if path.suffix)
    assert len(files) > 6
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name

    source = open_tokens(str(tmp_path / "one"), tokenizer, "training.dataset_path")
    assert documents(source) == tokenizer.encode_documents(TEXTS)
    assert source.read([99, 0, 99])[1].tolist() == tokenizer.encode_documents(TEXTS[:1])[0]
    assert isinstance(source[5], np.memmap) and source[5].dtype == np.uint16, "a slice of the file"
    assert source.size == sum(len(text.encode()) for text in TEXTS)
    again = pickle.loads(pickle.dumps(source))
    assert documents(again) == documents(source) and again.fingerprint == source.fingerprint
    assert len(pickle.dumps(source)) < 4096
    shard = open_tokens(str(tmp_path / "one" / "00001.bin"), tokenizer, "training.dataset_path")
    assert 0 < len(shard) < 100 and shard.fingerprint != source.fingerprint
    assert holds_shards(str(tmp_path / "one" / "*.idx")) and not holds_shards(texts)


def test_training_gets_from_shards_what_it_gets_from_texts(tmp_path, texts, tokenizer, monkeypatch):
    """Shuffled alike, and resumed in the middle."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    assert run(texts, tmp_path / "tokens") == 0

    def loader(path):
        options = ["--job.custom_config_module=momoe_titan.job_config", f"--model.hf_assets_path={TOKENIZER}"]
        options += ["--training.dataset=local", f"--training.dataset_path={path}", "--momoe.data_text_field=body"]
        options += ["--training.local_batch_size=2", "--training.seq_len=32"]
        return build_dataloader(1, 0, tokenizer, ConfigManager().parse_args(options))

    def batches(loader, count):
        taken = itertools.islice(loader, count)
        return [(inputs["input"].tolist(), labels.tolist()) for inputs, labels in taken]

    shards = loader(tmp_path / "tokens")
    first = batches(shards, 5)
    state = shards.state_dict()
    resumed = loader(tmp_path / "tokens")
    resumed.load_state_dict(state)
    whole = batches(loader(texts), 12)
    assert first == whole[:5]
    assert batches(resumed, 5) == whole[5:10]


def test_layout_is_that_of_megatron(tmp_path):
    """Byte by byte from the format's description."""
    with ShardWriter(tmp_path / "x", dtype_for(65_536)) as writer:
        writer.add([[1, 2, 3], [], [65_535]])
    assert (tmp_path / "x.bin").read_bytes() == struct.pack("<4H", 1, 2, 3, 65_535)
    index = (tmp_path / "x.idx").read_bytes()
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 3, 4)
    assert index == head + struct.pack("<3i", 3, 0, 1) + struct.pack("<3q", 0, 6, 6) + struct.pack("<4q", 0, 1, 2, 3)
    assert dtype_for(65_537) == np.int32 and sorted(p.name for p in tmp_path.iterdir()) == ["x.bin", "x.idx"]


def test_interrupted_work_is_not_taken_and_goes_on(tmp_path, texts, tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(tokenize, "BATCH_BYTES", 1 << 10)
    run(texts, tmp_path / "whole")
    encode, calls = tokenize._encode, []

    def interrupted(batch):
        calls.append(len(batch.texts))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(batch)

    monkeypatch.setattr(tokenize, "_encode", interrupted)
    assert run(texts, tmp_path / "cut") == 130
    for path in ("cut", "cut/00000.idx", "cut/*.bin"):
        assert holds_shards(str(tmp_path / path))
        with pytest.raises(DataError, match="has not finished '.*cut'"):
            open_tokens(str(tmp_path / path), tokenizer, "training.dataset_path")
    assert not list((tmp_path / "cut").glob("*.bin.partial"))
    shards = len(list((tmp_path / "cut").glob("*.idx")))
    assert run(texts, tmp_path / "cut") == 0
    assert shards > 0 and f"in {shards} shards" in capsys.readouterr().err
    assert sum(calls[4:]) < len(TEXTS), "what was done is not done again"
    assert documents(open_tokens(str(tmp_path / "cut"), tokenizer, "")) == tokenizer.encode_documents(TEXTS)
    # also where a file is named twice
    assert tokenize.main([f"{texts}/b.jsonl", texts, *options_of(tmp_path / "again")]) == 0
    assert json.loads((tmp_path / "again/tokens.json").read_text()) == json.loads(
        (tmp_path / "whole/tokens.json").read_text()
    )
    assert json.loads((tmp_path / "cut/tokens.json").read_text()) == json.loads(
        (tmp_path / "whole/tokens.json").read_text()
    )
    assert run(texts, tmp_path / "cut") == 0 and "is complete already" in capsys.readouterr().out


def test_only_a_few_batches_are_read_ahead_of_the_processes(tokenizer):
    """All that is read waits in memory."""
    read = []

    def batches():
        for text in TEXTS[:20]:
            read.append(text)
            yield tokenize.Batch([text], np.array([len(text)]), 0.0)

    for done, batch in enumerate(tokenize._encoded(batches(), tokenizer, 2)):
        assert len(read) == min(20, 2 * tokenize.BATCHES_AHEAD + done)
        assert batch.ids.tolist() == tokenizer.encode_documents([TEXTS[done]])[0]


def test_another_tokenizer_or_text_is_refused(tmp_path, texts, tokenizer, capsys):
    assert run(texts, tmp_path / "tokens") == 0
    other = tmp_path / "other"
    other.mkdir()
    fields = json.loads(Path(TOKENIZER, "tokenizer_config.json").read_text()) | {"bos_token": None}
    (other / "tokenizer_config.json").write_text(json.dumps(fields))
    (other / "tokenizer.json").write_bytes(Path(TOKENIZER, "tokenizer.json").read_bytes())
    with pytest.raises(DataError, match="^training.dataset_path .* holds the ids of another tokenizer"):
        open_tokens(str(tmp_path / "tokens"), TextTokenizer(str(other)), "training.dataset_path")
    assert run(texts, tmp_path / "tokens", "--tokenizer", str(other)) == 2
    assert "holds tokens of another tokenizer" in capsys.readouterr().err
    assert run(texts + "/a.jsonl", tmp_path / "tokens") == 2
    assert "holds tokens of another source" in capsys.readouterr().err
    file = Path(texts, "a.jsonl")
    file.write_text(file.read_text().replace("document 0", "document _"))
    assert run(texts, tmp_path / "tokens") == 2
    assert "holds tokens of another source" in capsys.readouterr().err
    assert run(str(tmp_path / "nothing"), tmp_path / "new") == 2
    assert not (tmp_path / "new").exists()


def test_shards_of_others_are_read_with_a_warning(tmp_path, tokenizer, caplog):
    """Without tokens.json: several sequences to a document, another type of ids, no EOS."""
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 4, 3, 3) + struct.pack("<3i", 2, 1, 2)
    (tmp_path / "m.idx").write_bytes(index + struct.pack("<3q", 0, 8, 12) + struct.pack("<3q", 0, 2, 3))
    (tmp_path / "m.bin").write_bytes(struct.pack("<5i", 5, 6, 7, 8, 1))
    source = open_tokens(str(tmp_path / "m"), tokenizer, "training.dataset_path")
    assert documents(source) == [[5, 6, 7], [8, 1]] and source.tokens == 5
    assert "does not say with which tokenizer" in caplog.text and "documents without EOS (id 1)" in caplog.text
    (tmp_path / "m.bin").write_bytes(struct.pack("<5i", 5, 6, 7, 2048, 1))
    with pytest.raises(DataError, match="holds the id 2048, but the tokenizer .* ends with 2047"):
        open_tokens(str(tmp_path), tokenizer, "training.dataset_path")
    (tmp_path / "m.bin").write_bytes(struct.pack("<5i", 5, 6, 7, -1, 1))
    with pytest.raises(DataError, match="holds the id -1, must be at least 0"):
        open_tokens(str(tmp_path), tokenizer, "training.dataset_path")


def test_links_lead_to_no_shard_twice_and_empty_shards_are_named(tmp_path, texts, tokenizer):
    folder = tmp_path / "all"
    for name, count in (("a", 0), ("b", 3)):
        (folder / name).mkdir(parents=True)
        with ShardWriter(folder / name / "0", dtype_for(9)) as writer:
            writer.add([[5, 1]] * count)
    (folder / "circle").symlink_to(folder)
    (folder / "again.idx").symlink_to(folder / "b" / "0.idx")
    (folder / "again.bin").symlink_to(folder / "b" / "0.bin")
    assert documents(open_tokens(str(folder), tokenizer, "")) == [[5, 1]] * 3
    with pytest.raises(DataError, match=r"^training.dataset_path '.*/a' holds no document"):
        open_tokens(str(folder / "a"), tokenizer, "training.dataset_path")
    given = DataSource(path=[texts, str(folder / "b")])
    with pytest.raises(DataError, match=r"^momoe.data\[0\].path .*: token shards cannot stand in a list"):
        open_source(given, tokenizer, "momoe.data[0].path")


def test_texts_and_shards_in_one_folder_are_refused(tmp_path, texts, tokenizer, capsys):
    """Neither is taken for the other. A file that only has such a name changes nothing."""
    Path(texts, "a.idx").write_text("an index of another kind")
    assert not holds_shards(texts)
    assert run(texts, texts) == 2 and "holds 'a.jsonl'" in capsys.readouterr().err
    assert run(texts, tmp_path / "tokens") == 0
    (tmp_path / "tokens" / "below").mkdir()
    (tmp_path / "tokens" / "below" / "more.txt").write_text("text")
    assert holds_shards(str(tmp_path / "tokens"))
    with pytest.raises(DataError, match=r"^training.dataset_path .* holds token shards and 'below/more.txt'"):
        open_tokens(str(tmp_path / "tokens"), tokenizer, "training.dataset_path")


def test_damaged_shards_are_named(tmp_path, tokenizer):
    with ShardWriter(tmp_path / "x", DTYPES[8]) as writer:
        writer.add([[1, 2, 3], [4]])
    index, data = tmp_path / "x.idx", tmp_path / "x.bin"
    for file, content, fault in (
        (index, index.read_bytes()[:-1], "is cut off"),
        (index, index.read_bytes()[:20], "too few for an index"),
        (index, b"PARQUET" + index.read_bytes()[7:], "is no index of token ids"),
        (index, b"", "x"),
        (data, data.read_bytes()[:-1], "is cut off"),
        (data, None, "No such file"),
    ):
        before = file.read_bytes()
        file.unlink() if content is None else file.write_bytes(content)
        with pytest.raises(DataError, match=fault):
            Shard(tmp_path / "x.idx")
        file.write_bytes(before)
    (tmp_path / "tokens.json").write_text("{}")
    with pytest.raises(DataError, match="is damaged"):
        open_tokens(str(tmp_path), tokenizer, "training.dataset_path")


def test_progress_counts_all_and_says_it_now_and_then(monkeypatch, capsys):
    now = 100.0
    monkeypatch.setattr(tokenize.time, "monotonic", lambda: now)
    progress = tokenize.Progress()
    for share in (0.1, 0.2, 0.4):
        now += 0.8 * tokenize.PROGRESS_SECONDS
        progress(3, 1_000_000, share)
    (line,) = capsys.readouterr().err.splitlines()  # after the second
    took = 1.6 * tokenize.PROGRESS_SECONDS
    assert line == f"20%: 6 documents, 2,000,000 tokens, {2 / took:.2f} million tokens/s, {4 * took:,.0f} s left"
    assert str(progress).startswith("9 documents, 3,000,000 tokens, ")
