"""The output layer with the loss in it. tests/kernels/test_cross_entropy.py checks the values."""

import torch

from momoe_titan.model.output import OutputLayer


def test_the_loss_is_no_view():
    """FSDP warns of modules that return one: a change in place would lose its hooks."""
    torch.manual_seed(0)
    layer = OutputLayer(8, 16, chunk_mib=1)
    loss = layer(torch.randn(2, 3, 8), torch.randint(16, (2, 3)))
    assert loss.shape == (1,) and loss.requires_grad and loss._base is None
