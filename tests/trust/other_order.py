"""A plugin of pytest that runs the tests in a random order: none may depend on those before it.

ORDER_SEED=1 python -m pytest -p tests.trust.other_order
"""

import os
import random

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.nodeid)
    random.Random(os.environ.get("ORDER_SEED", "0")).shuffle(items)
