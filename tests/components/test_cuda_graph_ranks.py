"""Whole jobs on two GPUs whose steps run from CUDA graphs: their losses are those of the same jobs without."""

import itertools
import sys

import pytest
import torch

from tests.components.test_cuda_graph_jobs import JOB, assert_same_losses, at_once, logged

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
ONE_SHARD = ["--parallelism.data_parallel_shard_degree=1"]
PIPELINE = [*ONE_SHARD, "--parallelism.pipeline_parallel_degree=2", "--parallelism.pipeline_parallel_schedule"]
TENSOR = [*ONE_SHARD, "--parallelism.tensor_parallel_degree=2", "--compile.enable"]
EXPERTS = ["--parallelism.expert_parallel_degree=2", "--momoe.expert_dispatch=all_ranks", "--compile.enable"]
RUNS = {
    "pipeline": [*PIPELINE, "1F1B", "--compile.enable"],
    "pipeline, two microbatches a step": [*PIPELINE, "1F1B", "--training.global_batch_size=8"],
    "interleaved pipeline": [*PIPELINE, "Interleaved1F1B"],
    "tensor parallel": TENSOR,
    "FSDP": ["--momoe.no-fsdp_copies"],
    "FSDP by copy engines": ["--momoe.fsdp_copies"],
    "expert parallel": [*EXPERTS, "--parallelism.fsdp_reshard_after_forward=never"],
    "expert parallel, two microbatches a step": [*EXPERTS, "--training.global_batch_size=8"],
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """What each job printed, from graphs and without; all run at the same time."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    jobs, ports = {}, itertools.count(29701)
    for (name, options), graphs in itertools.product(RUNS.items(), (True, False)):
        switch = "--momoe.cuda_graphs" if graphs else "--momoe.no-cuda_graphs"
        jobs[name, graphs] = [*TORCHRUN, f"--master_port={next(ports)}", *JOB, *options, switch]
    return at_once(jobs, tmp_path_factory.mktemp, gpus="0,1")


@pytest.mark.gpu
@pytest.mark.parametrize("name", RUNS)
def test_losses_of_two_gpus_are_those_without_graphs(outputs, name):
    output, reference = outputs[name, True], outputs[name, False]
    assert "CUDA graphs are off" not in output and "has no effect" not in output, output[-5000:]
    assert_same_losses(output, reference)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["FSDP by copy engines", "expert parallel"])
def test_losses_by_copy_engines_are_those_by_nccl(outputs, name):
    by_nccl, by_copies = (logged(outputs[run, True]) for run in ("FSDP", name))
    assert [loss for _, _, loss in by_copies] == pytest.approx([loss for _, _, loss in by_nccl], rel=2e-3)
