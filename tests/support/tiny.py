"""A model small enough for a test to train a few steps of, and what it takes to do so."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torchtitan.config import JobConfig
from torchtitan.models.moe import MoEArgs

from momoe_titan.components.optimizer import build_momoe_optimizers
from momoe_titan.config.section import Momoe
from momoe_titan.model import MomoeLlama, MomoeLlamaArgs

VOCAB, SEQ = 64, 16
ONE_PROCESS = SimpleNamespace(
    fsdp_enabled=False,
    dp_replicate_enabled=False,
    tp_enabled=False,
    cp_enabled=False,
    ep_enabled=False,
    pp_enabled=False,
    dp_replicate=1,
    dp_shard=1,
    tp=1,
    get_optional_mesh=lambda name: None,
)


def tiny_args(moe: dict | None = None, **fields) -> MomoeLlamaArgs:
    """Two MoE layers behind a dense one; 5 experts of which tokens choose 2, one shared."""
    moe = {
        "num_experts": 5,
        "top_k": 2,
        "num_shared_experts": 1,
        "score_func": "sigmoid",
        "route_norm": True,
        "score_before_experts": False,
        "use_grouped_mm": False,  # the tensors are on the CPU, also where there is a GPU
        **(moe or {}),
    }
    fields = {
        "dim": 24,
        "n_layers": 3,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 8,
        "vocab_size": VOCAB,
        "max_seq_len": SEQ,
        "n_dense_layers": 1,
        "dense_hidden_dim": 32,
        "moe_hidden_dim": 10,
        "load_balance_rate": 0.01,
        "load_balance_rule": "sign",
        **fields,
    }
    return MomoeLlamaArgs(moe_args=MoEArgs(**moe), **fields)


def build(args: MomoeLlamaArgs, seed: int = 0, parallelize=None, device="cpu") -> MomoeLlama:
    """Through the meta device, as TorchTitan's trainer does."""
    with torch.device("meta"):
        model = MomoeLlama(args)
    if parallelize is not None:
        model = parallelize(model)
    model.to_empty(device=device)
    torch.manual_seed(seed)
    model.init_weights()
    return model.train()


def job_config(**momoe) -> JobConfig:
    """A job for the tiny model; `momoe` becomes the [momoe] section where it is given."""
    config = JobConfig()
    config.training.seq_len = SEQ
    config.activation_checkpoint.mode = "none"
    if momoe:
        defaults = {
            **vars(Momoe()),
            "save_percent": [0.0],
            "load_balance_rule": "sign",
            "load_balance_average": 1.0,
            "loss_chunk_mib": 0.006,  # 24 tokens of the tiny model: several chunks, the last one shorter
        }
        config.momoe = SimpleNamespace(**{**defaults, **momoe})
    return config


def optimizers_for(model, parallel_dims=ONE_PROCESS, **fields):
    config = JobConfig().optimizer
    config.implementation = "for-loop"
    config.lr = 1e-2
    for name, value in fields.items():
        setattr(config, name, value)
    return build_momoe_optimizers([model], config, parallel_dims)


def batch(seed: int, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(VOCAB, (size, SEQ + 1), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


def loss_of(model, tokens, labels, scale: float = 1.0) -> torch.Tensor:
    return F.cross_entropy(model(tokens).flatten(0, 1).float(), labels.flatten()) * scale


def moes(model) -> list[torch.nn.Module]:
    return [block.moe for block in model.layers.values() if block.moe_enabled]


def train(model, steps: int = 3, microbatches: int = 1, between=None) -> dict[str, torch.Tensor]:
    """Losses, counts of each step and final biases of a short training run."""
    optimizers = optimizers_for(model)
    device = model.freqs_cis.device
    losses, counts = [], []
    for step in range(steps):
        tokens, labels = (t.to(device) for t in batch(step))
        total = torch.zeros((), device=device)
        for x, y in zip(tokens.chunk(microbatches), labels.chunk(microbatches), strict=True):
            loss = loss_of(model, x, y, 1 / microbatches)
            loss.backward()
            total += loss.detach()
        losses.append(total)
        optimizers.step()
        optimizers.zero_grad()
        counts.append(optimizers.load_balancer.counts_LE)
        if between is not None:
            between(model)
    return {
        "losses": torch.stack(losses),
        "counts": torch.stack(counts),
        "bias": torch.stack([moe.expert_bias for moe in moes(model)]).clone(),
    }


def assert_same_run(run, expected, **tolerance) -> None:
    """Counts and biases to the bit, losses within a tolerance (0 by default)."""
    torch.testing.assert_close(run["losses"], expected["losses"], **(tolerance or {"rtol": 0, "atol": 0}))
    assert torch.equal(run["counts"], expected["counts"])
    assert torch.equal(run["bias"], expected["bias"])
