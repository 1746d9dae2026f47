"""A pipeline's schedule and tensor parallel layers from CUDA graphs, on one rank: nothing in them may wait for the GPU.

What only two ranks have, sends between stages and collectives with another rank, is in test_cuda_graph_ranks.py.
"""

import contextlib
import functools
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import ScheduleInterleaved1F1B
from torch.distributed.tensor import DTensor
from torchtitan.distributed.pipeline_parallel import pipeline_module_split

from momoe_titan.components.compute_weights import ComputeWeights
from momoe_titan.components.cuda_graph import CapturedStep
from momoe_titan.components.pipeline_step import PipelineStep
from momoe_titan.model.parallel.tensor import apply_tp
from tests.support import commands
from tests.support.forks import in_gloo_forks
from tests.support.tiny import batch, build, tiny_args

STEPS, INTERRUPTED = 9, (1, 5)  # steps, and those after which something other than training runs
STAGES = [["tok_embeddings", "layers.0", "layers.1"], ["layers.2", "norm", "output"]]
ARGS = {"dim": 64, "moe_hidden_dim": 64, "loss_chunk_mib": 0.006}


class Pipeline(PipelineStep):
    """The part of a trainer that runs a pipeline; both stages are this rank's, and no trainer is behind it."""

    parallel_dims = SimpleNamespace(pp_enabled=True)
    pp_has_first_stage = pp_has_last_stage = True
    train_context = staticmethod(contextlib.nullcontext)

    def __init__(self, device):
        self.device = device
        mesh = init_device_mesh(device.type, (1,), mesh_dim_names=("pp",))
        whole = build(tiny_args(**ARGS), device=device)
        self.stages, self.parts = pipeline_module_split(whole, mesh, "Interleaved1F1B", device, STAGES)
        self.pp_schedule = ScheduleInterleaved1F1B(
            self.stages, n_microbatches=4, loss_fn=lambda pred, labels: pred.sum(), scale_grads=False
        )

    def post_dataloading_process(self, inputs, labels):
        return inputs["input"], labels, {}, {"labels": labels}

    def body(self, inputs, labels, num_tokens):
        return self.forward_backward_step(input_dict=inputs, labels=labels, global_valid_tokens=num_tokens).detach()

    def validate(self, tokens, labels):
        """Nothing: torch's schedule evaluates no two stages of one rank that follow each other."""


class Tensors:
    """A tensor parallel model on a mesh of one rank."""

    stages = ()

    def __init__(self, device):
        mesh = init_device_mesh(device.type, (1,), mesh_dim_names=("tp",))
        dims = SimpleNamespace(get_mesh=lambda name: mesh, ep_enabled=False, etp_enabled=False)

        def parallelize(model):
            apply_tp(model, dims, loss_parallel=True)
            return model

        self.parts = [build(tiny_args(**ARGS), parallelize=parallelize, device=device)]

    def body(self, inputs, labels, num_tokens):
        loss = self.parts[0](inputs["input"], labels=labels).sum() / num_tokens
        loss.backward()
        return loss.detach()

    def validate(self, tokens, labels):
        self.parts[0](tokens, labels=labels)


def train(kind, captures: bool, device: torch.device) -> tuple[list[torch.Tensor], int]:
    """Losses and the last gradients, and how many graphs there are."""
    job = kind(device)
    weights = ComputeWeights(job.parts, torch.bfloat16, sums_in_parameters_dtype=kind is Pipeline)
    step = CapturedStep(job.body, job.parts, stages=job.stages) if captures else job.body
    if captures:
        step.parameters += weights.copies.values()
    seen = []
    parameters = [p for part in job.parts for p in part.parameters()]
    for number in range(STEPS):
        tokens, labels = (t.to(device) for t in batch(number % (STEPS - 1)))  # the last step has those of the first
        with weights:
            seen.append(step({"input": tokens}, labels, torch.tensor(float(labels.numel()), device=device)))
        with torch.no_grad():
            for parameter in parameters:
                parameter -= 0.1 * parameter.grad
                parameter.grad = None if number < STEPS - 1 else parameter.grad
        if number in INTERRUPTED:
            if captures:
                step.make_room()
            for part in job.parts:
                part.eval()
            with torch.no_grad(), weights:
                job.validate(tokens, labels)
            for part in job.parts:
                part.train()
    counts = [b.moe.tokens_per_expert for part in job.parts for b in part.layers.values() if b.moe_enabled]
    graphs = len(step._graphs) if captures else 0
    if captures:
        assert not step.failed
        step.release()
    return [*seen, *(p.grad for p in parameters), *counts], graphs


KINDS = {"pipeline": Pipeline, "tensor parallel": Tensors}


def trains_on_a_cpu(kind: str) -> None:
    warnings.filterwarnings("ignore", ".*_functional_collectives", FutureWarning)  # torch 2.13 gives names anew
    seen, _ = train(KINDS[kind], captures=False, device=torch.device("cpu"))
    assert all(t.isfinite().all() for t in seen) and float(seen[STEPS - 1]) < float(seen[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_jobs_below_train_on_a_cpu(kind, tmp_path):
    if kind == "pipeline" and torch.__version__.startswith("2.11"):
        pytest.skip("gloo of torch 2.11 sends nothing to the rank that sends")
    assert in_gloo_forks(1, tmp_path / "store", functools.partial(trains_on_a_cpu, kind))


def divides_every_weight() -> None:
    for part in Tensors(torch.device("cpu")).parts:
        assert {name for name, p in part.named_parameters() if not isinstance(p, DTensor)} == set()


def test_tensor_parallelism_leaves_no_weight_to_each_rank_alone(tmp_path):
    """Each would make a gradient of its part of the sequence alone of it."""
    assert in_gloo_forks(1, tmp_path / "store", divides_every_weight)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_from_graphs_is_as_without(kind):
    env = {**commands.environment(), "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}
    launch = [sys.executable, "-m", "tests.components.test_cuda_graph_rank", kind]
    done = subprocess.run(launch, cwd=Path(__file__).parents[2], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-6000:]


def main(kind: str) -> None:
    device = torch.device("cuda", 0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=device)
    expected, _ = train(KINDS[kind], captures=False, device=device)
    seen, graphs = train(KINDS[kind], captures=True, device=device)
    assert graphs == 1, graphs
    for mine, plain in zip(seen, expected, strict=True):
        torch.testing.assert_close(mine, plain, rtol=2e-3, atol=2e-3)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
