"""The validator gives the mean loss over all tokens of its batches; it sets all that TorchTitan's constructor sets."""

import ast
import contextlib
import inspect
import textwrap
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torchtitan.components.validate import Validator

from momoe_titan.components import validation
from momoe_titan.components.loss import build_loss
from momoe_titan.components.validation import TextValidator
from tests.support.tiny import ONE_PROCESS, batch, build, job_config, tiny_args


def attributes_set(cls) -> set[str]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls.__init__)))
    stores = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)]
    return {node.attr for node in stores}


def test_every_attribute_of_titans_validator_is_set():
    assert attributes_set(TextValidator) - attributes_set(Validator) == {"before_validation"}
    assert attributes_set(Validator) <= attributes_set(TextValidator)
    assert "validation_dataloader" in attributes_set(Validator)
    ours, theirs = (inspect.signature(cls).parameters for cls in (TextValidator, Validator))
    assert ours.keys() == theirs.keys()


def test_each_token_counts_the_same(monkeypatch):
    """Also where batches have different numbers of labels: a mean of their means would be another."""
    batches = []
    for seed, ignored in ((0, 0), (1, 120), (2, 128)):
        tokens, labels = (t.clone() for t in batch(seed))
        labels.flatten()[:ignored] = -100
        batches.append(({"input": tokens}, labels))
    monkeypatch.setattr(validation, "build_validation_dataloader", lambda *args: batches)
    monkeypatch.setattr("torchtitan.tools.utils.device_type", "cpu")
    dims = SimpleNamespace(**vars(ONE_PROCESS), dp_cp_enabled=False)
    config, model, logged = job_config(), build(tiny_args()), []
    processor = SimpleNamespace(ntokens_since_last_log=0, log_validation=lambda **given: logged.append(given))
    validator = TextValidator(
        job_config=config, dp_world_size=1, dp_rank=0, tokenizer=None, parallel_dims=dims,
        loss_fn=build_loss(config, dims), validation_context=contextlib.nullcontext,
        maybe_enable_amp=contextlib.nullcontext(), metrics_processor=processor,
    )  # fmt: skip
    validator.validate([model], 7)
    with torch.no_grad():
        logits = torch.cat([model(inputs["input"]).flatten(0, 1) for inputs, _ in batches])
    labels = torch.cat([labels.flatten() for _, labels in batches])
    (given,) = logged
    assert given == {"loss": pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6), "step": 7}
    assert processor.ntokens_since_last_log == (labels >= 0).sum() == 128 + 8
    means = [F.cross_entropy(logits[i : i + 128], labels[i : i + 128]).item() for i in (0, 128)]
    assert abs(sum(means) / 2 - given["loss"]) > 1e-3
    assert model.training
