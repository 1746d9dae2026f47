"""Two processes that share one GPU and read each other's memory compute what one process does, and what gloo carries.

What only two GPUs have, copies over NVLink and NCCL beside them, is in test_peer_memory.py.
"""

import itertools
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.support import commands, one_gpu
from tests.support.shared import made_once

# Of processes that run side by side: parts of one_gpu.py, and how many ranks.
PARTS = {"one": (["alone"], 1), "two": (["copies", "layer"], 2), "models": (["model", "fsdp", "float32"], 2)}
SECONDS = 88
JOBS = {
    "expert parallel": ["--parallelism.expert_parallel_degree", "2"],
    "chosen ranks": ["--parallelism.expert_parallel_degree", "2", "--momoe.expert_dispatch", "chosen_ranks"],
    "fsdp": [],
}
JOB = [
    *("--job.config_file", "train_configs/debug_model.toml", "--training.dataset", "python_stdlib"),
    *("--training.steps", "4", "--training.local_batch_size", "2", "--momoe.save_percent", "50"),
    *("--parallelism.fsdp_reshard_after_forward", "never", "--metrics.log_freq", "1"),
    *("--validation.no-enable", "--checkpoint.no-enable", "--metrics.no-enable_tensorboard"),
]


def _run_all(folder: Path) -> None:
    for name in (*PARTS, *JOBS):
        (folder / name).mkdir()
    if not one_gpu.GPU:
        for name, (parts, ranks) in PARTS.items():
            if name != "models":  # which test_expert_parallel.py has on CPUs
                assert one_gpu.on_cpus(str(folder / name), parts, ranks)
        return
    started = []
    try:
        for name, (parts, ranks) in PARTS.items():
            started.append(_start(folder / name, ["one_gpu", str(folder / name), *parts], ranks))
        for name, options in JOBS.items():
            dump = ["--job.dump_folder", str(folder / name)]
            started.append(_start(folder / name, ["one_gpu_job", *JOB, *options, *dump], 2))
        end = time.monotonic() + SECONDS
        for ranks in started:
            _wait(ranks, end)
    finally:
        for process in itertools.chain(*started):
            process.kill()  # a kernel that waits for the other rank would never end
            process.wait()


def _start(folder: Path, command: list[str], ranks: int) -> list[subprocess.Popen]:
    """So many ranks of a module of tests.support on one GPU. What they say is in FOLDER/log.RANK."""
    port, started = commands.free_port(), []
    for rank in range(ranks):
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(commands.ROOT), os.environ.get("PYTHONPATH", "")]),
            "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1",
            "RANK": str(rank),
            "LOCAL_RANK": "0",  # the device
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        launch = [sys.executable, "-m", f"tests.support.{command[0]}", *command[1:]]
        with (folder / f"log.{rank}").open("w") as log:
            started.append(subprocess.Popen(launch, cwd=commands.ROOT, env=env, stdout=log, stderr=log))
    return started


def _wait(ranks: list[subprocess.Popen], end: float) -> None:
    """Until all have ended; for the others a little longer, once one has failed."""
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < end:
        if any(rank.poll() for rank in ranks):
            end = min(end, time.monotonic() + 3)
        time.sleep(0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return made_once(tmp_path_factory, "two ranks on one gpu", _run_all)


def results(folder: Path, part: str) -> list[dict]:
    """What each rank has found."""
    ((name, ranks),) = ((name, ranks) for name, (parts, ranks) in PARTS.items() if part in parts)
    files = [folder / name / f"{part}.{rank}.pt" for rank in range(ranks)]
    if missing := [file.name for file in files if not file.exists()]:
        raise AssertionError(f"without {missing}\n{said(folder / name)}")
    return [torch.load(file) for file in files]


def said(folder: Path) -> str:
    """The end of what each rank has said."""
    logs = sorted((*folder.glob("*.txt"), *folder.glob("log.*")))
    texts = [re.sub("^Extension modules.*", "", log.read_text(), flags=re.MULTILINE) for log in logs]
    return "\n".join(f"{log.name}:\n{text[-5000:]}" for log, text in zip(logs, texts, strict=True))


def assert_equal(got, want, where="") -> None:
    """To the bit, however deep the tensors lie."""
    assert type(got) is type(want), where
    if isinstance(got, torch.Tensor):
        assert torch.equal(got, want), (where, float((got.double() - want.double()).abs().max()))
        return
    pairs = got.items() if isinstance(got, dict) else enumerate(got)
    assert len(got) == len(want), where
    for key, value in pairs:
        assert_equal(value, want[key], f"{where} {key}")


pytestmark = [pytest.mark.gpu] if one_gpu.GPU else []


def test_every_transfer_is_what_gloo_gives(folder):
    """Gathers and sends, from CUDA graphs too, where replays and other transfers follow each other."""
    for found in results(folder, "copies"):
        got, want = found["pairs"][::2], found["pairs"][1::2]
        assert len(got) == (9 if not one_gpu.GPU else 19)
        assert_equal(got, want)


@pytest.fixture(scope="module")
def layers(folder):
    return results(folder, "layer")


def whole(ranks: list[dict], way: str, saved: float, step: int) -> dict[str, torch.Tensor]:
    """Results of one step, of the ranks together as one rank has them that has all experts."""
    parts, joined = [found[way][saved][step] for found in ranks], {}
    for name, first in parts[0].items():
        tensors = [first, parts[1][name]]
        divided = name in ("out", "x") or name.startswith("experts.")
        joined[name] = torch.cat(tensors) if divided else sum(t.double() for t in tensors)
    return joined


def test_a_layer_gives_to_the_bit_what_gloo_carries(layers):
    """So it does again, and from CUDA graphs."""
    for found in layers:
        ways = ["peers", "peers again", *(["graphs"] if one_gpu.GPU else [])]
        for way in ways:
            assert found[way].keys() == found["all_ranks"].keys()
            assert_equal(found[way], found["all_ranks"], way)


@pytest.mark.parametrize("way", ["peers", "chosen_ranks"])
def test_a_layer_is_as_one_process_has_it(layers, way, folder):
    """Each output and gradient is nearly as near to exact ones as one process's, also where a rank gets no rows or all.

    Two ranks round their parts of a sum before they are added, of which the square root of 2 comes at most.
    """
    (alone,) = results(folder, "alone")
    one, exact = alone["one"], alone["exact"][0.0]
    for saved in one:
        for step, starved in enumerate(one_gpu.STARVED):
            got, plain, want = whole(layers, way, saved, step), one[saved][step], exact[step]
            assert torch.equal(got["counts"].long(), plain["counts"].long())
            assert torch.equal(want["counts"], plain["counts"])
            assert not plain["counts"][slice(*starved)].any() and plain["counts"].sum() == 2 * one_gpu.T * one_gpu.K
            for name in got.keys() - {"counts"}:
                far, near = (float((t[name].double() - want[name].double()).norm()) for t in (got, plain))
                assert far <= 1.75 * near + 1e-5 * float(want[name].double().norm()), (saved, step, name, far, near)


needs_gpu = pytest.mark.skipif(not one_gpu.GPU, reason="needs a CUDA device")


def without_barriers(run: dict) -> dict:
    return {name: value for name, value in run.items() if name != "barriers"}


@needs_gpu
@pytest.mark.parametrize("part", ["model", "float32"])
def test_a_model_trains_to_the_bit_as_by_gloo(folder, part):
    ranks = results(folder, part)
    for found in ranks:
        assert_equal(without_barriers(found["peers"]), found["gloo"])
        assert min(found["peers"]["barriers"]) > 20
        assert_equal(found["peers"]["losses"], ranks[0]["peers"]["losses"])
        if part == "model":
            assert_equal(found["peers again"], found["peers"])


@needs_gpu
@pytest.mark.parametrize("way", ["peers", "chosen_ranks"])
def test_a_model_trains_as_in_one_process(folder, way):
    ranks = results(folder, "float32")
    one = ranks[0]["one"]
    runs = [found[way] for found in ranks]
    for run in runs:
        assert_equal(run["counts"], one["counts"])
        assert_equal(run["bias"], one["bias"])
        torch.testing.assert_close(torch.stack(run["losses"]), torch.stack(one["losses"]), rtol=1e-5, atol=0)
    for *parts, want in zip(runs[0]["grads"], runs[1]["grads"], one["grads"], strict=True):
        assert float((torch.cat(parts) - want).norm()) <= 1e-4 * float(want.norm()), want.shape


@needs_gpu
def test_fsdp_by_copies_is_to_the_bit_as_by_gloo(folder):
    for found in results(folder, "fsdp"):
        assert_equal(without_barriers(found["copies"]), found["gloo"])
        assert_equal(found["copies again"], found["copies"])


@needs_gpu
def test_a_job_trains_as_by_fsdp(folder):
    """The training command: losses of ranks that read each other's memory, and of FSDP alone on the same batches."""
    losses = {}
    for name in JOBS:
        log = re.sub(r"\x1b\[[0-9;]*m", "", (folder / name / "log.0").read_text())
        losses[name] = [float(loss) for loss in re.findall(r"loss: +([0-9.]+)", log)]
        assert len(losses[name]) == 4, said(folder / name)
    for name, found in losses.items():
        assert found == pytest.approx(losses["fsdp"], rel=2e-3), (name, losses)
    print(losses)
