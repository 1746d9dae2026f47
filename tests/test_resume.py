"""Whole jobs that are killed, and go on from their last checkpoint as if they never had been."""

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from tests.support import commands, faults

ROOT = Path(__file__).parent.parent
STEPS, INTERVAL, SEQ = 12, 4, 32


@dataclass
class Outcome:
    """The exit status of each rank of one job, what they printed, and the losses by step."""

    status: list[int]
    log: str
    losses: dict[int, float]


class Jobs:
    """Starts jobs in the test's folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.count = 0
        self.env = commands.environment(HF_HOME=str(folder / "hf"))
        (folder / "various.jsonl").write_text(
            "".join(json.dumps({"text": " ".join(str(i * j) for j in range(20))}) + "\n" for i in range(300))
        )

    def options(self, out: Path, *extra: str) -> list[str]:
        return (
            "--job.config_file train_configs/debug_model.toml --model.flavor tiny "
            "--experimental.custom_import tests.support.tiny_flavor --validation.no-enable "
            f"--training.seq_len {SEQ} --training.local_batch_size 2 --training.steps {STEPS} "
            f"--training.dataset local --training.dataset_path {self.folder}/various.jsonl "
            f"--lr_scheduler.warmup_steps 2 --lr_scheduler.total_steps {STEPS} "
            f"--checkpoint.enable --checkpoint.interval {INTERVAL} "
            "--checkpoint.no-last_save_model_only --metrics.log_freq 1 "
            f"--metrics.disable_color_printing --job.dump_folder {out}"
        ).split() + list(extra)

    def run(self, out: Path, *extra: str, ranks: int = 1, fault: Callable[[], object] | None = None) -> Outcome:
        """A job to its end. `fault` befalls the last rank."""
        self.count += 1
        out.mkdir(exist_ok=True)
        log, tensorboard = out / f"log-{self.count}", f"tb-{self.count}"
        port = str(commands.free_port())
        with open(log, "a") as output:
            processes = [
                commands.start(
                    *("-m", "momoe_titan.train", *self.options(out, "--metrics.save_tb_folder", tensorboard, *extra)),
                    stdout=output.fileno(),
                    env={
                        **{**self.env, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)},
                        **{"MASTER_ADDR": "localhost", "MASTER_PORT": port},
                    },
                    before=[faults.wait_no_longer] + ([fault] if fault and rank == ranks - 1 else []),
                )
                for rank in range(ranks)
            ]
        processes[-1].join()
        if processes[-1].exitcode == -signal.SIGKILL:  # the others wait for it until their launcher ends them
            for process in processes[:-1]:
                process.kill()
        for process in processes:
            process.join()
        status = [process.exitcode for process in processes]
        losses = {}
        for run in (out / tensorboard).glob("*"):
            events = EventAccumulator(str(run))
            events.Reload()
            if "loss_metrics/global_avg_loss" in events.Tags()["scalars"]:
                found = events.Scalars("loss_metrics/global_avg_loss")
                losses = {event.step: event.value for event in found}
        return Outcome(status, log.read_text(), losses)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    return Jobs(tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="module")
def whole(jobs):
    """The run without a fault, by its number of ranks."""
    runs = {}

    def run(ranks: int = 1) -> tuple[Path, Outcome]:
        if ranks not in runs:
            out = jobs.folder / f"whole-{ranks}"
            runs[ranks] = out, jobs.run(out, ranks=ranks)
            assert runs[ranks][1].status == [0] * ranks, runs[ranks][1].log[-3000:]
            assert sorted(runs[ranks][1].losses) == list(range(1, STEPS + 1))
        return runs[ranks]

    return run


def step_folder(out: Path, step: int) -> Path:
    return out / "checkpoint" / f"step-{step}"


def contents(out: Path, step: int) -> dict:
    """All that a checkpoint holds, in one flat dict."""
    file = out / "contents.pt"
    dcp_to_torch_save(step_folder(out, step), file)

    def flatten(prefix, value):
        if isinstance(value, dict):
            return {k: v for key in value for k, v in flatten(f"{prefix}.{key}", value[key]).items()}
        return {prefix: value}

    return flatten("", torch.load(file, weights_only=False))


@cache
def unchanging_contents(out: Path, step: int) -> dict:
    return contents(out, step)


def assert_same_contents(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    for key, value in want.items():
        same = torch.equal(got[key], value) if torch.is_tensor(value) else got[key] == value
        assert same, key


def assert_goes_on(resumed: Outcome, whole: tuple[Path, Outcome], out: Path, after: int) -> None:
    """To the bit as the whole run, from the step behind `after`, and to the same last state."""
    assert set(resumed.status) == {0}, resumed.log[-3000:]
    assert f"Training starts at step {after + 1}\n" in resumed.log
    folder, uninterrupted = whole
    steps = range(after + 1, STEPS + 1)
    assert resumed.losses == {step: uninterrupted.losses[step] for step in steps}
    assert_same_contents(contents(out, STEPS), unchanging_contents(folder, STEPS))


def test_same_seed_same_losses_and_states(jobs, whole, tmp_path):
    again = jobs.run(tmp_path)
    assert_goes_on(again, whole(), tmp_path, after=0)
    state = contents(tmp_path, STEPS)
    assert state[".layers.1.moe.expert_bias"].any()
    assert any(key.endswith("layers.1.moe.experts.w1.exp_avg") for key in state)


def test_killed_at_any_moment(jobs, whole, tmp_path):
    job, output = commands.follow(
        "-m", "momoe_titan.train", *jobs.options(tmp_path, "--training.steps", "100000"), env=jobs.env
    )
    with output:
        for line in output:
            if " step:  5 " in line:
                break
        time.sleep(random.random() / 4)
        job.kill()
    job.join()
    assert job.exitcode == -signal.SIGKILL
    last = max(int(p.parent.name[5:]) for p in tmp_path.glob("checkpoint/step-*/.metadata"))
    assert_goes_on(jobs.run(tmp_path), whole(), tmp_path, after=last)


@pytest.mark.parametrize("mode, file", [("disabled", "__"), ("disabled", ".metadata"), ("async", "__")])
def test_killed_while_a_file_of_the_checkpoint_is_written(jobs, whole, tmp_path, mode, file):
    option = f"--checkpoint.async_mode={mode}"
    assert jobs.run(tmp_path, option, fault=partial(faults.die_in_save, 8, file)).status == [-signal.SIGKILL]
    assert any(step_folder(tmp_path, 8).iterdir())
    resumed = jobs.run(tmp_path, option)
    assert f"PASSED OVER the checkpoint {step_folder(tmp_path, 8)}: it was not" in resumed.log
    assert_goes_on(resumed, whole(), tmp_path, after=4)
    # written while training went on
    assert_same_contents(contents(tmp_path, 8), unchanging_contents(whole()[0], 8))


@pytest.mark.slow
def test_one_of_two_ranks_killed_in_a_save(jobs, whole, tmp_path):
    first, second = jobs.run(tmp_path, ranks=2, fault=partial(faults.die_in_save, 8, "__1")).status
    # the first may see that the other is gone before it is killed too
    assert first in (-signal.SIGKILL, 1) and second == -signal.SIGKILL
    assert_goes_on(jobs.run(tmp_path, ranks=2), whole(2), tmp_path, after=4)


def test_killed_while_a_complete_checkpoint_is_written_again(jobs, whole, tmp_path):
    shutil.copytree(whole()[0] / "checkpoint", tmp_path / "checkpoint")
    shutil.rmtree(step_folder(tmp_path, STEPS))
    again = jobs.run(tmp_path, "--checkpoint.load_step=4", fault=partial(faults.die_in_save, 8, "__"))
    assert again.status == [-signal.SIGKILL]
    assert_goes_on(jobs.run(tmp_path), whole(), tmp_path, after=4)


@pytest.mark.parametrize("signum, mode", [(signal.SIGINT, "disabled"), (signal.SIGTERM, "async")])
def test_a_signal_ends_the_run_between_two_steps(jobs, whole, tmp_path, signum, mode):
    """The step is finished and saved, though it was not due; the exit status and one line say what happened."""
    option = f"--checkpoint.async_mode={mode}"
    stopped = jobs.run(tmp_path, option, fault=partial(faults.signal_in_step, 6, signum))
    assert stopped.status == [128 + signum] and max(stopped.losses) == 6
    name = signal.Signals(signum).name
    said = [line for line in stopped.log.splitlines() if line.startswith(name)]
    assert said[0] == f"{name}: stopping after this step. Ctrl-C ends the run at once"
    assert said[1:] == [stopped.log.splitlines()[-1]] and "Traceback" not in stopped.log
    last = f"{name}: stopped after step 6; checkpoint {step_folder(tmp_path, 6)}; resume: "
    assert said[1].startswith(last) and "completed" not in stopped.log
    _, _, options = said[1].partition("-m momoe_titan.train ")
    assert shlex.split(options)[: len(jobs.options(tmp_path))] == jobs.options(tmp_path)
    assert_goes_on(jobs.run(tmp_path, option), whole(), tmp_path, after=6)


def test_a_signal_after_a_step_that_was_saved_anyway(jobs, tmp_path):
    stopped = jobs.run(tmp_path, fault=partial(faults.signal_in_step, 4, signal.SIGTERM))
    assert stopped.status == [143] and stopped.log.count("Saved the checkpoint") == 1


def test_a_signal_without_checkpoints(jobs, tmp_path):
    stopped = jobs.run(tmp_path, "--checkpoint.no-enable", fault=partial(faults.signal_in_step, 3, signal.SIGTERM))
    assert stopped.status == [143] and sorted(stopped.losses) == [1, 2, 3]
    assert stopped.log.splitlines()[-1].endswith("no checkpoint was kept (checkpoint.enable is false)")


def test_a_signal_to_one_of_two_ranks_stops_both_after_the_same_step(jobs, whole, tmp_path):
    stopped = jobs.run(tmp_path, ranks=2, fault=partial(faults.signal_in_step, 6, signal.SIGTERM))
    assert stopped.status == [143, 143], stopped.log[-3000:]
    assert stopped.log.count("stopped after step 6;") == 1
    assert_goes_on(jobs.run(tmp_path, ranks=2), whole(2), tmp_path, after=6)


def test_resume_at_and_past_the_end_of_training(jobs, whole, tmp_path):
    shutil.copytree(whole()[0] / "checkpoint", tmp_path / "checkpoint")
    done = jobs.run(tmp_path)
    assert done.status == [0] and f"NOTHING TO TRAIN: the checkpoint is of step {STEPS}" in done.log
    assert "Trained to step" not in done.log
    past = jobs.run(tmp_path, "--training.steps=10")
    assert past.status == [2] and not past.losses
    assert f"error: training.steps is 10, but the checkpoint is of step {STEPS}" in past.log.splitlines()[-1]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, which can fill up and turn read-only."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("only root can mount a file system")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_a_disk_that_fills_up_or_turns_read_only(jobs, whole, small_disk, tmp_path, fault):
    """The checkpoint before is whole, the message says what is wrong, and no traceback buries it."""
    # the console's log is elsewhere
    options = "--job.dump_folder", str(small_disk)
    first = jobs.run(tmp_path, *options, "--training.steps=4")
    assert first.status == [0], first.log[-3000:]
    if fault == "full":
        free = os.statvfs(small_disk)
        (small_disk / "rest").write_bytes(bytes(max(0, free.f_bavail * free.f_bsize - (200 << 10))))
        failed = jobs.run(tmp_path, *options)
        assert "GiB are free there" in failed.log
    else:
        # no file there may be open for writing
        failed = jobs.run(
            tmp_path,
            *options,
            "--metrics.no-enable_tensorboard",
            fault=partial(faults.make_read_only, 6, str(small_disk)),
        )
        assert "Read-only file system" in failed.log
    assert failed.status == [1], failed.log[-3000:]
    said = failed.log.splitlines()[-1]
    assert f"a checkpoint could not be written to '{small_disk}/checkpoint'" in said
    assert said.endswith(f"On the disk: {step_folder(small_disk, 4)} is whole") and "Traceback" not in failed.log
    shutil.copytree(small_disk / "checkpoint", tmp_path / "checkpoint")
    assert_goes_on(jobs.run(tmp_path), whole(), tmp_path, after=4)


def test_full_disk_ends_the_run_and_loses_no_checkpoint(jobs, whole, tmp_path):
    assert jobs.run(tmp_path, "--training.steps=4").status == [0]
    full = jobs.run(tmp_path, fault=partial(faults.limit_files, 1 << 20))
    assert full.status == [1] and "a checkpoint could not be written" in full.log
    assert f"On the disk: {step_folder(tmp_path, 4)} is whole" in full.log.splitlines()[-1]
    assert sorted(full.losses) == [5, 6, 7, 8]
    assert_goes_on(jobs.run(tmp_path), whole(), tmp_path, after=4)


def test_run_goes_on_behind_an_export(jobs, whole, tmp_path):
    export = "--checkpoint.last_save_model_only", "--checkpoint.export_dtype=bfloat16"
    assert jobs.run(tmp_path, "--training.steps=8", *export).status == [0]
    state = contents(tmp_path, 8)
    assert state[".layers.1.moe.experts.w1"].dtype == torch.bfloat16
    want = unchanging_contents(whole()[0], 8)
    for name in ("expert_bias", "tokens_per_expert"):
        key = f".layers.1.moe.{name}"
        assert torch.equal(state[key], want[key]) and state[key].dtype == want[key].dtype
    in_hf = jobs.run(tmp_path, "--training.steps=10", *export, "--checkpoint.last_save_in_hf")
    assert in_hf.status == [0], in_hf.log[-3000:]
    resumed = jobs.run(tmp_path)
    assert_goes_on(resumed, whole(), tmp_path, after=8)  # which the last one wrote again
    for step, run, reason in (
        (8, in_hf, "it holds only weights"),
        (10, resumed, "it is in Hugging Face's format"),
    ):
        passed = f"PASSED OVER the checkpoint {step_folder(tmp_path, step)}: {reason}"
        assert passed in run.log


def test_finished_run_again_with_an_export(jobs, whole, tmp_path):
    """Nothing is left to train and to save: its last checkpoint is no Hugging Face folder."""
    shutil.copytree(whole()[0] / "checkpoint", tmp_path / "checkpoint")
    files = sorted(step_folder(tmp_path, STEPS).iterdir())
    export = "--checkpoint.last_save_model_only", "--checkpoint.last_save_in_hf"
    again = jobs.run(tmp_path, *export)
    assert again.status == [0], again.log[-3000:]
    assert f"last_save_in_hf is true, but '{step_folder(tmp_path, STEPS)}' is of an earlier" in again.log
    assert sorted(step_folder(tmp_path, STEPS).iterdir()) == files


def test_initial_checkpoint_is_not_forgotten_in_a_kill(jobs, whole, tmp_path):
    load = "--checkpoint.initial_load_path", str(step_folder(whole()[0], STEPS))
    first = jobs.run(tmp_path, *load, fault=partial(faults.die_in_save, 4, "__"))
    assert first.status == [-signal.SIGKILL]
    again = jobs.run(tmp_path, *load)
    assert f"Loading the checkpoint from {load[1]}" in again.log
    assert again.losses[1] < whole()[1].losses[1] - 0.1


def test_resume_with_other_settings(jobs, whole, tmp_path):
    """The job's own hold, on all ranks alike, and each is listed once."""
    shutil.copytree(step_folder(whole()[0], 4), step_folder(tmp_path, 4))
    changed = "--optimizer.lr=1e-4", "--optimizer.weight_decay=0", "--lr_scheduler.warmup_steps=8"
    resumed = jobs.run(tmp_path, *changed)
    assert resumed.status == [0], resumed.log[-3000:]
    listed = [line.strip() for line in resumed.log.splitlines() if "; holds: " in line]
    assert [line.partition(" -> ")[0] for line in listed if not line.startswith(("job.", "metrics."))] == [
        "lr_scheduler.warmup_steps: 2",
        "optimizer.lr: 0.003",
        "optimizer.weight_decay: 0.1",
    ]
    assert resumed.losses[5] == whole()[1].losses[5]  # before the first step of its own
    assert resumed.losses[STEPS] > whole()[1].losses[STEPS]
    state = contents(tmp_path, STEPS)
    assert {v for k, v in state.items() if k.endswith(".weight_decay")} == {0}
    assert {v for k, v in state.items() if k.endswith(".initial_lr")} == {1e-4}
    assert (step_folder(tmp_path, STEPS) / "job_config.json").is_file()


def test_unusable_checkpoint_is_named(jobs, whole, tmp_path):
    shutil.copytree(whole()[0] / "checkpoint", tmp_path / "checkpoint")
    (step_folder(tmp_path, 8) / ".metadata").unlink()
    refused = jobs.run(tmp_path, "--checkpoint.load_step=8")
    assert refused.status == [2]
    assert "error: checkpoint.load_step: the checkpoint" in refused.log.splitlines()[-1]
    refused = jobs.run(tmp_path / "mistyped", "--checkpoint.load_step=8")
    assert refused.status == [2]
    assert "error: checkpoint.load_step is 8, but job.dump_folder" in refused.log.splitlines()[-1]
    refused = jobs.run(tmp_path, "--momoe.backend=torchtitan")
    assert refused.status == [2]
    assert "error: momoe.backend must not be 'torchtitan'" in refused.log.splitlines()[-1]


@pytest.fixture
def one_document(jobs):
    """Options by which every sequence is the same, and so the batch on any number of ranks."""
    tokenizer = HuggingFaceTokenizer(str(ROOT / "momoe_titan/assets/tokenizer"))
    text = " ".join(map(str, range(100)))
    while len(tokenizer.encode(text, add_bos=True, add_eos=True)) > SEQ + 1:
        text = text[:-1]
    assert len(tokenizer.encode(text, add_bos=True, add_eos=True)) == SEQ + 1
    file = jobs.folder / "one.jsonl"
    file.write_text((json.dumps({"text": text}) + "\n") * 100)
    return ["--training.dataset_path", str(file), "--training.global_batch_size", "4"]


def degree(kind: str) -> str:
    return f"--parallelism.{kind}_parallel_degree=2"


@pytest.mark.slow
def test_other_layouts(jobs, tmp_path, one_document):
    """One process, FSDP, expert parallelism, tensor parallelism, and back."""
    # By its sign the bias is the same to the bit; solved for, it follows the rounding of the scores.
    common = [*one_document, "--momoe.load_balance_rule", "sign"]
    straight = jobs.run(tmp_path / "straight", *common)
    assert straight.status == [0] and straight.losses[STEPS] < straight.losses[1] - 0.5
    for ranks, last, shown, *options in (
        (1, 2, "ep=1"),
        (2, 4, "dp_shard=2"),
        (2, 6, "ep=2", degree("expert")),
        (2, 8, "tp=2", degree("tensor")),
        (2, 10, "dp_shard=2"),
        (1, STEPS, "ep=1"),
    ):
        options += ["--log_level", "debug"]  # shows the device mesh
        part = jobs.run(tmp_path / "parts", *common, f"--training.steps={last}", *options, ranks=ranks)
        assert part.status == [0] * ranks, part.log[-3000:]
        assert max(part.losses) == last and f" {shown}," in part.log
        for step, loss in part.losses.items():
            assert loss == pytest.approx(straight.losses[step], rel=1e-5)
    want, got = (contents(tmp_path / name, STEPS) for name in ("straight", "parts"))
    for key in want:
        if key.endswith(("expert_bias", "tokens_per_expert")) or key.startswith(".train_state"):
            assert torch.equal(torch.as_tensor(got[key]), torch.as_tensor(want[key])), key


@pytest.mark.gpu
def test_asynchronous_checkpoints_on_the_gpu(jobs, tmp_path):
    """What they hold, and that a run resumed from one is the uninterrupted one."""
    env = {name: value for name, value in jobs.env.items() if name not in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}
    if devices := os.environ.get("CUDA_VISIBLE_DEVICES"):
        env["CUDA_VISIBLE_DEVICES"] = devices

    def run(mode):
        out = tmp_path / mode
        for last in (STEPS,) if mode == "disabled" else (6, STEPS):
            done = subprocess.run(
                [sys.executable, "-m", "momoe_titan.train", *jobs.options(out)]
                + ["--model.flavor=debugmodel", "--debug.deterministic", "--debug.seed=0"]
                # a logged step waits for the GPU, and the saved ones are not to
                + [f"--training.steps={last}", f"--checkpoint.async_mode={mode}", "--metrics.log_freq=5"],
                cwd=ROOT,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=300,
            )
            assert done.returncode == 0, done.stdout[-5000:]
        return [contents(out, step) for step in (4, STEPS)]

    with ThreadPoolExecutor(3) as side_by_side:  # a start takes most of a job's time
        want, *others = side_by_side.map(run, ("disabled", "async", "async_with_pinned_mem"))
    for states in others:
        for got, expected in zip(states, want, strict=True):
            assert_same_contents(got, expected)
