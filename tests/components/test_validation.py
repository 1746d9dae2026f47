"""The validator does not call TorchTitan's constructor: it sets all that the constructor sets."""

import ast
import inspect
import textwrap

from torchtitan.components.validate import Validator

from momoe_titan.components.validation import TextValidator


def attributes_set(cls) -> set[str]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls.__init__)))
    stores = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)]
    return {node.attr for node in stores}


def test_every_attribute_of_titans_validator_is_set():
    assert attributes_set(TextValidator) == attributes_set(Validator)
    assert "validation_dataloader" in attributes_set(Validator)
    ours, theirs = (inspect.signature(cls).parameters for cls in (TextValidator, Validator))
    assert ours.keys() == theirs.keys()
