"""docs/toml_reference.md says all of the [momoe] section, and what it says is true today."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from momoe_titan.config import section as job_config

SCRIPT = Path(__file__).parents[2] / "scripts/toml_reference.py"
spec = importlib.util.spec_from_file_location("toml_reference", SCRIPT)
toml_reference = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toml_reference)


def test_the_page_is_up_to_date_and_complete():
    assert toml_reference.main(["--check"]) == 0, "run python scripts/toml_reference.py"
    headings = [line[3:] for line in toml_reference.PAGE.read_text().splitlines() if line.startswith("## ")]
    assert headings == [field.name for field in dataclasses.fields(job_config.Momoe)]


def test_a_page_that_is_not_is_noticed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(toml_reference, "PAGE", tmp_path / "page.md")
    assert toml_reference.main(["--check"]) == 1
    assert "is not up to date" in capsys.readouterr().err
    assert toml_reference.main([]) == toml_reference.main(["--check"]) == 0
    text = toml_reference.PAGE.read_text().replace("`0.001`", "`0.01`")
    toml_reference.PAGE.write_text(text)
    assert toml_reference.main(["--check"]) == 1


def test_a_field_without_a_word_is_refused(monkeypatch):
    monkeypatch.setattr(toml_reference, "field_docs", lambda cls: {"save_percent": "Some."})
    with pytest.raises(ValueError, match=r"momoe\.\w+ has no docstring"):
        toml_reference.page()
