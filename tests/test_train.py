"""Short runs of the whole program on the CPU."""

import contextlib
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support import commands
from tests.support.shared import made_once

ROOT = Path(__file__).parent.parent
# Some seconds a run: the debug model on short sequences.
SMALL = [
    "--training.seq_len=64",
    "--training.local_batch_size=4",
    "--metrics.log_freq=1",
    "--metrics.disable_color_printing",
    "--validation.seq_len=64",
    "--validation.local_batch_size=4",
    "--validation.steps=2",
    "--lr_scheduler.warmup_steps=4",
]


DEBUG_MODEL = "-m", "momoe_titan.train", "--job.config_file", "train_configs/debug_model.toml"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def train(out: Path, *options: str, processes: int = 1, on_gpu: bool = False) -> str:
    """Run debug_model.toml with options to its end; returns what it printed."""
    command = [*DEBUG_MODEL, "--job.dump_folder", str(out), *SMALL, *options]
    if on_gpu:
        start = [sys.executable] if processes == 1 else [*TORCHRUN, "--local-ranks-filter=0", "--tee=3"]
        env = commands.environment()
        for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
            env.pop(name)
            env |= {name: os.environ[name]} if name in os.environ else {}
        merged = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        run = subprocess.run([*start, *command], cwd=ROOT, env=env, text=True, timeout=900, **merged)
    else:
        run = commands.run(*command, merge=True)
    assert run.returncode == 0, run.stdout[-5000:]
    return run.stdout


def losses(output: str) -> dict[int, float]:
    return {int(s): float(x) for s, x in re.findall(r" step: +(\d+) +loss: +([\d.]+)", output)}


def test_loss_falls_and_tensorboard_has_the_scalars(tmp_path):
    output = train(tmp_path, "--training.steps=25")
    logged = losses(output)
    assert sorted(n for n in logged) == list(range(1, 26))
    assert logged[1] == pytest.approx(7.62, abs=0.8)  # ln 2048, an even guess
    assert logged[25] < logged[1] - 0.6

    # Nothing pretends to be a GPU.
    assert "No GPU: training on the CPU" in output
    assert "float32 arithmetic" in output
    assert "mfu:" not in output and "CUDA" not in output and "A100" not in output

    (run,) = (tmp_path / "tb").iterdir()
    events = EventAccumulator(str(run))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {
        "loss_metrics/global_avg_loss",
        "validation_metrics/loss",
        "throughput(tps)",
        "moe/maxvio_batch_mean",
        "moe/maxvio_batch_max",
        "moe/dead_experts",
        "moe/bias_min",
        "moe/bias_max",
        "moe/dropped_tokens",
        "moe/kernel_compiles",
    } <= tags
    assert not any("mfu" in tag for tag in tags)
    values = {tag: [e.value for e in events.Scalars(tag)] for tag in tags}
    assert set(values["moe/dropped_tokens"]) == {0.0}
    assert values["moe/bias_max"][-1] > 0 > values["moe/bias_min"][-1]
    assert all(v == v for series in values.values() for v in series)  # no NaN


@pytest.mark.slow
def test_save_percent_changes_no_loss(tmp_path):
    only_steps = "--training.steps=4", "--validation.no-enable", "--checkpoint.no-enable"
    runs = [
        losses(train(tmp_path / str(i), *only_steps, "--momoe.save_percent", *percents))
        for i, percents in enumerate((["0"], ["100"], ["0", "37", "100"]))
    ]
    assert len(runs[0]) == 4
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.gpu
def test_loss_falls_on_the_gpu(tmp_path):
    output = train(tmp_path, "--training.steps=25", "--momoe.backend=triton", on_gpu=True)
    logged = losses(output)
    assert logged[25] < logged[1] - 0.6
    assert torch.cuda.get_device_name() in output


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kind", ["context", "tensor"])
def test_two_gpus_share_the_sequence(tmp_path, kind):
    """Both GPUs see the data of the one, whose ring attention and sums are rounded elsewhere."""
    job = ["--training.steps=8", "--debug.seed=42", "--training.mixed_precision_param=bfloat16"]
    if kind == "tensor":  # without FSDP, TorchTitan computes in the dtype of the weights
        job[-1] = "--training.mixed_precision_param=float32"
    one = losses(train(tmp_path / "one", *job, on_gpu=True))
    degree = f"--parallelism.{kind}_parallel_degree=2"
    two = losses(train(tmp_path / "two", *job, degree, processes=2, on_gpu=True))
    assert two == pytest.approx(one, rel=1e-2)


@dataclass
class Outcome:
    """Of a job of two processes under torchrun: its folder, exit status and what it printed."""

    folder: Path
    status: int
    output: str


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Outcome:
    """FSDP over two processes, in the foreground of a terminal of their own, where Ctrl-C is pressed after step 12."""
    folder = made_once(tmp_path_factory, "torchrun", interrupt)
    return Outcome(folder, int((folder / "status").read_text()), (folder / "output").read_text())


def interrupt(folder: Path) -> None:
    options = ["--training.steps=100000", "--training.local_batch_size=2", "--validation.freq=5"]
    job, output = commands.follow(
        *(*TORCHRUN[1:], *DEBUG_MODEL, "--job.dump_folder", folder, *SMALL, *options), before=[os.setsid]
    )
    with output:
        lines = []
        for line in output:
            lines.append(line)
            if " step: 12 " in line:
                os.killpg(job.pid, signal.SIGINT)
                break
        late = threading.Timer(120, os.killpg, (job.pid, signal.SIGKILL))
        late.start()
        lines += output
        late.cancel()
    job.join(120)
    (folder / "status").write_text(str(job.exitcode))
    (folder / "output").write_text("".join(lines))


@pytest.mark.slow
def test_two_processes_learn(interrupted):
    """On the same global batch of other documents."""
    logged = losses(interrupted.output)
    assert sorted(logged)[:12] == list(range(1, 13))
    assert logged[12] < logged[1] - 0.3


@pytest.mark.slow
def test_ctrl_c_under_torchrun_saves_one_checkpoint(interrupted):
    """The terminal's signal reaches all processes, and torchrun sends its workers another one. Each line comes once."""
    output = interrupted.output
    assert interrupted.status != 0
    (stopped,) = re.findall(r"SIG\w+: stopped after step (\d+); checkpoint \S+/step-\d+; resume: .*torchrun", output)
    assert (interrupted.folder / "checkpoint" / f"step-{stopped}" / ".metadata").is_file(), output[-3000:]
    for once in ("Starting job", "Training starts at step 1", " step:  2 ", "Total parameter count"):
        assert output.count(once) == 1, (once, output)


def test_what_cannot_be_used_is_said_once_by_all_processes(tmp_path):
    """The first has said it when it ends, which is when torchrun ends the others."""
    with open(tmp_path / "output", "w") as output:
        ranks = [
            commands.start(
                *(*DEBUG_MODEL, "--job.dump_folder", tmp_path, *SMALL, "--momoe.vocab_size=100"),
                stdout=output.fileno(),
                env=commands.environment(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2"),
            )
            for rank in (0, 1)
        ]
        ranks[0].join(120)
        ranks[1].terminate()
        ranks[1].join(120)
    said = (tmp_path / "output").read_text()
    assert ranks[0].exitcode == 2 and ranks[1].exitcode != 0
    assert said.count("error: model.hf_assets_path") == 1, said


def test_console_is_quiet_unless_asked(tmp_path):
    quiet = train(tmp_path / "quiet", "--training.steps=2", "--checkpoint.no-enable")
    assert "root - INFO" not in quiet and '"moe_args"' not in quiet and "set_vital" not in quiet
    assert "Mixed precision" not in quiet and "Peak FLOPS" not in quiet and "Sleeping" not in quiet
    before, _, _ = quiet.partition("Training starts at step 1")
    assert len(before.splitlines()) < 10, quiet
    everything = train(tmp_path / "all", "--training.steps=1", "--checkpoint.no-enable", "--log_level=debug")
    assert '"moe_args"' in everything and "root - INFO" in everything
    silent = train(tmp_path / "errors", "--training.steps=1", "--checkpoint.no-enable", "--log_level", "error")
    assert "step:" not in silent and silent.startswith("Trained to step 1")


def test_summary_s_commands_work(tmp_path):
    """The last step is logged, validated and saved, and what the summary says can be pasted."""
    output = train(tmp_path, "--training.steps=3", "--metrics.log_freq=2", "--validation.freq=50")
    assert " step:  3 " in output and "validate step:  3" in output
    assert "Trained to step 3 in" in output and "(perplexity " in output and "tokens/s per device, peak" in output
    assert re.search(r"balance: MaxVio [\d.]+ in the last step, [\d.]+ over the validation set; .* token: \d+", output)
    shown = dict(re.findall(r"^  (go on|sample|export|dashboard) +(.*)$", output, flags=re.MULTILINE))
    assert "(up to step 6: training.steps doubled)" in output
    assert set(shown) == {"go on", "sample", "export", "dashboard"}
    for name, expected in (
        ("sample", "def main("),
        ("export", ""),
        ("dashboard", "dashboard.html"),
        ("go on", "Training starts at step 4"),
    ):
        program, *options = shlex.split(shown[name])
        assert Path(program).name.startswith("python")
        done = commands.run(*options)
        assert done.returncode == 0 and expected in done.stdout, (name, done.stderr[-3000:])
    assert (tmp_path / "hf-step-3" / "config.json").is_file() and (tmp_path / "checkpoint" / "step-6").is_dir()


def test_a_run_that_someone_watches_ends_with_a_text(tmp_path):
    shown, terminal = pty.openpty()
    options = ["--job.dump_folder", tmp_path, *SMALL, "--training.steps=2", "--validation.no-enable"]
    job = commands.start(*DEBUG_MODEL, *options, stdout=terminal, env=commands.environment(TERM="dumb"))
    os.close(terminal)
    output = b""
    with contextlib.suppress(OSError):  # the terminal's end
        while part := os.read(shown, 1 << 16):
            output += part
    os.close(shown)
    job.join(60)
    assert job.exitcode == 0
    _, found, text = output.decode(errors="replace").partition("a text by this model:\r\n")
    lines = [line for line in text.splitlines() if line.startswith("  | ")]
    assert found and text.startswith("  | ") and len("".join(lines)) > 20 + 4 * len(lines), output[-2000:]


def assert_ended_at_once(early: signal.Signals, first: str, rest: str) -> None:
    assert first and "Traceback" not in rest
    assert rest.splitlines()[-1].startswith(f"{early.name}: ended at once")


def test_ctrl_c_before_the_first_step_ends_the_run_at_once(tmp_path):
    """In one line, whatever it is doing."""
    with subprocess.Popen(
        [sys.executable, *DEBUG_MODEL, "--job.dump_folder", str(tmp_path), *SMALL],
        cwd=ROOT,
        env=commands.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as job:
        first = job.stdout.readline()
        job.send_signal(signal.SIGINT)
        rest, _ = job.communicate(timeout=60)
    assert job.returncode == 130, rest
    assert_ended_at_once(signal.SIGINT, first, rest)


def test_sigterm_before_the_first_step_ends_the_run_at_once(tmp_path):
    job, output = commands.follow(*DEBUG_MODEL, "--job.dump_folder", tmp_path, *SMALL)
    with output:
        first = output.readline()
        job.terminate()
        rest = output.read()
    job.join(60)
    assert job.exitcode == 143, rest
    assert_ended_at_once(signal.SIGTERM, first, rest)
