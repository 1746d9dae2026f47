"""The [momoe] section: read from TOML and from the command line, refused when wrong."""

import math
import re

import pytest
from torchtitan.config import ConfigManager

from momoe_titan.config.section import DataSource, Momoe

MODULE = "momoe_titan.job_config"


@pytest.fixture
def read(tmp_path):
    """Read a [momoe] section written in TOML, and command-line options, as a job would."""

    def read(section: str = "", *options: str):
        file = tmp_path / "job.toml"
        file.write_text(f'[job]\ncustom_config_module = "{MODULE}"\n[momoe]\n{section}\n')
        return ConfigManager().parse_args(["--job.config_file", str(file), *options]).momoe

    return read


@pytest.mark.parametrize(
    "toml, expected",
    [("", [0.0]), ("save_percent = 50", [50.0]), ("save_percent = [0, 37.5, 100]", [0.0, 37.5, 100.0])],
)
def test_save_percent_in_toml(read, toml, expected):
    assert read(toml).save_percent == expected


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--momoe.save_percent", "50"], [50.0]),
        (["--momoe.save-percent=99.5"], [99.5]),
        (["--momoe.save_percent", "0", "50", "100"], [0.0, 50.0, 100.0]),
    ],
)
def test_command_line_wins_over_toml(read, options, expected):
    assert read("save_percent = 1", *options).save_percent == expected


@pytest.mark.parametrize("value", ["-1", "101", "nan", '"50"', "true", "[0, 101]", '["50"]', "[]"])
def test_bad_save_percent_in_toml_is_refused(read, value):
    with pytest.raises(ValueError, match=r"momoe\.save_percent"):
        read(f"save_percent = {value}")


@pytest.mark.parametrize("values", [["-1"], ["101"], ["nan"], ["0", "101"], ["most"]])
def test_bad_save_percent_on_the_command_line_is_refused(read, capsys, values):
    with pytest.raises(SystemExit) as stopped:
        read("", "--momoe.save_percent", *values)
    assert stopped.value.code != 0
    shown = capsys.readouterr()
    # tyro spells the option with a hyphen where the text is no number at all
    assert "momoe.save" in shown.out + shown.err


@pytest.mark.parametrize(
    "fields",
    [
        {"backend": "cuda"},
        {"load_balance_rule": "median"},
        {"load_balance_rate": -0.1},
        {"load_balance_rate": math.nan},
        {"load_balance_rate": "0.1"},
        {"load_balance_rate": [1]},
        {"load_balance_off_layers": [-1]},
        {"load_balance_off_layers": ["1"]},
        {"load_balance_off_layers": 1},
        {"vocab_size": -1},
        {"vocab_size": 2.5},
        {"data_text_field": ""},
        {"data_streaming": "yes"},
        {"data_shuffle": 0},
        {"data_packing": "best"},
        {"check_ids": 1},
    ],
    ids=lambda fields: str(fields),
)
def test_bad_field_is_named_with_its_value(fields):
    ((name, value),) = fields.items()
    with pytest.raises(ValueError) as refused:
        Momoe(**fields)
    assert f"momoe.{name}" in str(refused.value)
    assert repr(value) in str(refused.value)


@pytest.mark.parametrize(
    "table, message",
    [
        ({"path": "a", "wieght": 1}, " has no field 'wieght', only path, dataset, text_field, weight"),
        ({"path": 3}, ".path is 3, must be of type str or a list of str"),
        ({"path": "a", "weight": 0}, ".weight is 0, must be a finite number above 0"),
        ({"path": "a", "weight": math.inf}, ".weight is inf, must be a finite number above 0"),
        ({"path": "a", "text_field": 1}, ".text_field is 1, must be of type str"),
        ({"dataset": "c4"}, ".dataset is 'c4', must be one of 'local', 'python_stdlib'"),
        ({"dataset": "python_stdlib", "path": ["a"]}, ".path is ['a'], must be one folder, or left out"),
        ("a.jsonl", " is 'a.jsonl', must be a table"),
    ],
)
def test_a_bad_source_of_data_is_named(table, message):
    with pytest.raises(ValueError, match=re.escape(f"momoe.data[1]{message}")):
        Momoe(data=[{"path": "a"}, table])


def test_sources_of_data_come_from_tables_and_can_be_overridden(read):
    tables = '[[momoe.data]]\npath = "a"\n[[momoe.data]]\npath = ["b", "c"]\nweight = 2'
    assert read(tables, "--momoe.data.0.weight=3").data == [
        DataSource("a", weight=3.0),
        DataSource(["b", "c"], weight=2),
    ]


def test_defaults_are_the_documented_ones():
    assert Momoe() == Momoe(
        save_percent=[0.0],
        backend="auto",
        load_balance_rate=0.001,
        load_balance_rule="quantile",
        load_balance_average=1.0,
        load_balance_off_layers=[],
        vocab_size=0,
        data_text_field="text",
        data_streaming=False,
        data=[],
        data_shuffle=True,
        data_packing="concatenate",
        check_ids=False,
    )


def test_help_documents_the_section(read, capsys):
    with pytest.raises(SystemExit) as stopped:
        read("", "--help")
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for field in Momoe.__dataclass_fields__:
        assert f"--momoe.{field.replace('_', '-')}" in shown
    assert "keep for the backward" in shown
