"""Tables and charts of the pages are those of the measurements."""

import json
import shutil

import pytest

from benchmarks import report


def test_tables_and_charts_are_up_to_date():
    assert report.main(["--check"]) == 0, "run python benchmarks/report.py"


@pytest.mark.parametrize("path", sorted(report.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_a_measurement_says_where_it_comes_from(path):
    result = json.loads(path.read_text())
    for key in ("title", "hardware", "versions", "date", "code", "command"):
        assert result["about"][key], key
    assert {"torch", "triton", "sonicmoe", "torchtitan"} & set(result["about"]["versions"])
    for row in result["rows"]:
        assert set(row) <= set(result["columns"])


def test_every_table_is_in_a_page():
    pages = [report.ROOT / "README.md", *report.DOCS.glob("*.md")]
    used = {match[2] for page in pages for match in report.BLOCK.finditer(page.read_text())}
    assert used == set(report.TABLES)


def copied(tmp_path, monkeypatch):
    """README, docs and results in a folder of the test's own."""
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "DOCS", shutil.copytree(report.DOCS, tmp_path / "docs"))
    shutil.copy(report.RESULTS.parents[1] / "README.md", tmp_path)
    monkeypatch.setattr(report, "RESULTS", shutil.copytree(report.RESULTS, tmp_path / "results"))


def test_a_number_that_changed_is_noticed_and_written(tmp_path, monkeypatch, capsys):
    copied(tmp_path, monkeypatch)
    assert report.main(["--check"]) == 0
    file = report.RESULTS / "layer_h100.json"
    file.write_text(file.read_text().replace('"both": 425', '"both": 9425'))
    assert report.main(["--check"]) == 1
    assert "performance.md" in (said := capsys.readouterr().err) and "layer.png" in said
    assert "| 9,425 |" not in (report.DOCS / "performance.md").read_text(), "--check wrote a page"
    pytest.importorskip("matplotlib")
    assert report.main([]) == 0
    assert "| 9,425 |" in (report.DOCS / "performance.md").read_text()
    assert report.main(["--check"]) == 0


def test_a_number_typed_into_a_page_is_noticed(tmp_path, monkeypatch):
    copied(tmp_path, monkeypatch)
    page = report.DOCS / "performance.md"
    page.write_text(page.read_text().replace("| 425 |", "| 525 |"))
    assert report.main(["--check"]) == 1


def test_a_table_nobody_knows_is_named(tmp_path):
    with pytest.raises(ValueError, match="'speeed'"):
        report.filled("<!-- table: speeed -->\n<!-- /table -->")
