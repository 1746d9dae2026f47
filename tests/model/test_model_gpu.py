"""The model on a GPU: Triton kernels inside, bfloat16 autocast around."""

from functools import partial

import pytest
import torch
from torchtitan.models.moe import MoEArgs

from momoe_titan.components.optimizer import ExpertLoadBalancer
from momoe_titan.model import MomoeMoE, MomoeRouter, parallelize_momoe_llama
from momoe_titan.moe import expert_stats as counting
from tests.support.tiny import (
    ONE_PROCESS,
    assert_same_run,
    build,
    job_config,
    tiny_args,
    train,
)

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
MOE = {"num_experts": 8, "top_k": 2, "use_grouped_mm": True}
# widths that TorchTitan's grouped GEMM takes
WIDE = {"dim": 128, "head_dim": 32, "moe_hidden_dim": 64, "dense_hidden_dim": 256}


def run(config=None, steps=4, **fields):
    parallelize = partial(
        parallelize_momoe_llama,
        parallel_dims=ONE_PROCESS,
        job_config=config or job_config(),
    )
    model = build(tiny_args(MOE, **WIDE, **fields), parallelize=parallelize, device=DEVICE)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        return train(model, steps)


@pytest.fixture(scope="module")
def plain():
    return run(save_percent=[37.0])


def test_same_seed_twice(plain):
    assert_same_run(run(save_percent=[37.0]), plain)


@pytest.mark.parametrize("percent", [0.0, 100.0])
def test_save_percent_does_not_change_the_run(plain, percent):
    losses = run(save_percent=[percent])["losses"]
    torch.testing.assert_close(losses, plain["losses"], rtol=1e-3, atol=0)


@pytest.mark.parametrize(("mode", "option"), [("full", "2"), ("selective", "op"), ("selective", "2")])
def test_activation_checkpointing_changes_nothing(plain, mode, option):
    config = job_config()
    config.activation_checkpoint.mode = mode
    config.activation_checkpoint.selective_ac_option = option
    assert_same_run(run(config, save_percent=[37.0]), plain)


def test_stock_moe_gives_nearly_the_same_losses(plain):
    stock = run(backend="torchtitan")
    torch.testing.assert_close(stock["losses"], plain["losses"], rtol=0.01, atol=0)


@pytest.mark.parametrize("mode", ["none", "full"])
def test_torch_compile(plain, mode):
    config = job_config()
    config.compile.enable = True
    config.activation_checkpoint.mode = mode
    torch._dynamo.reset()
    compiled = run(config, save_percent=[37.0])
    torch.testing.assert_close(compiled["losses"], plain["losses"], rtol=0.01, atol=0)
    assert torch.equal(compiled["counts"].sum(-1), plain["counts"].sum(-1))


def test_layer_and_hook_do_not_wait_for_the_device(monkeypatch):
    args = MoEArgs(num_experts=8, top_k=2, score_before_experts=False)
    moe = MomoeMoE(args, 128, 64, load_balance_rate=0.1, load_balance_rule="sign", save_percent=50).to(DEVICE)
    with torch.no_grad():
        moe.init_weights(0.1, torch.device(DEVICE))
    balancer = ExpertLoadBalancer([moe])

    def step(tokens):
        x = torch.randn(2, tokens, 128, device=DEVICE, requires_grad=True)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            out = moe(x)
        out.float().sum().backward()
        balancer()

    monkeypatch.setattr(counting, "_entropy_wanted", True)
    step(64)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(64)
        step(77)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert balancer.counts_LE.sum() == 2 * 77 * 2


def test_lowest_id_wins_among_equals():
    # as many experts as a warp, a block and more have lanes
    for num_experts in (8, 33, 128, 256):
        args = MoEArgs(num_experts=num_experts, top_k=5, score_before_experts=False)
        router = MomoeRouter(16, args).to(DEVICE)
        with torch.no_grad():
            router.gate.weight.zero_()
        _, ids = router(torch.randn(1000, 16, device=DEVICE))
        assert torch.equal(ids.cpu(), torch.arange(5).expand(1000, 5))


def test_meta_init_zeroes_buffers_on_the_device():
    model = build(tiny_args(MOE, **WIDE), device=DEVICE)
    for name, buffer in model.named_buffers():
        assert buffer.device.type == DEVICE, name
        if "freqs" not in name:
            assert not buffer.any(), name
