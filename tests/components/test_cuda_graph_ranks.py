"""Whole jobs on two GPUs whose steps run from CUDA graphs: their losses are those of the same jobs without."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from tests.components.test_cuda_graph_jobs import JOB, ROOT, logged
from tests.support import commands

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
ONE_SHARD = ["--parallelism.data_parallel_shard_degree=1"]
PIPELINE = [*ONE_SHARD, "--parallelism.pipeline_parallel_degree=2", "--parallelism.pipeline_parallel_schedule"]
TENSOR = [*ONE_SHARD, "--parallelism.tensor_parallel_degree=2", "--compile.enable"]
RUNS = {
    "pipeline": [*PIPELINE, "1F1B", "--compile.enable"],
    "pipeline, two microbatches a step": [*PIPELINE, "1F1B", "--training.global_batch_size=8"],
    "interleaved pipeline": [*PIPELINE, "Interleaved1F1B"],
    "tensor parallel": TENSOR,
    "FSDP": ["--momoe.no-fsdp_copies"],
    "FSDP by copy engines": ["--momoe.fsdp_copies"],
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """What each job printed, from graphs and without; all run at the same time."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    started, ports = {}, itertools.count(29701)
    env = {**commands.environment(), "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0,1")}
    for (name, options), graphs in itertools.product(RUNS.items(), (True, False)):
        command = [*TORCHRUN, f"--master_port={next(ports)}", *JOB, *options]
        command += ["--momoe.cuda_graphs" if graphs else "--momoe.no-cuda_graphs"]
        command += ["--job.dump_folder", str(tmp_path_factory.mktemp("job"))]
        started[name, graphs] = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
    try:
        return {key: job.communicate(timeout=600)[0] for key, job in started.items()}
    finally:
        for job in started.values():
            job.kill()


@pytest.mark.gpu
@pytest.mark.parametrize("name", RUNS)
def test_losses_of_two_gpus_are_those_without_graphs(outputs, name):
    output, reference = outputs[name, True], outputs[name, False]
    assert "CUDA graphs are off" not in output and "has no effect" not in output, output[-5000:]
    seen, expected = logged(output), logged(reference)
    assert len([what for what, _, _ in expected if not what]) == 14 and any(what for what, _, _ in expected)
    assert [line[:2] for line in seen] == [line[:2] for line in expected], output[-5000:]
    assert [loss for _, _, loss in seen] == pytest.approx([loss for _, _, loss in expected], rel=2e-3)


@pytest.mark.gpu
def test_losses_by_copy_engines_are_those_by_nccl(outputs):
    by_nccl, by_copies = (logged(outputs[name, True]) for name in ("FSDP", "FSDP by copy engines"))
    assert [loss for _, _, loss in by_copies] == pytest.approx([loss for _, _, loss in by_nccl], rel=2e-3)
