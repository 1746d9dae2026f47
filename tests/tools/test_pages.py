"""Pages: links lead somewhere, the README is short, the change log knows the version."""

import importlib.util
import re
from pathlib import Path

import pytest

import momoe_titan

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    str(path.relative_to(ROOT))
    for folder in (".", "docs", "momoe_titan/kernels", "benchmarks")
    for path in sorted(ROOT.joinpath(folder).glob("*.md"))
]


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """What GitHub makes of the headings."""
    found = set()
    for heading in re.findall(r"^#+ +(.+?) *$", without_code(text), flags=re.MULTILINE):
        heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        number = 1
        unique = anchor
        while unique in found:
            unique, number = f"{anchor}-{number}", number + 1
        found.add(unique)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = re.sub(r"`[^`\n]*`", "", without_code(ROOT.joinpath(page).read_text()))
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"""(?:src|href|srcset)=["']([^"']+)["']""", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = ROOT.joinpath(page).parent.joinpath(path).resolve() if path else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            dead.append(link)
    assert dead == []


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "momoe_titan/kernels/README.md"])  # others: tests/docs
def test_files_named_in_a_page_exist(page):
    folders = "momoe_titan|tests|benchmarks|scripts|docs|train_configs"
    text = ROOT.joinpath(page).read_text()
    named = re.findall(rf"(?<![\w./-])((?:{folders})/[\w./-]+\.(?:py|sh|toml|md|json|csv|html|png))\b", text)
    assert [name for name in named if not ROOT.joinpath(name).exists()] == []


def test_modules_named_in_the_change_log_exist():
    log = ROOT.joinpath("CHANGELOG.md").read_text()
    missing = []
    for cell in re.findall(r"^ *\| `momoe_titan[^|]*\| (.*?) \|$", log, flags=re.MULTILINE):
        package = ""
        for name in re.findall(r"`([\w.]+)`", cell):
            if not name.startswith("."):
                package = name.rpartition(".")[0]
            module = package + name if name.startswith(".") else name
            try:
                found = importlib.util.find_spec(module)
            except ModuleNotFoundError:
                found = None
            if found is None:
                missing.append(module)
    assert missing == []


def test_readme_is_short():
    assert len(ROOT.joinpath("README.md").read_text().splitlines()) < 150


def test_change_log_has_the_version():
    log = ROOT.joinpath("CHANGELOG.md").read_text()
    releases = re.findall(r"^## \[?(.+?)\]?(?: - .*)?$", log, flags=re.MULTILINE)
    assert releases[0] == "Unreleased"
    assert momoe_titan.__version__ in releases
