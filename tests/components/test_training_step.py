"""Which precision a job computes in, and that a step is TorchTitan's."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.distributed import utils as dist_utils

from momoe_titan.components.compute_weights import ComputeWeights
from momoe_titan.components.training_step import TrainingStep, reason_for_autocast
from momoe_titan.config.section import Momoe
from tests.support.tiny import ONE_PROCESS, batch, build, job_config, loss_of, optimizers_for, tiny_args


class Trainer(TrainingStep):
    """The least that the step needs of TorchTitan's trainer."""

    def __init__(self, precision: str = "float32", microbatches: int = 1, dims=ONE_PROCESS, **fields):
        self.job_config = job_config()
        self.job_config.momoe = Momoe(**fields)
        self.job_config.model.name = "momoe_llama"
        self.job_config.training.mixed_precision_param = precision
        self.job_config.training.max_norm = 0.3  # less than any step's
        self.parallel_dims = SimpleNamespace(**{**vars(dims), "dp_enabled": False, "dp_cp_enabled": False})
        self.device, self.step, self.ntokens_seen = torch.device("cpu"), 1, 5
        self.gradient_accumulation_steps = microbatches
        self.model_parts = [build(tiny_args(load_balance_rate=0.0))]
        self.optimizers = optimizers_for(self.model_parts[0], implementation="fused", lr=0.05)
        self.lr_schedulers = SimpleNamespace(
            schedulers=[SimpleNamespace(get_last_lr=lambda: [0.05])], step=lambda: None
        )
        self.checkpointer = SimpleNamespace(maybe_wait_for_staging=lambda: None)
        self.metrics_processor = SimpleNamespace(
            should_log=lambda step: True, start_log=self.log, finish_log=lambda: None
        )
        self.maybe_enable_amp = contextlib.nullcontext()
        self.logged = []
        self.set_up_precision()

    def log(self, step, numbers, lr):
        assert lr == 0.05
        self.logged.append(tuple(number.item() for number in numbers))

    def forward_backward_step(self, input_dict, labels, global_valid_tokens):
        with self.maybe_enable_amp:
            logits = self.model_parts[0](input_dict["input"])
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )
        loss = loss / global_valid_tokens
        loss.backward()
        return loss

    def train(self, steps: int = 2) -> list[torch.Tensor]:
        for step in range(steps):
            tokens, labels = batch(step)
            labels = labels.clone()
            labels[:3, :5] = IGNORE_INDEX
            parts = [t.chunk(self.gradient_accumulation_steps) for t in (tokens, labels)]
            self.train_step(({"input": x}, y) for x, y in zip(*parts, strict=True))
        return [p.detach().clone() for p in self.model_parts[0].parameters()]


def as_torchtitan_does(steps: int = 2) -> tuple[list, list]:
    """Parameters and losses, by its clipping and torch's optimizer."""
    model, losses = build(tiny_args(load_balance_rate=0.0)), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for step in range(steps):
        tokens, labels = batch(step)
        labels = labels.clone()
        labels[:3, :5] = IGNORE_INDEX
        loss = torch.nn.functional.cross_entropy(
            model(tokens).flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX
        )
        loss.backward()
        norm = dist_utils.clip_grad_norm_(model.parameters(), 0.3, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        losses.append((loss.item(), norm.item()))
    return [p.detach() for p in model.parameters()], losses


@pytest.mark.parametrize("microbatches", [1, 4])
def test_steps_are_those_of_torchtitan(microbatches):
    trainer = Trainer(microbatches=microbatches)
    parameters = trainer.train()
    expected, losses = as_torchtitan_does()
    assert trainer.logged[0][3] == 5
    for (loss, worst, norm, _), (wanted, wanted_norm) in zip(trainer.logged, losses, strict=True):
        assert loss == worst == pytest.approx(wanted, rel=1e-5) and norm == pytest.approx(wanted_norm, rel=1e-4)
    for got, want in zip(parameters, expected, strict=True):
        # of a first step's few gradients near 0 Adam makes steps of any size
        assert ((got - want).norm() / want.norm()).item() < 1e-3


@pytest.mark.parametrize("microbatches", [1, 4])
def test_bfloat16_moves_float32_weights(microbatches):
    """Close to float32, and not the same. Gradients of several microbatches are added in float32."""
    exact, trainer = Trainer(), Trainer("bfloat16", microbatches)
    assert isinstance(trainer.weights, ComputeWeights) and exact.weights is None
    assert trainer.weights.sums_in_parameters_dtype == (microbatches > 1)
    initial = [p.detach().clone() for p in exact.model_parts[0].parameters()]
    parameters, wanted = trainer.train(), exact.train()
    assert all(p.dtype == torch.float32 for p in parameters)
    for (loss, _, norm, _), (exact_loss, _, exact_norm, _) in zip(trainer.logged, exact.logged, strict=True):
        assert loss != exact_loss and loss == pytest.approx(exact_loss, rel=5e-3)
        assert norm == pytest.approx(exact_norm, rel=5e-2)
    moved, gone_wrong = (
        torch.cat([(a - b).flatten() for a, b in zip(wanted, other, strict=True)]).norm()
        for other in (initial, parameters)
    )
    assert 0 < gone_wrong < 0.5 * moved


def test_a_step_that_is_skipped_moves_nothing():
    trainer = Trainer("bfloat16")
    before = [p.detach().clone() for p in trainer.model_parts[0].parameters()]
    hook = trainer.model_parts[0].output.register_forward_hook(lambda module, args, out: out * float("nan"))
    assert all(map(torch.equal, trainer.train(1), before))
    hook.remove()
    assert trainer.optimizers.non_finite_guard.skipped_steps == 1
    assert not any(map(torch.equal, trainer.train(1), before))


@pytest.mark.parametrize(
    "fields, dims, early, reason",
    [
        ({}, {}, False, None),
        ({"mixed_precision": "autocast"}, {}, False, "momoe.mixed_precision"),
        ({}, {"dp_replicate_enabled": True}, False, "DistributedDataParallel"),
        ({}, {}, True, "early_step_in_backward"),
    ],
)
def test_which_jobs_take_autocast(fields, dims, early, reason):
    config = job_config()
    config.momoe, config.optimizer.early_step_in_backward = Momoe(**fields), early
    found = reason_for_autocast(config, SimpleNamespace(**{**vars(ONE_PROCESS), **dims}))
    assert found is None if reason is None else reason in found


def test_one_line_says_which(caplog):
    with caplog.at_level("INFO"):
        Trainer("bfloat16")
        Trainer("bfloat16", mixed_precision="autocast")
        Trainer()
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Precision")]
    assert len(lines) == 2 and "weights and residuals as under FSDP" in lines[0] and "autocast" in lines[1]


@pytest.mark.parametrize("parallelism", ["tp_enabled", "pp_enabled"])
def test_no_line_speaks_of_an_autocast_that_torchtitan_does_not_have(parallelism, caplog):
    with caplog.at_level("INFO"):
        Trainer(
            "bfloat16", dims=SimpleNamespace(**{**vars(ONE_PROCESS), parallelism: True}), mixed_precision="autocast"
        )
    (record,) = [r for r in caplog.records if r.getMessage().startswith("Precision")]
    assert record.levelname == "WARNING" and "float32 throughout" in record.getMessage()


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_experts_that_fsdp_leaves_out_compute_with_copies(precision):
    """FSDP casts all other weights itself."""
    trainer = Trainer(precision, dims=SimpleNamespace(**{**vars(ONE_PROCESS), "fsdp_enabled": True}))
    assert trainer.weights is None
    dtype, moe = getattr(torch, precision), trainer.model_parts[0].layers["1"].moe
    moe.experts.compute_dtype = dtype
    trainer.set_up_precision()
    with trainer.maybe_enable_amp:
        parameters = dict(trainer.model_parts[0].named_parameters())
        cast = {name for name, parameter in parameters.items() if parameter.dtype == torch.bfloat16}
        assert moe.experts.w1.dtype == dtype
    assert cast == ({"layers.1.moe.experts.w1", "layers.1.moe.experts.w2"} if precision == "bfloat16" else set())
    assert (trainer.weights is None) == (precision == "float32")


def test_validation_computes_with_the_copies():
    trainer = Trainer("bfloat16")
    with torch.no_grad(), trainer.maybe_enable_amp:
        loss = loss_of(trainer.model_parts[0], *batch(0))
        assert trainer.model_parts[0].output.weight.dtype == torch.bfloat16
    assert loss.isfinite() and trainer.model_parts[0].output.weight.dtype == torch.float32
