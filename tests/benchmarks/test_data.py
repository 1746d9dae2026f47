"""The benchmark of the data loader: its texts, and what it makes of its windows."""

import json

import pytest

from benchmarks.data import summarise, write_texts


def test_texts_are_records_of_so_many_megabytes(tmp_path):
    documents = write_texts(str(tmp_path / "a.jsonl"), 1)
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    assert len(lines) == documents
    assert 1e6 < sum(len(json.loads(line)["text"]) for line in lines) < 3e6


def test_windows_are_compared_with_those_of_one_batch():
    windows = [{"kind": "kept", "seconds": seconds, "waited": 0.0} for seconds in (1.0, 1.0, 1.0)]
    windows += [{"kind": "new", "seconds": seconds, "waited": 0.01} for seconds in (1.0, 1.25, 1.25)]
    summary = summarise(windows, 1000)
    assert summary["kept"]["percent_of_kept"] == 100
    assert summary["new"] == {
        "tokens_per_s": 800,
        "percent_of_kept": 80,
        "swing_percent": 25,
        "waiting_percent": pytest.approx(100 * 0.03 / 3.5, abs=0.01),
    }
