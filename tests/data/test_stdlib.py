"""The standard library's sources as a corpus: the same everywhere, split cleanly."""

import sysconfig

import pytest

from momoe_titan.config.section import DataSource
from momoe_titan.data.errors import DataError
from momoe_titan.data.registration import open_source
from momoe_titan.data.stdlib import is_held_out, load_stdlib, stdlib_files

MIXED = [5, 7, 3, 1, 4, 0, 6, 2, 8]  # m0.py to m8.py
HELD_OUT = [32, 49, 73, 74, 75, 126, 128, 172, 191]  # of m0.py to m199.py


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


def test_split_is_the_same_in_every_process_and_version():
    """A hash that each process seeds anew would train on what another rank validates on."""
    held_out = [i for i in range(200) if is_held_out(f"m{i}.py")]
    assert held_out == HELD_OUT


def test_files_are_mixed_in_the_same_way_everywhere(tmp_path):
    for i in range(9):
        (tmp_path / f"m{i}.py").write_text("x = 1\n")
    assert load_stdlib(str(tmp_path))["path"] == [f"m{i}.py" for i in MIXED]


def test_folder_without_sources_is_refused(tmp_path):
    with pytest.raises(DataError, match="dataset_path .* holds no Python source"):
        load_stdlib(str(tmp_path))


def test_a_source_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "broken.py").write_bytes(b"# coding: no-such-encoding\n")
    with pytest.raises(DataError, match="broken.py.*no-such-encoding"):
        for held_out in (False, True):
            load_stdlib(str(tmp_path), held_out)


def test_a_job_has_its_pieces_as_they_are_in_memory(tmp_path):
    """A column of a dataset would decode each of them anew, whenever it is read."""
    for i in range(30):
        (tmp_path / f"file_{i}.py").write_text(f"a = {i}\n")
    source = open_source(DataSource(str(tmp_path), "python_stdlib"), None, "dataset_path")
    assert type(source.texts) is list and source.texts == load_stdlib(str(tmp_path))["text"][:]
    assert source.read([0])[0] is source.texts[0]
