"""Tags of metrics: listed once, and found again in event files."""

import ast
from pathlib import Path

import pytest

from momoe_titan.dashboard import tags

ROOT = Path(__file__).parents[2]
TAGS = {value for name, value in vars(tags).items() if name.isupper()} - {tags.EVENT_FILES, tags.GRAD_NORM}
TAGS -= {tags.LEARNING_RATE, tags.TFLOPS, tags.RUN, tags.VALIDATION}  # words that mean other things elsewhere


def strings(file: Path) -> set[str]:
    return {node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant)}


@pytest.mark.parametrize("folder", ["momoe_titan", "benchmarks"])
def test_no_tag_is_typed_elsewhere(folder):
    files = [file for file in (ROOT / folder).rglob("*.py") if file != Path(tags.__file__).resolve()]
    assert len(TAGS) > 40 and files
    assert {file: found for file in files if (found := strings(file) & TAGS)} == {}


def test_layers_are_found_by_their_tags():
    for layer_id in (0, 7, 123):
        assert tags.maxvio_layer_id(tags.maxvio_layer(layer_id)) == layer_id
    for other in (tags.MAXVIO_MEAN, tags.MAXVIO_LAYER, tags.MAXVIO_LAYER + "x"):
        assert tags.maxvio_layer_id(other) is None
