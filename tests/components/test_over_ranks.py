"""What is summed, and what is the worst, over the ranks of a job."""

from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from momoe_titan.components.training_step import TrainingStep
from momoe_titan.components.validation import TextValidator
from tests.support.forks import in_gloo_forks


def test_the_losses_that_are_logged(tmp_path):
    assert in_gloo_forks(3, tmp_path / "store", _log)


def _log() -> None:
    """Each rank has its own tokens, of which the loss is a part of the mean over all."""
    tokens = torch.tensor([1.0, 4.0, 5.0])
    means = torch.tensor([7.0, 2.0, 3.0])
    rank, told = dist.get_rank(), []
    trainer = SimpleNamespace(
        ntokens_seen=100 * (rank + 1),
        step=9,
        parallel_dims=SimpleNamespace(
            dp_cp_enabled=True, get_mesh=lambda name: SimpleNamespace(get_group=lambda: dist.group.WORLD)
        ),
        metrics_processor=SimpleNamespace(start_log=lambda *args: told.append(args)),
    )
    loss = means[rank] * tokens[rank] / tokens.sum()
    TrainingStep._log(trainer, loss, tokens.sum(), tokens[rank], torch.tensor(0.5), 1e-3)
    ((step, numbers, lr),) = told
    assert step == 9 and lr == 1e-3
    torch.testing.assert_close(numbers.loss.float(), (means * tokens).sum() / tokens.sum())
    torch.testing.assert_close(numbers.worst_loss, torch.tensor(7.0))
    assert numbers.tokens_seen == 600 and numbers.grad_norm == 0.5


def test_the_loss_of_a_validation(tmp_path):
    """A token counts as much on whichever rank it is."""
    assert in_gloo_forks(2, tmp_path / "store", _mean)


def _mean() -> None:
    mesh = init_device_mesh("cpu", (2,))
    dims = SimpleNamespace(dp_cp_enabled=True, get_optional_mesh=lambda name: {"loss": mesh}[name])
    validator = SimpleNamespace(parallel_dims=dims, pp_schedule=None)
    loss_and_tokens = [[6.0, 1.0], [9.0, 4.0]][dist.get_rank()]
    assert TextValidator._mean(validator, torch.tensor(loss_and_tokens, dtype=torch.float64)) == 3.0
