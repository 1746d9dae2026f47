"""The loaders of a job: what its fields do, where a run goes on, and what is refused."""

import json
import pickle
import socket
import sysconfig
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from torchtitan.hf_datasets import DatasetConfig

from momoe_titan.components.validation import build_validator
from momoe_titan.data import loader as loader_module
from momoe_titan.data.errors import DataError
from momoe_titan.data.loader import TextDataloader, build_dataloader, build_validation_dataloader
from momoe_titan.data.packing import LINE, BestFit, Interleave
from momoe_titan.data.pipeline import Place
from momoe_titan.data.position import divide
from momoe_titan.data.registration import DATASETS, register_datasets
from momoe_titan.data.stdlib import load_stdlib
from momoe_titan.data.streamed import StreamedDataloader
from momoe_titan.data.tokenizer import build_tokenizer, resolve_assets_path
from tests.support.text_data import TOKENIZER, batches, job, loaders, local, numbered, states_of, tokens_in, write

IGNORED = -100


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Texts are cached in a folder of the test, not in the user's."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(job())


def build(tokenizer, *options: str, ranks: int = 1, rank: int = 0, infinite: bool = True):
    return build_dataloader(ranks, rank, tokenizer, job(*options), infinite)


@pytest.mark.parametrize("source", ["python_stdlib", "local"])
def test_a_run_goes_on_where_it_was(tmp_path, tokenizer, source):
    write(tmp_path / "a.jsonl", [f"text {i} " * 10 for i in range(6)])
    options = local(tmp_path) if source == "local" else [f"--training.dataset={source}"]
    whole = batches(build(tokenizer, *options), 12)
    first = build(tokenizer, *options)
    assert batches(first, 5) == whole[:5]
    resumed = build(
        tokenizer, *options, "--training.dataloader.num_workers=3", "--training.dataloader.prefetch_factor=1"
    )
    resumed.load_state_dict(first.state_dict())
    assert batches(resumed, 7) == whole[5:]


def test_documents_are_shuffled_unless_they_are_not_to_be(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", [f"{i} " * 17 for i in range(30)])

    def text(*options: str) -> str:
        taken = batches(build(tokenizer, *local(tmp_path), *options), 8)
        rows = [[row[0], *labels] for inputs, targets in taken for row, labels in zip(inputs, targets, strict=True)]
        return tokenizer.decode([token for row in rows for token in row])

    in_order = "".join(f"{i} " * 17 for i in range(5))
    assert in_order in text("--momoe.no-data_shuffle")
    assert in_order not in text() != text("--debug.seed=1")


def test_the_seed_of_a_resumed_run_is_that_of_its_checkpoint(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", [f"text {i} " * 10 for i in range(30)])
    first = build(tokenizer, *local(tmp_path, "--debug.seed=5"))
    iterator = iter(first)
    next(iterator)
    state = first.state_dict()
    resumed = build(tokenizer, *local(tmp_path, "--debug.seed=6"))
    resumed.load_state_dict(state)
    inputs, _ = next(iterator)
    assert batches(resumed, 1)[0][0] == inputs["input"].tolist()


def change_text(folder: Path) -> list[str]:
    write(folder / "a.jsonl", [f"other {i} " * 10 for i in range(20)])
    return []


def add_document(folder: Path) -> list[str]:
    write(folder / "b.jsonl", ["one more"])
    return []


CHANGES = {
    "documents": (add_document, "20 documents, now it has 21"),
    "text": (change_text, "is another than then"),
    "order": (lambda _: ["--momoe.no-data_shuffle"], "momoe.data_shuffle = true, now it is false"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_position_in_other_data_is_not_used(tmp_path, tokenizer, change, ranks, caplog):
    write(tmp_path / "a.jsonl", [f"text {i} " * 10 for i in range(20)])
    first = build(tokenizer, *local(tmp_path))
    batches(first, 3)
    do, message = CHANGES[change]
    caplog.set_level("INFO")
    options = local(tmp_path, *do(tmp_path))
    resumed, fresh = (build(tokenizer, *options, ranks=ranks) for _ in range(2))
    if ranks == 1:
        resumed.load_state_dict(first.state_dict())
    else:
        resumed.load_ranks([first.state_dict()["dp_rank_0"]])
    (warning,) = [r.getMessage() for r in caplog.records if "THE DATA STARTS AGAIN" in r.getMessage()]
    assert message in warning and "is shared out" not in caplog.text
    assert batches(resumed, 3) == batches(fresh, 3)


def test_what_is_left_of_another_number_of_ranks_is_said(caplog):
    order = loader_module.Order([numbered(1, [5] * 40)])
    caplog.set_level("INFO")
    loaders(order, 3, states_of(loaders(order, 2)))
    assert caplog.text.count("The data of 2 data-parallel ranks is shared out to 3") == 3


def test_a_position_of_the_former_loader_is_not_used_and_not_unpickled(tmp_path, tokenizer, caplog):
    class Harmful:
        def __reduce__(self):
            return pytest.fail, ("unpickled",)

    write(tmp_path / "a.jsonl")
    loader = build(tokenizer, *local(tmp_path))
    loader.load_state_dict({"dp_rank_0": pickle.dumps(Harmful()), "world_size": 1})
    assert "earlier version" in caplog.text and "THE DATA STARTS AGAIN" in caplog.text
    batches(loader, 1)


def test_ranks_that_were_ahead_leave_what_the_others_had_not_read():
    places = [Place([(0, 3)], 8, 2), Place([], 3, 2)]  # positions from 8 on, and 3, 5, 7
    divided = [divide(places, rank, 3) for rank in range(3)]
    assert sorted(each for place in divided for each in place.left) == [(0, 3), (3, 0), (5, 0), (7, 0)]
    assert [(place.next, place.step) for place in divided] == [(8, 3), (9, 3), (10, 3)]


MIXED = """
[job]
custom_config_module = "momoe_titan.job_config"
[model]
hf_assets_path = "momoe_titan/assets/tokenizer"
[training]
dataset = "local"
local_batch_size = 2
seq_len = 16
[momoe]
data_text_field = "body"
[[momoe.data]]
path = ["{folder}/a.jsonl", "{folder}/b.jsonl"]
text_field = "text"
weight = 3
[[momoe.data]]
path = "{folder}/c.parquet"
[[momoe.data]]
dataset = "python_stdlib_validation"
weight = 0.5
"""


def test_sources_are_mixed_by_their_share_of_text(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", ["a" * 90] * 20)
    write(tmp_path / "b.jsonl", ["b" * 90] * 20)
    write(tmp_path / "c.parquet", ["c" * 900] * 5, field="body")
    (tmp_path / "job.toml").write_text(MIXED.format(folder=tmp_path))
    loader = build(tokenizer, f"--job.config_file={tmp_path}/job.toml")
    order = loader.order
    found = order.find(range(1 << 16))
    size = [sum(len(order.sources[s].read([d])[0]) for s, d, _ in found if s == source) for source in range(3)]
    assert [round(each / size[1], 1) for each in size] == [3.0, 1.0, 0.5]
    # each source is read as a whole before it begins again
    for source in range(2):
        of_source = [document for s, document, _ in found if s == source]
        length = len(order.sources[source])
        assert sorted(of_source[:length]) == sorted(of_source[length : 2 * length]) == list(range(length))
    batches(loader, 3)


@pytest.mark.parametrize("threads", [1, 3])
def test_best_fit_cuts_no_document(threads):
    lengths = [1 + (7 * i) % 24 for i in range(400)]
    (loader,) = loaders(
        loader_module.Order([numbered(1, lengths)]), 1, packing="best_fit", seq_len=15, threads=threads, ahead=threads
    )
    taken = batches(loader, 60)
    rows = [[row[0], *labels] for inputs, targets in taken for row, labels in zip(inputs, targets, strict=True)]
    assert all(len(row) == 16 for row in rows)
    whole = 0
    for row in rows:
        for number in set(row) - {IGNORED}:
            length = lengths[number - 1]
            assert row.count(number) in ((length,) if length <= 16 else (16, length - 16))
            whole += 1
        padding = [i for i, token in enumerate(row) if token == IGNORED]
        assert padding == list(range(16 - len(padding), 16))
    assert whole > 100
    assert tokens_in(taken).total() > 0.97 * 16 * len(rows)  # what is padded


def test_packers_need_the_documents_alone():
    packer = BestFit(8)
    packer.add(5, 0, np.arange(20))
    assert [len(part) for part in packer.take()] == [8]
    assert packer.begun() == [(5, 8)]


def documents(numbers, length):
    return [(number, 0, np.full(length, number)) for number in numbers]


def test_interleaved_sequences_are_of_one_document_after_the_other():
    packer = Interleave(8)
    coming = iter(documents(range(3 * LINE), 20))

    def sequence(packer, coming):
        while packer.wants_more:
            packer.add(*next(coming))
        return [token for part in packer.take() for token in part]

    taken = [sequence(packer, coming) for _ in range(3 * LINE)]
    for start in range(0, 3 * LINE, LINE):
        assert len({token for row in taken[start : start + LINE] for token in row}) >= LINE
    assert [row.count(row[0]) for row in taken[: 2 * LINE]] == [8] * (2 * LINE)
    assert max(Counter(token for row in taken for token in row).values()) == 20
    # one that gets the documents again, from the tokens on that are not used, gives the same
    other, rest = Interleave(8), list(coming)
    for position, skip in packer.begun():
        other.add(position, skip, np.full(20 - skip, position))
    again, coming = iter(rest), iter(rest)
    assert [sequence(other, again) for _ in range(9)] == [sequence(packer, coming) for _ in range(9)]


@pytest.mark.parametrize("packing", ["interleave", "best_fit", "concatenate"])
def test_validation_interleaves_nothing(tmp_path, tokenizer, packing):
    write(tmp_path / "a.jsonl", ["a document of some words " * 9] * 9)
    options = [f"--validation.dataset_path={tmp_path}", "--validation.dataset=local", f"--momoe.data_packing={packing}"]
    loader = validator(validation("--validation.steps=2", *options)).validation_dataloader
    assert loader.loader.shape.packing == ("best_fit" if packing == "best_fit" else "concatenate")


@pytest.mark.parametrize("packing", ["concatenate", "interleave", "best_fit"])
def test_positions_say_where_documents_begin(packing):
    order = loader_module.Order([numbered(1, [3, 5, 9, 2, 30] * 60)])
    (loader,) = loaders(order, 1, packing=packing, seq_len=11, with_positions=True)
    for (inputs, labels), _ in zip(loader, range(20), strict=False):
        tokens, positions = inputs["input"].tolist(), inputs["positions"].tolist()
        assert inputs["positions"].shape == inputs["input"].shape == labels.shape
        for row, places, targets in zip(tokens, positions, labels.tolist(), strict=True):
            expected, begin = [], 0
            for i, token in enumerate(row):
                is_padding = i > 0 and targets[i - 1] == IGNORED
                begins = i > 0 and (token != row[i - 1]) and not (is_padding and i > 1 and targets[i - 2] == IGNORED)
                begin = i if begins else begin
                expected.append(i - begin)
            assert places == expected


def validation(*options: str):
    return job("--validation.local_batch_size=2", "--validation.seq_len=16", *options)


def validator(config, ranks=1, rank=0):
    """As the trainer builds it."""
    names = ["parallel_dims", "loss_fn", "validation_context", "maybe_enable_amp", "metrics_processor"]
    return build_validator(
        job_config=config,
        dp_world_size=ranks,
        dp_rank=rank,
        tokenizer=build_tokenizer(config),
        **dict.fromkeys(names, "unused"),
    )


@pytest.mark.parametrize("steps", [-1, 2])
@pytest.mark.parametrize("source", ["python_stdlib_validation", "local"])
def test_each_validation_reads_the_same(tmp_path, source, steps, caplog):
    (tmp_path / "one.txt").write_text("one two three four " * 40)
    options = [f"--validation.dataset={source}"]
    if source == "local":
        options.append(f"--validation.dataset_path={tmp_path}")
    loader = validator(validation(f"--validation.steps={steps}", *options)).validation_dataloader
    n = 2 if steps == 2 else len(list(loader))
    first, second, third = (batches(loader, n) for _ in range(3))
    assert first and first == second == third
    assert "begins to read it" not in caplog.text  # what is read ahead of the last batch is nobody's second pass


def test_a_pass_without_an_end_reads_all_but_the_last_tokens(tmp_path, tokenizer):
    texts = [f"document {i} " + "x " * (i % 7) for i in range(41)]
    write(tmp_path / "a.jsonl", texts)
    loader = build(tokenizer, *local(tmp_path, "--training.seq_len=4"), infinite=False)
    seen = tokens_in((inputs["input"].tolist(), labels.tolist()) for inputs, labels in loader)
    everything = sum(len(tokenizer.encode(text, add_bos=True, add_eos=True)) for text in texts)
    assert everything - 5 < seen.total() <= everything  # less than a sequence may be left over


def test_the_text_field_of_the_job_reaches_the_loader(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", ["some text " * 20], field="body")
    ((inputs, labels),) = batches(build(tokenizer, *local(tmp_path, "--momoe.data_text_field=body")), 1)
    assert tokenizer.decode(inputs[0]).startswith("some text")
    assert inputs[0][1:] == labels[0][:-1]


def test_validation_on_what_is_trained_on_is_said(tmp_path, tokenizer, caplog):
    for name in ("a.jsonl", "b.jsonl", "c.jsonl"):
        write(tmp_path / name)
    (tmp_path / "a").mkdir()  # whose path is the begin of a file's
    write(tmp_path / "a" / "other.jsonl")
    (tmp_path / "job.toml").write_text(f'[[momoe.data]]\npath = ["{tmp_path}/b.jsonl", "{tmp_path}/c.jsonl"]\n')
    one, several = local(tmp_path / "a.jsonl"), [f"--job.config_file={tmp_path}/job.toml"]
    for trained_on, name, said in (
        *((one, "a.jsonl", True), (one, "b.jsonl", False), (one, "a", False)),
        *((several, "a.jsonl", False), (several, "c.jsonl", True)),
    ):
        options = [f"--validation.dataset_path={tmp_path}/{name}", "--validation.dataset=local"]
        build_validation_dataloader(1, 0, tokenizer, job(*trained_on, *options))
        assert ("validation reads data that is trained on" in caplog.text) == said, name
        caplog.clear()


def test_hosts_with_other_data_are_named(tmp_path, tokenizer, monkeypatch):
    write(tmp_path / "a.jsonl", ["one", "two"])
    sent = []
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    monkeypatch.setattr("torch.distributed.broadcast_object_list", lambda found, src: sent.extend(found))
    build(tokenizer, *local(tmp_path))
    monkeypatch.setattr("torch.distributed.broadcast_object_list", lambda found, src: found.__setitem__(src, sent[0]))
    build(tokenizer, *local(tmp_path))
    write(tmp_path / "a.jsonl", ["one", "owt"])
    with pytest.raises(DataError, match=r"not the same for all ranks: rank 0 reads 2 documents \(content .* rank 1 on"):
        build(tokenizer, *local(tmp_path))


def test_what_has_no_effect_is_said(tmp_path, tokenizer, caplog):
    caplog.set_level("INFO")
    write(tmp_path / "a.jsonl")
    build(tokenizer, *local(tmp_path, "--momoe.data_streaming", "--training.dataloader.persistent_workers"))
    assert "momoe.data_streaming has no effect" in caplog.text
    assert "training.dataloader.persistent_workers has no effect" in caplog.text


def test_local_data_opens_no_connection(tmp_path, monkeypatch):
    tried = []

    def refuse(*args, **_):
        tried.append(args)  # whoever tries may catch the error and go on
        raise OSError("no network")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for kind in (".txt", ".jsonl", ".parquet"):
        write(tmp_path / f"a{kind}")
    assert len(batches(build(build_tokenizer(job()), *local(tmp_path)), 3)) == 3
    assert len(batches(build(build_tokenizer(job()), "--training.dataset=python_stdlib"), 1)) == 1
    assert tried == []


def test_data_that_goes_away_is_named_in_one_line(tmp_path, tokenizer):
    loader = build(tokenizer, *local(write(tmp_path / "a.jsonl")))

    def read(_):
        raise OSError("Stale file handle")

    loader.order.sources[0].read = read
    with pytest.raises(DataError) as refused:
        batches(loader, 1)
    assert str(refused.value) == "the data cannot be read any more: Stale file handle"


def test_a_panic_of_the_tokenizer_ends_the_run(tmp_path, tokenizer, monkeypatch):
    """As pyo3 raises one: no Exception, which torchdata's threads do not pass on."""
    loader = build(tokenizer, *local(write(tmp_path / "a.jsonl", ["one", "two"])))

    def panic(_):
        raise type("PanicException", (BaseException,), {})("index out of bounds")

    monkeypatch.setattr(tokenizer, "encode_documents", panic)
    with pytest.raises(DataError, match=r"a.jsonl': one of the documents \[\d.*\] cannot be tokenized: index out"):
        batches(loader, 1)


def test_an_iterator_that_is_left_ends_its_threads(tmp_path, tokenizer):
    before = set(threading.enumerate())
    iterator = iter(build(tokenizer, *local(write(tmp_path / "a.jsonl"))))
    next(iterator)
    started = set(threading.enumerate()) - before
    assert started
    iterator.close()
    for thread in started:
        thread.join(timeout=10)
    assert not [thread for thread in started if thread.is_alive()]


def test_threads_follow_the_cores_of_each_rank(monkeypatch):
    for cores, ranks, threads in ((2, 1, 1), (16, 1, 4), (16, 8, 1), (1, 4, 1), (128, 8, 4)):
        monkeypatch.setattr(loader_module.os, "sched_getaffinity", lambda _, n=cores: range(n))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert loader_module._own_threads() == threads


def test_other_names_go_to_torchtitan(tmp_path, tokenizer, monkeypatch, caplog):
    """Its dataset c4_test stands for all that have another loader; a file takes the place of its download."""
    rows = Dataset.from_dict({"text": [f"row {i} " * 9 for i in range(8)]})
    monkeypatch.setitem(DATASETS, "c4_test", DatasetConfig("", lambda _: rows, lambda row: row["text"]))
    loader = build(tokenizer, "--training.dataset=c4_test")
    assert isinstance(loader, StreamedDataloader)
    batches(loader, 3)
    state = loader.state_dict()
    resumed = build(tokenizer, "--training.dataset=c4_test")
    resumed.load_state_dict(state)
    write(tmp_path / "a.jsonl")
    ours = build(tokenizer, *local(tmp_path))
    assert isinstance(ours, TextDataloader)
    resumed.load_state_dict(ours.state_dict())
    ours.load_state_dict(state)
    resumed.load_ranks([state["dp_rank_0"]] * 2)
    assert caplog.text.count("THE DATA STARTS AGAIN") == 3


def test_registering_again_keeps_torchtitans_datasets(tmp_path):
    register_datasets()
    register_datasets()
    assert {"c4", "python_stdlib", "python_stdlib_validation", "local"} <= set(DATASETS)
    assert DATASETS["local"].loader(str(write(tmp_path / "a.jsonl")))["text"][3] == "the end\n"


def test_the_state_is_json(tmp_path, tokenizer):
    loader = build(tokenizer, *local(write(tmp_path / "a.jsonl")))
    batches(loader, 2)
    state = json.loads(loader.state_dict()["dp_rank_0"])
    assert set(state) == {"order", "left", "next", "step"}


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
