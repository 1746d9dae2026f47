"""Two ranks that share one GPU read each other's memory; what they compute goes to FOLDER/WHAT.RANK.pt.

    python -m tests.support.one_gpu FOLDER PART ...     for each rank, with RANK and the like in the environment

torch's symmetric memory takes ranks of one device where TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES says so. NCCL does
not, so that gloo has all collectives. A kernel that waits at a barrier and the one that it waits for take turns on the
GPU, in slices of milliseconds: the layers here are small.

Without a GPU the same runs on CPUs, where the ranks are forks: see `on_cpus`.
"""

import contextlib
import faulthandler
import functools
import gc
import os
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torchtitan.distributed import ParallelDims, parallel_dims
from torchtitan.models.moe import MoEArgs

from momoe_titan.kernels import outlet
from momoe_titan.model import parallelize_momoe_llama
from momoe_titan.model.moe import MomoeMoE
from momoe_titan.model.parallel import peer_memory
from momoe_titan.model.parallel.expert import spread_experts
from momoe_titan.model.parallel.fsdp import reduce_by_sums
from momoe_titan.moe.expert_stats import prepare_capture, want_entropy
from momoe_titan.train import end_process, one_gloo_thread
from tests.support.fake_peers import FakePeers
from tests.support.forks import in_gloo_forks
from tests.support.tiny import batch, build, job_config, loss_of, moes, optimizers_for, tiny_args
from tests.support.transfers import exchange, replays

RANKS = 2
SECONDS = 85  # of one part; kernels are compiled in it
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")

# Of the layer: tokens of a rank, D, F, experts, and how many a token chooses.
T, D, F, E, K = (256, 256, 128, 8, 2) if GPU else (8, 16, 8, 8, 2)
# Which experts no token may choose, step by step: none, the second rank's, the first rank's. More steps than there are
# staging buffers of a size.
STARVED = [(0, 0), (E // 2, E), (0, E // 2), (0, 0), (E // 2 - 1, E), (0, 0)]
NARROW = torch.bfloat16 if GPU else torch.float32
SAVED = [0.0, 50.0, 100.0]
TRAINED = 3  # steps of the model
WIDTHS = {"dim": 64, "moe_hidden_dim": 64} if GPU else {}


@contextlib.contextmanager
def connected(peers: FakePeers | None) -> Iterator[None]:
    """While open, the ranks of groups are connected."""
    if peers is not None:
        with peers.connected():
            yield
        return
    with mock.patch.object(peer_memory, "_on_one_host", lambda group: True):
        try:
            yield
        finally:
            torch.cuda.synchronize()
            for table in (peer_memory._peers, peer_memory._tried, outlet.OUTLETS):
                table.clear()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: Any) -> torch.Tensor:
    """What this rank has. gloo ends the process where DTensor gathers the whole on a GPU (pytorch issue 152645)."""
    return _local(tensor).detach().clone()


def _clean(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


@torch.no_grad()
def fill(module: torch.nn.Module) -> None:
    """The same weights however they are divided. Those of the router have few bits, so that with the `inputs` no number
    of rows rounds its logits differently; nor are two of a token equal."""
    for name, parameter in module.named_parameters():
        if parameter.dim() < 2:
            continue
        draw = functools.partial(
            torch.randn, generator=torch.Generator().manual_seed(zlib.crc32(_clean(name).encode()))
        )
        drawn = draw(parameter.shape) / parameter.shape[-1] ** 0.5
        if "router" in name:
            drawn = (draw(parameter.shape) * 2).round().clamp(-8, 8) / 16
            drawn[:, 0] = torch.arange(len(drawn)) / 128
        drawn = drawn.bfloat16().float()
        if isinstance(parameter, DTensor):
            whole = distribute_tensor(drawn, parameter.device_mesh, parameter.placements, src_data_rank=None)
            drawn = whole.to_local()
        _local(parameter).copy_(drawn)


def layer(dtype: torch.dtype, backend: str, dispatch: str = "") -> MomoeMoE:
    """One MoE layer; its experts are spread over two ranks if `dispatch` says how."""
    args = MoEArgs(
        num_experts=E, top_k=K, num_shared_experts=1, score_func="sigmoid", route_norm=True,
        score_before_experts=False, use_grouped_mm=False,
    )  # fmt: skip
    with DEVICE, torch.no_grad():
        moe = MomoeMoE(args, D, F, backend=backend)
        moe.init_weights(0.02, DEVICE)
    moe.to(dtype)
    if dispatch:
        mesh = DeviceMesh.from_group(dist.new_group(list(range(RANKS))), DEVICE.type)
        spread_experts(moe, mesh, mesh, dispatch)
    fill(moe)
    return moe


def inputs(step: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """x and the gradient of out, of both ranks, (2 T, D). x is in quarters: see `fill`."""
    draw = functools.partial(torch.randn, RANKS * T, D, generator=torch.Generator().manual_seed(step))
    x = (draw() * 2).round().clamp(-6, 6) / 4
    x[:, 0] = 1
    return [t.to(DEVICE, dtype) for t in (x, draw().bfloat16())]


def starve(moe: MomoeMoE, step: int) -> None:
    moe.expert_bias.zero_()
    moe.expert_bias[slice(*STARVED[step])] = -10


def forward_backward(moe: MomoeMoE, x_TD: torch.Tensor, dout_TD: torch.Tensor) -> dict[str, torch.Tensor]:
    """out, the gradients of x and of all parameters, and the counts."""
    moe.tokens_per_expert.zero_()
    x_TD = x_TD.detach().requires_grad_()
    parameters = dict(moe.named_parameters())
    out = moe(x_TD[None])[0]
    dx, *grads = torch.autograd.grad(out, [x_TD, *parameters.values()], dout_TD)
    found = {name: _local(gradient) for name, gradient in zip(parameters, grads, strict=True)}
    return {"out": out.detach(), "x": dx, "counts": moe.tokens_per_expert, **found}


def copied(results: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in results.items()}


def layer_steps(moe: MomoeMoE, rows: slice = slice(None)) -> dict[float, list]:
    """All steps of this rank's rows, for each save_percent."""
    found = {}
    for percent in SAVED if moe.experts.backend != "torch" else SAVED[:1]:
        moe.experts.save_percent = percent
        steps = found[percent] = []
        for step in range(len(STARVED)):
            starve(moe, step)
            steps.append(copied(forward_backward(moe, *(t[rows] for t in inputs(step, moe.experts.w1.dtype)))))
    return found


def from_graphs(moe: MomoeMoE, rows: slice) -> dict[float, list]:
    """As `layer_steps`, from CUDA graphs. Between two replays the same runs without, at times."""
    found = {}
    for percent in SAVED:
        moe.experts.save_percent = percent
        static = [t[rows].clone() for t in inputs(0, moe.experts.w1.dtype)]
        graph = torch.cuda.CUDAGraph()
        with peer_memory.one_sequence(), torch.cuda.graph(graph):
            got = forward_backward(moe, *static)
        steps = found[percent] = []
        for step in range(len(STARVED)):
            starve(moe, step)
            drawn = [t[rows] for t in inputs(step, moe.experts.w1.dtype)]
            for tensor, new in zip(static, drawn, strict=True):
                tensor.copy_(new)
            torch.cuda._sleep(10**6 * (dist.get_rank() == step % RANKS))  # ranks come at different times
            graph.replay()
            steps.append(copied(got))
            if step % 3:
                forward_backward(moe, *drawn)
    return found


def of_copies(peers: FakePeers | None) -> dict:
    """Everything that copies: what comes by it, and what gloo gives."""
    rank, group = dist.get_rank(), dist.new_group(list(range(RANKS)))
    rows = torch.arange(96 * 64, device=DEVICE).view(96, 64).remainder(251).bfloat16() * (rank + 1)
    transfers = functools.partial(exchange, rank, group.group_name)
    want = {factor: transfers(rows * factor) for factor in (1, 2, 3)}
    with connected(peers):
        peer_memory.connect(group)
        assert peer_memory.peers_of(group.group_name) is not None
        got = [(transfers(rows * factor), want[factor]) for factor in (1, 2, 3, 1, 1)]
        for factor in (2, 3, 1):
            with peer_memory.one_sequence():
                got.append((transfers(rows * factor), want[factor]))
        got.append((transfers(rows * 3), want[3]))
        if GPU:
            got += [(replayed, want[factor]) for factor, replayed in replays(transfers, rows, rank, RANKS, 10**6)]
            if rank == 1:
                with peer_memory.one_sequence(), torch.cuda.graph(torch.cuda.CUDAGraph()):
                    transfers(rows)  # what a rank captures alone changes nothing
            got.append((transfers(rows * 2), want[2]))
        return {"pairs": [[t.cpu() for t in side] for pair in got for side in pair]}


def of_layer(peers: FakePeers | None) -> dict:
    """Outputs and gradients of one layer, by several ways."""
    rank = dist.get_rank()
    rows, backend = slice(rank * T, rank * T + T), "triton" if GPU else "torch"
    want_entropy(True)  # of which a graph has the kernel in any case
    prepare_capture(DEVICE)
    found = {
        "all_ranks": layer_steps(layer(NARROW, backend, "all_ranks"), rows),
        "chosen_ranks": layer_steps(layer(NARROW, backend, "chosen_ranks"), rows),
    }
    with connected(peers):
        moe = layer(NARROW, backend, "all_ranks")
        assert moe.gatherer is not None and moe.gatherer.outlet
        found["peers"] = layer_steps(moe, rows)
        found["peers again"] = layer_steps(moe, rows)
        if GPU:
            found["graphs"] = from_graphs(moe, rows)
        (copies,) = peer_memory._peers.values()
        found["barriers"] = copies.barriers
        del moe
        gc.collect()
    return found


def of_layer_alone(peers: FakePeers | None) -> dict:
    """What `of_layer` finds, of one rank that has all experts; and with little rounding."""
    backend = "triton" if GPU else "torch"
    return {
        "one": layer_steps(layer(NARROW, backend)),
        "exact": layer_steps(layer(torch.float32, "torch")),
    }


def _trained(peers: FakePeers | None, dtype: str, ranks: int = RANKS, dispatch: str = "all_ranks", ep: int = RANKS,
             **momoe: Any) -> dict[str, list[torch.Tensor]]:  # fmt: skip
    """Losses, counts, and this rank's part of the first gradients and the last weights of a model, which it trains on
    its part of the batches."""
    config = job_config(expert_dispatch=dispatch, **momoe)
    config.training.mixed_precision_param = dtype
    config.parallelism.fsdp_reshard_after_forward = "never"
    args = tiny_args(
        moe={"num_experts": 6}, expert_dispatch=dispatch, save_percent=[50], backend="auto",
        load_balance_off_layers=[2], **WIDTHS,
    )  # fmt: skip
    parallelize: Any = None
    dims = None
    if ranks > 1:
        dims = ParallelDims(
            dp_replicate=1, dp_shard=ranks, cp=1, tp=1, pp=1, ep=ep, etp=1, world_size=ranks
        )  # fmt: skip
        dims.build_mesh()

        def parallelize(model: Any) -> Any:
            model = parallelize_momoe_llama(model, dims, config)
            reduce_by_sums(model)  # which parallelize does on a CPU alone
            return model

    with connected(peers) if dims is not None and peers is not NOBODY else contextlib.nullcontext():
        model = build(args, 0, parallelize, DEVICE)
        fill(model)
        optimizers = optimizers_for(model, **({} if dims is None else {"parallel_dims": dims}), implementation="fused")
        part = dist.get_rank() if ranks > 1 else 0
        losses, counts, grads = [], [], []
        for step in range(TRAINED):
            tokens, labels = (t.chunk(ranks)[part].to(DEVICE) for t in batch(step))
            loss = loss_of(model, tokens, labels, 1 / ranks)
            loss.backward()
            total = loss.detach()
            if ranks > 1:
                dist.all_reduce(total)
            losses.append(total)
            grads = grads or [part_of(p.grad) for _, p in sorted(model.named_parameters())]
            optimizers.step()
            optimizers.zero_grad()
            counts.append(optimizers.load_balancer.counts_LE)
        found = {
            "losses": losses,
            "counts": counts,
            "grads": grads,
            "bias": [moe.expert_bias for moe in moes(model)],
            "weights": [part_of(p) for _, p in sorted(model.named_parameters())],
        }
        found = {name: [t.detach().to("cpu", copy=True) for t in tensors] for name, tensors in found.items()}
        if ranks > 1 and peers is not NOBODY:
            copies = list(peer_memory._peers.values())
            assert copies, "nothing was connected"
            found["barriers"] = [torch.tensor(c.barriers) for c in copies]
        del model, optimizers, loss
        gc.collect()
    return found


NOBODY: Any = SimpleNamespace()  # for `peers`: no ranks are connected


def of_model(peers: FakePeers | None) -> dict:
    """A model under FSDP and expert parallelism."""
    return {
        "gloo": _trained(NOBODY, "bfloat16"),
        "peers": _trained(peers, "bfloat16"),
        "peers again": _trained(peers, "bfloat16"),
    }


def of_float32_model(peers: FakePeers | None) -> dict:
    """The same where one process rounds as two do."""
    return {
        "one": _trained(NOBODY, "float32", ranks=1),
        "gloo": _trained(NOBODY, "float32"),
        "peers": _trained(peers, "float32"),
        "chosen_ranks": _trained(NOBODY, "float32", dispatch="chosen_ranks"),
    }


def of_fsdp(peers: FakePeers | None) -> dict:
    """A model under FSDP, whose collectives are copies."""
    return {
        "gloo": _trained(NOBODY, "bfloat16", ep=1),
        "copies": _trained(peers, "bfloat16", ep=1, fsdp_copies=True),
        "copies again": _trained(peers, "bfloat16", ep=1, fsdp_copies=True),
    }


PARTS: dict[str, Callable[[FakePeers | None], dict]] = {
    "copies": of_copies,
    "layer": of_layer,
    "alone": of_layer_alone,
    "model": of_model,
    "float32": of_float32_model,
    "fsdp": of_fsdp,
}


def run_parts(folder: str, names: list[str], peers: FakePeers | None) -> None:
    rank, parallel_dims.device_type = dist.get_rank(), DEVICE.type  # whoever imported it first
    for name in names:
        begin = time.monotonic()
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        try:
            results = PARTS[name](peers)
        except BaseException:
            Path(folder, f"{name}.{rank}.txt").write_text(traceback.format_exc())
            raise
        faulthandler.cancel_dump_traceback_later()
        print(f"{name}: {time.monotonic() - begin:.0f} s", flush=True)
        torch.save(results, Path(folder, f"{name}.{rank}.tmp"))
        Path(folder, f"{name}.{rank}.tmp").rename(Path(folder, f"{name}.{rank}.pt"))


def on_cpus(folder: str, names: list[str], ranks: int) -> bool:
    """The same by so many forks of this process; whether they ended well."""
    work = functools.partial(run_parts, folder, names, FakePeers(ranks))
    return in_gloo_forks(ranks, f"{folder}/store", work)


def main(folder: str, *names: str) -> None:
    torch.cuda.set_device(0)
    rank, ranks = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    with one_gloo_thread():
        dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=ranks)
        run_parts(folder, list(names), None)
    torch.cuda.synchronize()
    end_process()


if __name__ == "__main__":
    main(*sys.argv[1:])
