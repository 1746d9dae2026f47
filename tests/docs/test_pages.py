"""The pages can be trusted: commands and options exist, code runs, and prose is not a list of numbers."""

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest
import torch
from torchtitan.config import ConfigManager

from tests.docs import words

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND_FILES = [*PAGES, *sorted((ROOT / "train_configs").glob("*.toml"))]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_fewer_than_one_word_in_ten_holds_a_digit(path):
    assert words.digit_share(path.read_text()) < 0.1


def test_words_in_code_and_tables_do_not_count():
    page = "One two 3 four\n\n| 1 | 2 |\n\n```\n4 5 6\n```\n[five](6.md) <!-- 7 -->\n"
    assert words.digit_share(page) == pytest.approx(1 / 5)


@pytest.mark.parametrize("path", COMMAND_FILES, ids=name_of)
def test_commands_and_files_that_are_named_exist(path):
    text = path.read_text()
    for module in re.findall(r"-m (momoe_titan[\w.]*)", text):
        assert importlib.util.find_spec(module), f"{name_of(path)} names {module}"
    for file in re.findall(r"(?<![\w/])(?:\./)?((?:scripts|benchmarks|train_configs|docs|tests)/[\w./-]+\.\w+)", text):
        assert (ROOT / file).exists(), f"{name_of(path)} names {file}"
    for name in re.findall(r"(?<![\w/])(momoe_titan/[\w/]+\.(?:py|json|html))", text):
        assert (ROOT / name).exists(), f"{name_of(path)} names {name}"


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_toml_in_a_page_names_sections_and_fields_that_exist(path):
    config = ConfigManager().parse_args(["--job.custom_config_module=momoe_titan.job_config"])
    for block in re.findall(r"^```toml\n(.*?)^```$", path.read_text(), flags=re.DOTALL | re.MULTILINE):
        for section, values in tomllib.loads(block).items():
            assert hasattr(config, section), f"{name_of(path)}: [{section}]"
            for field in values:
                assert hasattr(getattr(config, section), field), f"{name_of(path)}: {section}.{field}"


def test_options_that_pages_name_exist():
    """Each --section.field of a page is one that training takes."""
    config = ConfigManager().parse_args(["--job.custom_config_module=momoe_titan.job_config"])
    for path in COMMAND_FILES:
        for section, field in re.findall(r"--([a-z_]+)\.([a-z_\-]+)", path.read_text()):
            if (section, field) in (("section", "field"), ("override", "imports")):
                continue  # an example; and TorchTitan 0.3's, whose own environment checks it
            field = re.sub(r"^no[_-]", "", field).replace("-", "_")
            assert hasattr(getattr(config, section, None), field), f"{name_of(path)}: --{section}.{field}"


PAGES_THAT_RUN = [ROOT / name for name in ("README.md", "docs/layer.md", "docs/use_it_in_your_model.md")]


@pytest.mark.parametrize("path", PAGES_THAT_RUN, ids=name_of)
def test_python_in_a_page_runs(path):
    """The blocks of a page run one after the other, as a reader would paste them."""
    blocks = re.findall(r"^```python\n(.*?)^```$", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert blocks
    torch.manual_seed(0)
    scope: dict = {}
    for block in blocks:
        exec(compile(block, name_of(path), "exec"), scope)
