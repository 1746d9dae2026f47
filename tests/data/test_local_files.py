"""Local files: which are found, that only their text is read, and that a fault names the file and the line."""

import gzip
import json
import multiprocessing
import os
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from momoe_titan.data import read_texts, text_cache
from momoe_titan.data.errors import DataError
from momoe_titan.data.local_files import load_local
from momoe_titan.data.read_texts import KINDS
from tests.support.text_data import TEXTS, write


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Texts are cached in a folder of the test, not in the user's."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def texts(path, field: str = "text") -> list[str]:
    source = load_local(path if isinstance(path, list) else str(path), field)
    return source.read(range(len(source)))


def compress(path: Path, ending: str) -> Path:
    """The same file compressed, in place of it, in two pieces as a program that appends writes them."""
    content, packed = path.read_bytes(), path.with_name(path.name + ending)
    halves = content[: len(content) // 2], content[len(content) // 2 :]
    pack = gzip.compress if ending == ".gz" else lambda part: pa.compress(part, codec="zstd", asbytes=True)
    packed.write_bytes(b"".join(map(pack, halves)))
    path.unlink()
    return packed


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_file(tmp_path, kind, ending):
    file = write(tmp_path / f"a{kind}", field="body")
    if ending and kind != ".parquet":
        file = compress(file, ending)
    found = texts(file, "body")
    assert found == (["".join(TEXTS)] if kind == ".txt" else TEXTS)


def test_folder_pattern_and_list(tmp_path, caplog):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.jsonl", "sub/c.parquet", "sub/d.jsonl"):
        write(tmp_path / name, [name])
    (tmp_path / "notes.md").write_text("not data")
    assert texts(tmp_path) == ["b.txt", "a.jsonl", "sub/d.jsonl", "sub/c.parquet"]
    (warning,) = [r.getMessage() for r in caplog.records if "does not read" in r.getMessage()]
    assert "notes.md" in warning
    assert texts(f"{tmp_path}/**/*.jsonl") == ["a.jsonl", "sub/d.jsonl"]
    several = [f"{tmp_path}/sub", str(tmp_path / "b.txt"), f"{tmp_path}/*/d.jsonl"]
    assert texts(several) == ["b.txt", "sub/d.jsonl", "sub/c.parquet"]


def test_links_are_followed_and_each_file_is_read_once(tmp_path):
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    data.mkdir()
    elsewhere.mkdir()
    write(elsewhere / "far.jsonl", ["far"])
    write(data / "near.jsonl", ["near"])
    (data / "linked").symlink_to(elsewhere)
    (data / "twice").symlink_to(elsewhere)
    (data / "same.jsonl").symlink_to(data / "near.jsonl")
    (data / "circle").symlink_to(data)
    (data / "nowhere.jsonl").symlink_to(data / "missing.jsonl")
    assert sorted(texts(data)) == ["far", "near"]
    assert sorted(texts([str(data), str(elsewhere)])) == ["far", "near"]


@pytest.mark.parametrize(
    "name", ["a[1].jsonl", "a*.jsonl", "a?.jsonl", "with space.jsonl", "a::b.jsonl", "[x]/a.jsonl"]
)
def test_a_path_that_exists_is_that_path(tmp_path, name):
    for other in ("a1.jsonl", "ab.jsonl", "x/a.jsonl"):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        write(tmp_path / other, ["another"])
    (tmp_path / name).parent.mkdir(exist_ok=True)
    write(tmp_path / name, ["this", "one"])
    assert texts(tmp_path / name) == ["this", "one"]


OTHER_FIELDS = {
    "changes its type": ['"x": 1', '"x": "one"', '"x": {"y": [1, null]}', '"x": [[]]', '"x": null'],
    "appears late": [""] * 4 + ['"late": {"a": 1}'],
    "nests differently": ['"m": {"a": {"b": 1}}', '"m": {"a": [{"b": 2}]}', '"m": {"a": 1.5}'],
    "repeats a key": ['"x": 1, "x": 2', '"x": "s", "x": {}'],
    "is a number too large": ['"n": 123456789012345678901234567890', '"n": 1e999', '"n": ' + "9" * 5000],
    "is no number": ['"n": NaN', '"n": Infinity'],
    "is not Unicode": ['"s": "\\ud800"'],
    "is a date": ['"d": "2020-01-01"', '"d": "2020-01-01T00:00:00"', '"d": "no date"'],
    "is empty": ['"": 1', '"a.b": {}', '"text.x": "y"'],
}


@pytest.mark.parametrize("case", OTHER_FIELDS)
def test_other_fields_of_jsonl_do_not_matter(tmp_path, case):
    lines = [
        "{" + ", ".join(filter(None, [other, json.dumps({"text": f"t{i}"})[1:-1]])) + "}"
        for i, other in enumerate(OTHER_FIELDS[case])
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n\n")
    (tmp_path / "b.jsonl").write_text('{"text": "last", "x": []}')
    assert texts(tmp_path) == [f"t{i}" for i in range(len(lines))] + ["last"]


def test_other_columns_of_parquet_do_not_matter(tmp_path):
    of_map = pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int64()))
    pq.write_table(pa.table({"text": ["a", "b"], "m": of_map}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"m": [1.5], "text": pa.array(["c"], pa.large_string())}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"text": pa.array(["d"]).dictionary_encode(), "m": [{"x": 1}]}), tmp_path / "c.parquet")
    pq.write_table(pa.table({"text": ["e"], "text.m": ["not this"]}), tmp_path / "d.parquet")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "e.parquet")
    assert texts(tmp_path) == ["a", "b", "c", "d", "e"]


def test_empty_files_beside_others_are_no_fault(tmp_path):
    for name in ("a.jsonl", "b.txt", "c.txt.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b"") if name.endswith("gz") else b"")
    write(tmp_path / "z.jsonl", ["text"])
    assert texts(tmp_path) == ["text"]


GOOD = b'{"text": "a"}\n'
FAULTS = {
    "cut.jsonl": (GOOD + b'{"text": ', "line 2 is not JSON"),
    "number.jsonl": (GOOD + b'{"text": 3}\n', "line 2 has no text in the field 'text' (momoe.data_text_field)"),
    "other.jsonl": (GOOD + b'\n{"body": "b"}\n', "line 3 has no text in the field 'text' (momoe.data_text_field), but"),
    "null.jsonl": (GOOD * 3 + b'{"text": null}\n' + GOOD, "line 4 has no text"),
    "bare.jsonl": (GOOD + b"null\n" + GOOD, "line 2 has no text"),  # a crash of Arrow's reader
    "two.jsonl": (GOOD + GOOD[:-1] + GOOD, "line 2 is not JSON"),
    "broken.jsonl": (b'{"text": "a"\n}\n' + GOOD, "line 1 is not JSON"),
    "list.jsonl": (b'["text"]\n', "line 1 has no text"),
    "surrogate.jsonl": (GOOD + b'{"text": "\\ud800"}\n', "line 2 has a text that is not Unicode"),
    "latin.jsonl": (GOOD * 2 + b'{"text": "\xe4"}\n', "line 3 is not JSON"),
    "empty.jsonl": (b"", "no text"),
    "lines.jsonl": (b"\n \n", "no text"),
    "noise.parquet": (b"PAR1 and no more", "agic bytes"),
    "binary.txt": (b"one\ntwo\n\xff\xfe\x00", "line 3 is not UTF-8"),
    "empty.txt": (b"", "no text"),
    "table.csv": (b"text\na\n", ".parquet"),
    "cut.txt.gz": (gzip.compress(os.urandom(999).hex().encode())[:-200], "cannot read"),
    "changed.jsonl.gz": (gzip.compress(GOOD)[:-8] + bytes(8), "cannot read"),
    "noise.jsonl.gz": (b"no gzip at all", "cannot read"),
    "noise.txt.zst": (b"no zstd at all", "cannot read"),
    "cut.txt.zst": (pa.compress(os.urandom(999), codec="zstd", asbytes=True)[:-20], "runcated"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_names_the_file_and_the_line(tmp_path, name):
    content, message = FAULTS[name]
    if not name.startswith(("empty", "lines")):  # one of many
        write(tmp_path / "good.jsonl")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as refused:
        load_local([str(tmp_path / name), str(tmp_path)] if name.endswith("csv") else str(tmp_path))
    assert name in str(refused.value)
    assert message in str(refused.value)


def test_a_fault_behind_many_blocks_has_the_right_line(tmp_path, monkeypatch):
    monkeypatch.setattr(read_texts, "BLOCK_SIZE", 100)
    long = json.dumps({"text": "x" * 1000}).encode() + b"\n"
    (tmp_path / "a.jsonl").write_bytes(GOOD * 50 + long + b"\n" + GOOD + b"{\n" + GOOD)
    with pytest.raises(DataError, match=r"a\.jsonl': line 54 is not JSON"):
        load_local(str(tmp_path))
    (tmp_path / "a.jsonl").write_bytes(GOOD * 50 + long + GOOD)
    assert list(map(len, texts(tmp_path))) == [1] * 50 + [1000, 1]


NOT_UTF8 = pa.array([b"a"] * 1100 + [b"\xff"]).view(pa.string())  # in the second batch


@pytest.mark.parametrize("column", [["a", None, "c"], [1, 2, 3], [b"a", b"b", b"c"], NOT_UTF8])
def test_a_fault_in_parquet_names_the_file_and_the_row(tmp_path, column):
    pq.write_table(pa.table({"text": ["fine"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": column}), tmp_path / "b.parquet")
    message = "row 2 has no text" if column[1] is None else "of type (int64|binary), not text"
    message = "row 1101 is not UTF-8" if column is NOT_UTF8 else message
    with pytest.raises(DataError, match=f"b.parquet.*{message}"):
        load_local(str(tmp_path))


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_a_missing_field_names_the_option_and_what_there_is(tmp_path, kind):
    file = write(tmp_path / f"a{kind}", field="body")
    with pytest.raises(DataError, match=r"'text' \(momoe.data_text_field\), but \['(body|id)', '(body|id)'\]"):
        load_local(str(file))


def test_a_cut_parquet_file_is_named(tmp_path):
    file = write(tmp_path / "a.parquet")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match="a.parquet"):
        load_local(str(tmp_path))


@pytest.mark.parametrize("path", ["", "no/such/file.txt", "no/such/*.jsonl"])
def test_a_missing_path_is_refused(path):
    with pytest.raises(DataError, match="dataset_path"):
        load_local(path)


def test_a_long_text_file_is_cut_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(read_texts, "MAX_DOCUMENT_CHARS", 100)
    text = "".join(f"line {i}\n" for i in range(50)) + "x" * 250 + "\n"
    for block in (64, 1 << 20):
        monkeypatch.setattr(read_texts, "BLOCK_SIZE", block)
        (tmp_path / "long.txt").write_text(text + " " * block)
        pieces = texts(tmp_path / "long.txt")
        assert "".join(pieces).strip() == text.strip()
        assert max(map(len, pieces)) <= 100
        assert pieces[0].endswith("\n")


def test_texts_are_read_once_and_again_where_a_file_changes(tmp_path, monkeypatch):
    file = write(tmp_path / "a.jsonl", ["one", "two"])
    first = load_local(str(file))
    monkeypatch.setattr(text_cache, "read_texts", lambda *_: pytest.fail("read again"))
    again = load_local(str(file))
    monkeypatch.undo()
    assert again.fingerprint == first.fingerprint and len(again) == 2
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    assert pickle.loads(pickle.dumps(first)).read([1, 0]) == ["two", "one"]
    # the content alone decides: another name, kind and compression give the same data
    (tmp_path / "b").mkdir()
    compress(write(tmp_path / "b/b.jsonl", ["one", "two"]), ".gz")
    assert load_local(f"{tmp_path}/b").fingerprint == first.fingerprint
    assert load_local(str(write(tmp_path / "a.parquet", ["one", "two"]))).fingerprint == first.fingerprint
    times = os.stat(file)
    write(file, ["one", "TWO"])
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as programs that copy files do
    assert load_local(str(file)).fingerprint != first.fingerprint


def test_a_cache_that_was_cut_off_is_written_again(tmp_path):
    file = write(tmp_path / "a.jsonl")
    cached = load_local(str(file)).file
    Path(cached).write_bytes(Path(cached).read_bytes()[:-9])
    assert texts(file) == TEXTS


def test_one_process_of_a_host_reads_while_the_others_wait(tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", [f"document {i}" for i in range(1000)])
    results = multiprocessing.get_context("fork").Queue()

    def load() -> None:
        written = []
        write_once = text_cache._write
        text_cache._write = lambda *args: (written.append(1), write_once(*args))
        results.put((len(load_local(str(tmp_path))), len(written)))

    processes = [multiprocessing.get_context("fork").Process(target=load) for _ in range(3)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(found) == [(1000, 0), (1000, 0), (1000, 1)]


def test_a_slower_host_leaves_the_file_that_another_has_mapped(tmp_path, monkeypatch):
    """Hosts may share the cache's folder without having locks in common."""
    file = str(write(tmp_path / "a.jsonl", ["one"]))
    read, faster = text_cache.read_texts, []

    def read_slowly(*args):
        monkeypatch.setattr(text_cache, "read_texts", read)
        faster.append(load_local(file).file)
        faster.append(os.stat(faster[0]).st_ino)
        yield from read(*args)

    monkeypatch.setattr(text_cache, "_wait_for", lambda *_: None)
    monkeypatch.setattr(text_cache, "read_texts", read_slowly)
    slower = load_local(file)
    assert [slower.file, os.stat(slower.file).st_ino] == faster and slower.read([0]) == ["one"]
    assert {path.suffix for path in Path(slower.file).parent.iterdir()} == {".arrow", ".json", ".lock"}


def test_a_folder_for_the_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    file = write(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="HF_DATASETS_CACHE"):
        load_local(str(file))
