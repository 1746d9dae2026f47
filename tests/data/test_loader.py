"""Corpus, local files, tokenizer: reproducible, split cleanly, resumable, loud when damaged."""

import json
import sysconfig
from collections import Counter
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torchtitan.config import ConfigManager

import momoe_titan
from momoe_titan.data import local_files
from momoe_titan.data.dataset import TextDataset
from momoe_titan.data.errors import DataError
from momoe_titan.data.loader import build_dataloader, build_validation_dataloader
from momoe_titan.data.local_files import LOCAL_SUFFIXES, load_local
from momoe_titan.data.ranges import cut
from momoe_titan.data.registration import DATASETS, register_datasets
from momoe_titan.data.stdlib import is_held_out, load_stdlib, stdlib_files
from momoe_titan.data.tokenizer import build_tokenizer, resolve_assets_path
from momoe_titan.register import get_train_spec

TOKENIZER = Path(momoe_titan.__file__).parent / "assets" / "tokenizer"
TEXTS = ["one two three four five six\n", "def f(x):\n    return x\n", "naïve 漢字\n", "the end\n"]


def job(*options: str):
    return ConfigManager().parse_args(
        [
            "--job.custom_config_module=momoe_titan.job_config",
            f"--model.hf_assets_path={TOKENIZER}",
            "--training.local_batch_size=2",
            "--training.seq_len=16",
            *options,
        ]
    )


@pytest.fixture(autouse=True)
def own_hub_cache(tmp_path, monkeypatch):
    """Conversions go to the test's folder, not to the user's cache."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub-cache")


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(job())


def test_stdlib_is_the_same_every_time_and_large_enough():
    root = sysconfig.get_path("stdlib")
    first, again = load_stdlib(root), load_stdlib(root)
    assert first["path"] == again["path"]
    assert first["text"] == again["text"]
    assert sum(map(len, first["text"])) > 2_000_000
    assert not any("site-packages" in p or "/test/" in p for p in first["path"])


def test_held_out_files_are_in_neither_twice():
    root = sysconfig.get_path("stdlib")
    train, held_out = (set(stdlib_files(root, split)) for split in (False, True))
    assert not train & held_out
    assert 0.01 < len(held_out) / len(train) < 0.12


def test_split_depends_on_the_path_alone(tmp_path):
    names = [f"m{i}.py" for i in range(200)]
    for name in names:
        (tmp_path / name).write_text("x = 1\n")
    before = stdlib_files(tmp_path, held_out=True)
    assert before == [n for n in stdlib_files(tmp_path, True) if is_held_out(n)]
    for name in names[::2]:
        (tmp_path / name).unlink()
    assert stdlib_files(tmp_path, True) == [n for n in before if n not in names[::2]]


def test_folder_without_sources_is_refused(tmp_path):
    with pytest.raises(DataError, match="dataset_path .* holds no Python source"):
        load_stdlib(str(tmp_path))


def write(path: Path, texts=TEXTS, field="text") -> Path:
    if path.suffix == ".txt":
        path.write_text("".join(texts), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": i, field: t}) + "\n" for i, t in enumerate(texts)))
    else:
        pq.write_table(pa.table({"id": list(range(len(texts))), field: texts}), path)
    return path


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", LOCAL_SUFFIXES)
def test_one_file(tmp_path, suffix, streaming):
    file = write(tmp_path / f"a{suffix}", field="body")
    rows = list(load_local(str(file), "body", streaming))
    assert "".join(row["text"] for row in rows) == "".join(TEXTS)
    assert len(rows) == (1 if suffix == ".txt" else len(TEXTS))


def test_folder_and_pattern(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.jsonl", "sub/c.parquet", "sub/d.jsonl"):
        write(tmp_path / name, [name])
    (tmp_path / "notes.md").write_text("not data")
    everything = [row["text"] for row in load_local(str(tmp_path))]
    assert everything == ["b.txt", "a.jsonl", "sub/d.jsonl", "sub/c.parquet"]
    matched = [row["text"] for row in load_local(f"{tmp_path}/**/*.jsonl")]
    assert matched == ["a.jsonl", "sub/d.jsonl"]


def test_other_columns_may_differ_from_file_to_file(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "two", "meta": {"id": 3}}\n')
    large = pa.array(["three"], pa.large_string())
    pq.write_table(pa.table({"text": large, "score": [0.5]}), tmp_path / "c.parquet")
    pq.write_table(pa.table({"text": ["four"]}), tmp_path / "d.parquet")
    (tmp_path / "e.txt").write_text("five")
    texts = [row["text"] for row in load_local(str(tmp_path))]
    assert texts == ["five", "one", "two", "three", "four"]


def test_fewer_documents_than_ranks_are_refused(tmp_path):
    (tmp_path / "one.txt").write_text("a single document")
    config = job("--training.dataset=local", f"--training.dataset_path={tmp_path}")
    tokenizer = build_tokenizer(config)
    with pytest.raises(DataError, match="'local' has fewer documents than the 2 data-parallel ranks"):
        build_dataloader(2, 1, tokenizer, config)


def test_a_source_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "broken.py").write_bytes(b"# coding: no-such-encoding\n")
    with pytest.raises(DataError, match="broken.py.*no-such-encoding"):
        for held_out in (False, True):
            load_stdlib(str(tmp_path), held_out)


def test_long_text_file_is_cut_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(local_files, "MAX_DOCUMENT_CHARS", 100)
    text = "".join(f"line {i}\n" for i in range(50)) + "x" * 250 + "\n"
    (tmp_path / "long.txt").write_text(text)
    pieces = load_local(str(tmp_path / "long.txt"))["text"]
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 100
    assert pieces[0].endswith("\n")


def damaged(tmp_path: Path, case: str) -> tuple[Path, str]:
    """A file with one fault, and what the message must say besides its path."""
    good = write(tmp_path / "good.parquet").read_bytes()
    cases = {
        "cut.jsonl": (b'{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        "number.jsonl": (b'{"text": "a"}\n{"text": 3}\n', "line 2 has no text"),
        "other.jsonl": (b'{"text": "a"}\n{"body": "b"}\n', "line 2 has no text"),
        "empty.jsonl": (b"", "empty"),
        "cut.parquet": (good[: len(good) // 2], "magic bytes"),
        "noise.parquet": (b"PAR1 and no more", "magic bytes"),
        "binary.txt": (b"\xff\xfe\x00", "utf-8"),
        "empty.txt": (b"", "no text"),
        "table.csv": (b"text\na\n", ".parquet"),
    }
    content, message = cases[case]
    file = tmp_path / case
    file.write_bytes(content)
    return file, message


@pytest.mark.parametrize(
    "case",
    ["cut.jsonl", "number.jsonl", "other.jsonl", "empty.jsonl", "cut.parquet", "noise.parquet"]
    + ["binary.txt", "empty.txt", "table.csv"],
)
def test_damaged_file_is_named_before_training(tmp_path, tokenizer, case):
    file, message = damaged(tmp_path, case)
    config = job("--training.dataset=local", f"--training.dataset_path={file}")
    with pytest.raises(DataError) as refused:
        build_dataloader(1, 0, tokenizer, config)
    assert str(file) in str(refused.value)
    assert message in str(refused.value)


@pytest.mark.parametrize("case", ["cut.jsonl", "cut.parquet", "noise.parquet", "empty.jsonl"])
def test_damaged_first_file_is_named_when_streaming(tmp_path, case):
    file, _ = damaged(tmp_path, case)
    with pytest.raises(DataError, match=case):
        load_local(str(file), streaming=True)


def test_missing_column_names_the_option(tmp_path):
    file = write(tmp_path / "a.parquet", field="body")
    for streaming in (False, True):
        with pytest.raises(DataError, match="momoe.data_text_field") as refused:
            load_local(str(file), streaming=streaming)
        assert "body" in str(refused.value)


@pytest.mark.parametrize("path", ["", "no/such/file.txt", "no/such/*.jsonl"])
def test_missing_path_is_refused(path):
    with pytest.raises(DataError, match="dataset_path"):
        load_local(path)


def batches(loader, n):
    taken = []
    for inputs, labels in loader:
        taken.append((inputs["input"].tolist(), labels.tolist()))
        if len(taken) == n:
            return taken
    raise AssertionError("the loader ran out")


@pytest.mark.parametrize("source", ["python_stdlib", "jsonl", "jsonl streamed"])
def test_loader_resumes_where_it_was(tmp_path, tokenizer, source):
    options = [f"--training.dataset={source}"]
    if source != "python_stdlib":
        # Six documents are read more than once, which a streamed dataset does not
        # resume from exactly.
        count = 20 if source.endswith("streamed") else 6
        write(tmp_path / "a.jsonl", [f"text {i} " * 10 for i in range(count)])
        options = ["--training.dataset=local", f"--training.dataset_path={tmp_path}"]
        if source.endswith("streamed"):
            options.append("--momoe.data_streaming")
    loader = build_dataloader(1, 0, tokenizer, job(*options))
    iterator = iter(loader)
    for _ in range(5):
        next(iterator)
    state = loader.state_dict()
    expected = batches(iterator, 4)
    resumed = build_dataloader(1, 0, tokenizer, job(*options))
    resumed.load_state_dict(state)
    assert batches(resumed, 4) == expected


def resharded(states, ranks, *options):
    loaders = [build_dataloader(ranks, r, build_tokenizer(job()), job(*options), infinite=False) for r in range(ranks)]
    for loader in loaders:
        if states:
            loader.load_ranks(states)
    return loaders


def states_of(loaders) -> list[bytes]:
    return [loader.state_dict()[f"dp_rank_{r}"] for r, loader in enumerate(loaders)]


def test_other_numbers_of_ranks_read_each_document_once(tmp_path, tokenizer):
    documents = [f"document {i} " + "x " * (i % 7) for i in range(101)]
    write(tmp_path / "a.jsonl", documents)
    options = ["--training.dataset=local", f"--training.dataset_path={tmp_path}"]
    seen, states = Counter(), []
    for ranks, sequences in ((1, 7), (3, 5), (2, 0), (2, 9), (1, 3), (4, 1000)):
        loaders = resharded(states, ranks, *options)
        for loader in loaders:
            # of the dataset: the loader would hold back a last batch that is not full
            for inputs, labels in islice(loader.dataset, sequences):
                seen.update([*inputs["input"].tolist(), labels[-1].item()])
        states = states_of(loaders)
    for loader in loaders:
        assert loader.dataset.state_dict()["ranges"] != [(0, 101)]
        seen.update(loader.dataset.state_dict()["token_buffer"])
    assert seen == Counter(token for text in documents for token in tokenizer.encode(text, add_bos=True, add_eos=True))


def test_next_pass_is_the_whole_again(tmp_path):
    write(tmp_path / "a.jsonl", [f"document {i} " * 9 for i in range(10)])
    options = ["--training.dataset=local", f"--training.dataset_path={tmp_path}"]
    (one,) = resharded([], 1, *options)
    batches(one, 2)
    two = resharded(states_of([one]), 2, *options)
    for loader in two:
        loader.dataset.infinite = True
        batches(loader, 20)
    assert [loader.dataset._ranges for loader in two] == [[(0, 5)], [(5, 10)]]


@pytest.mark.parametrize("change", ["streamed", "documents"])
def test_position_that_means_nothing_is_not_used(tmp_path, change, caplog):
    write(tmp_path / "a.jsonl", [f"text {i} " * 10 for i in range(20)])
    options = ["--training.dataset=local", f"--training.dataset_path={tmp_path}"]
    if change == "streamed":
        options.append("--momoe.data_streaming")
    (one,) = resharded([], 1, *options)
    batches(one, 3)
    states = states_of([one])
    if change == "documents":
        write(tmp_path / "a.jsonl", [f"text {i} " * 10 for i in range(19)])
        same_ranks = resharded([], 1, *options)[0]
        same_ranks.load_state_dict({"dp_rank_0": states[0], "world_size": 1})
        assert batches(same_ranks, 2) == batches(resharded([], 1, *options)[0], 2)
    two = resharded(states, 2, *options)
    assert "THE DATA STARTS AGAIN" in caplog.text
    assert [batches(x, 2) for x in two] == [batches(x, 2) for x in resharded([], 2, *options)]


def local(folder: Path, *options: str) -> list[str]:
    return ["--training.dataset=local", f"--training.dataset_path={folder}", *options]


CHANGES = {
    "streamed": ([], ["--momoe.data_streaming"], "not streamed, now training.dataset 'local' is streamed"),
    "not streamed": (["--momoe.data_streaming"], [], "streamed, now training.dataset 'local' is not streamed"),
    **{
        f"{then} to {now} workers": (
            [f"--training.dataloader.num_workers={then}"],
            [f"--training.dataloader.num_workers={now}"],
            f"training.dataloader.num_workers = {then}, now it is {now}",
        )
        for then, now in ((0, 1), (1, 0), (2, 1))
    },
}


@pytest.mark.parametrize("change", CHANGES)
def test_data_read_in_another_way_starts_again(tmp_path, tokenizer, change, caplog):
    before, after, message = CHANGES[change]
    write(tmp_path / "a.jsonl", [f"text {i} " * 10 for i in range(20)])
    loader = build_dataloader(1, 0, tokenizer, job(*local(tmp_path, *before)))
    batches(loader, 3)
    resumed, fresh = (build_dataloader(1, 0, tokenizer, job(*local(tmp_path, *after))) for _ in range(2))
    resumed.load_state_dict(loader.state_dict())
    (warning,) = [r.getMessage() for r in caplog.records if "THE DATA STARTS AGAIN" in r.getMessage()]
    assert message in warning
    assert batches(resumed, 3) == batches(fresh, 3)


def test_streamed_files_of_another_kind_start_again(tmp_path, tokenizer, caplog):
    texts = [f"text {i} " * 10 for i in range(20)]
    write(tmp_path / "a.jsonl", texts)
    options = local(tmp_path, "--momoe.data_streaming")
    loader = build_dataloader(1, 0, tokenizer, job(*options))
    batches(loader, 3)
    write(tmp_path / "b.txt", texts)
    resumed, fresh = (build_dataloader(1, 0, tokenizer, job(*options)) for _ in range(2))
    resumed.load_state_dict(loader.state_dict())
    assert batches(resumed, 3) == batches(fresh, 3)
    assert "the files of training.dataset 'local'" in caplog.text


SOURCES = ["map", "one streamed", "three streamed", "kinds streamed"]


def write_source(folder: Path, source: str) -> tuple[list[str], list[str]]:
    """Documents, and the options to train on them."""
    folder.mkdir(exist_ok=True)
    texts = [f"document {i} " + "x " * (i % 7) for i in range(41)]
    if source == "three streamed":
        for i in range(3):
            write(folder / f"{i}.jsonl", texts[i::3])
    elif source == "kinds streamed":
        write(folder / "a.txt", texts[:1])
        write(folder / "b.jsonl", texts[1:20])
        write(folder / "c.parquet", texts[20:])
    else:
        write(folder / "a.jsonl", texts)
    options = ["--momoe.data_streaming"] if source.endswith("streamed") else []
    return texts, local(folder, "--training.seq_len=4", *options)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("ranks, workers", [(1, 2), (1, 3), (2, 2), (3, 1)])
def test_workers_read_each_document_once(tmp_path, tokenizer, source, ranks, workers):
    texts, options = write_source(tmp_path, source)
    config = job(*options, f"--training.dataloader.num_workers={workers}")
    seen = Counter()
    for rank in range(ranks):
        loader = build_dataloader(ranks, rank, tokenizer, config, infinite=False)
        for inputs, labels in loader:
            seen.update([*inputs["input"].flatten().tolist(), *labels[:, -1].tolist()])
    everything = Counter(t for text in texts for t in tokenizer.encode(text, add_bos=True, add_eos=True))
    assert not seen - everything
    # less than a sequence is left over in each worker
    assert (everything - seen).total() <= 4 * ranks * workers


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_resume_where_they_were(tmp_path, tokenizer, source, workers):
    config = job(*write_source(tmp_path, source)[1], f"--training.dataloader.num_workers={workers}")

    def loader(state=None):
        built = build_dataloader(1, 0, tokenizer, config)
        if state:
            built.load_state_dict(state)
        return built

    whole = batches(loader(), 20)
    for taken in (1, 8):
        first = loader()
        assert batches(first, taken) == whole[:taken]
        # saved again before all workers have read anything
        second = loader(first.state_dict())
        assert batches(second, 1) == whole[taken : taken + 1]
        assert batches(loader(second.state_dict()), 6) == whole[taken + 1 : taken + 7]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("source", SOURCES)
def test_resume_in_a_later_pass(tmp_path, tokenizer, source, workers):
    config = job(*write_source(tmp_path, source)[1], f"--training.dataloader.num_workers={workers}")
    loader = build_dataloader(1, 0, tokenizer, config)
    iterator = iter(loader)
    for _ in range(200):
        next(iterator)
    resumed = build_dataloader(1, 0, tokenizer, config)
    resumed.load_state_dict(loader.state_dict())
    assert batches(resumed, 30) == batches(iterator, 30)


@pytest.mark.parametrize("streaming", [[], ["--momoe.data_streaming"]])
def test_worker_without_documents_leaves_the_others_to_go_on(tmp_path, tokenizer, streaming):
    write(tmp_path / "a.jsonl", ["one document"])
    options = local(tmp_path, *streaming)
    alone, two = (
        build_dataloader(1, 0, tokenizer, job(*options, f"--training.dataloader.num_workers={n}")) for n in (0, 2)
    )
    assert batches(two, 6) == batches(alone, 6)


@pytest.mark.parametrize("section", ["training", "validation"])
def test_fewer_streamed_documents_than_ranks_are_refused(tmp_path, tokenizer, section):
    write(tmp_path / "a.jsonl", ["one document"])
    config = job(
        *local(tmp_path, "--momoe.data_streaming", "--validation.steps=1"),
        "--validation.dataset=local",
        f"--validation.dataset_path={tmp_path}",
    )
    build_dataloader(1, 0, tokenizer, config)
    build = build_dataloader if section == "training" else build_validation_dataloader
    message = f"{section}.dataset 'local' has fewer documents than the 2 data-parallel ranks.*: 1 .*{tmp_path}"
    for rank in range(2):
        with pytest.raises(DataError, match=message):
            build(2, rank, tokenizer, config, infinite=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_rank_whose_streamed_file_is_empty_is_told(tmp_path, tokenizer, workers):
    write(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text("\n")
    options = local(tmp_path, "--momoe.data_streaming", f"--training.dataloader.num_workers={workers}")
    batches(build_dataloader(2, 0, tokenizer, job(*options)), 3)
    with pytest.raises(DataError, match="'local' has no document.* rank 1 of 2"):
        batches(build_dataloader(2, 1, tokenizer, job(*options)), 1)


def test_streamed_data_goes_on_from_the_end_of_a_pass(tmp_path, tokenizer):
    """What a checkpoint leaves of its pass may hold no document, which is no error."""
    write(tmp_path / "a.jsonl", TEXTS)
    config = job(*local(tmp_path, "--momoe.data_streaming", "--training.seq_len=4"))
    dataset = build_dataloader(1, 0, tokenizer, config, infinite=False).dataset
    list(dataset)
    resumed = build_dataloader(1, 0, tokenizer, config).dataset
    resumed.load_state_dict(dataset.state_dict())
    assert len(list(islice(resumed, 10))) == 10


def validation(*options: str):
    return job("--validation.local_batch_size=2", "--validation.seq_len=16", *options)


def build_validator(config, ranks=1, rank=0):
    """As the trainer does, after the training loader."""
    register_datasets(config.momoe.data_text_field, config.momoe.data_streaming)
    names = ["parallel_dims", "loss_fn", "validation_context", "maybe_enable_amp", "metrics_processor"]
    return get_train_spec().build_validator_fn(
        job_config=config,
        dp_world_size=ranks,
        dp_rank=rank,
        tokenizer=build_tokenizer(config),
        **dict.fromkeys(names, "unused"),
    )


WORKERS = [[], ["num_workers=2"], ["num_workers=2", "persistent_workers"]]


@pytest.mark.parametrize(
    "source, workers",
    [("python_stdlib_validation", []), *((s, w) for s in ("txt", "streamed") for w in WORKERS)],
)
def test_each_validation_on_the_whole_reads_the_same(tmp_path, source, workers):
    options = [f"--validation.dataset={source}"]
    if source != "python_stdlib_validation":
        (tmp_path / "one.txt").write_text("one two three four " * 40)
        options = ["--validation.dataset=local", f"--validation.dataset_path={tmp_path}"]
    if source == "streamed":
        options.append("--momoe.data_streaming")
    options += [f"--validation.dataloader.{option}" for option in workers]
    loader = build_validator(validation("--validation.steps=-1", *options)).validation_dataloader
    first, second, third = (
        [(inputs["input"].tolist(), labels.tolist()) for inputs, labels in loader] for _ in range(3)
    )
    assert first and first == second == third


def test_validation_on_the_whole_is_for_one_rank(tmp_path):
    write(tmp_path / "a.jsonl")
    options = ["--validation.dataset=local", f"--validation.dataset_path={tmp_path}"]
    for rank in range(2):
        with pytest.raises(DataError, match="validation.steps is -1 .* with 2 data-parallel ranks"):
            build_validator(validation(*options, "--validation.steps=-1"), 2, rank)
        build_validator(validation(*options, "--validation.steps=1"), 2, rank)


def test_fewer_validation_documents_than_ranks_are_refused(tmp_path):
    (tmp_path / "one.txt").write_text("a single document")
    options = ["--validation.dataset=local", f"--validation.dataset_path={tmp_path}", "--validation.steps=1"]
    message = f"validation.dataset 'local' has fewer documents than the 2 .*: 1 .validation.dataset_path '{tmp_path}"
    for rank in range(2):
        with pytest.raises(DataError, match=message):
            build_validator(validation(*options), 2, rank)


@pytest.mark.parametrize("workers", [0, 2])
def test_validation_on_less_than_a_sequence_is_refused(tmp_path, workers):
    (tmp_path / "one.txt").write_text("short")
    loader = build_validator(
        validation(
            "--validation.dataset=local",
            f"--validation.dataset_path={tmp_path}",
            "--validation.steps=-1",
            f"--validation.dataloader.num_workers={workers}",
        )
    ).validation_dataloader
    with pytest.raises(DataError, match="validation.dataset 'local' holds not one sequence of .* 16 tokens"):
        list(loader)


def test_cut():
    assert cut([(0, 3), (10, 13)], 2, 5) == [(2, 3), (10, 12)]
    assert cut([(0, 3), (10, 13)], 3) == [(10, 13)]
    assert cut([(0, 3), (10, 13)], 0, 3) == [(0, 3)]
    assert cut([(0, 3)], 3) == cut([], 0) == []


def test_ranks_read_different_documents(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", [f"document number {i}\n" for i in range(10)])
    register_datasets()
    seen = [
        {row["text"] for row in TextDataset("local", str(tmp_path), tokenizer, 16, rank, 2, False)._get_data_iter()}
        for rank in range(2)
    ]
    assert not seen[0] & seen[1]
    assert len(seen[0] | seen[1]) == 10


def test_text_field_of_the_job_reaches_the_loader(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", ["some text " * 20], field="body")
    options = ["--training.dataset=local", f"--training.dataset_path={tmp_path}"]
    loader = build_dataloader(1, 0, tokenizer, job(*options, "--momoe.data_text_field=body"))
    ((inputs, labels),) = batches(loader, 1)
    assert tokenizer.decode(inputs[0]).startswith("some text")
    assert inputs[0][1:] == labels[0][:-1]


def test_registering_again_keeps_torchtitans_datasets():
    register_datasets()
    register_datasets()
    assert {"c4", "python_stdlib", "python_stdlib_validation", "local"} <= set(DATASETS)


def test_tokenizer_is_byte_level(tokenizer):
    assert tokenizer.get_vocab_size() == 2048
    text = "def f(x):\n\treturn 'naïve 漢字 \x00'  # \U0001f600\r\n"
    ids = tokenizer.encode(text, add_bos=True, add_eos=True)
    assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id
    assert {tokenizer.bos_id, tokenizer.eos_id} == {0, 1}
    assert tokenizer.decode(ids) == text
    for byte in range(256):
        assert tokenizer.decode(tokenizer.encode(chr(byte))) == chr(byte)


def test_tokenizer_fits_the_corpus(tokenizer):
    texts = load_stdlib(sysconfig.get_path("stdlib"), held_out=True)["text"]
    text = "".join(texts)
    assert len(text) / len(tokenizer.encode(text)) > 2.8


def test_packaged_tokenizer_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(resolve_assets_path("momoe_titan/assets/tokenizer")) == TOKENIZER


@pytest.mark.parametrize("content", [None, "", "{ not json", '{"version": "1.0"}'])
def test_missing_or_damaged_tokenizer_is_refused(tmp_path, content):
    folder = tmp_path / "tok"
    if content is not None:
        folder.mkdir()
        if content:
            (folder / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match="model.hf_assets_path") as refused:
        build_tokenizer(job(f"--model.hf_assets_path={folder}"))
    assert str(folder) in str(refused.value)
