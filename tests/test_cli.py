"""`momoe_titan.train` before the first step: what it refuses, and how it says so."""

import copy
import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torchtitan.config import ConfigManager

from momoe_titan import train
from momoe_titan.components import trainer
from momoe_titan.config.checks.fields import check_fields
from tests.support import commands

ROOT = Path(__file__).parent.parent
DEBUG_MODEL = ROOT / "train_configs" / "debug_model.toml"


@functools.cache
def parsed(*options: str):
    return ConfigManager().parse_args(["--job.config_file", str(DEBUG_MODEL), *options])


@pytest.fixture
def read(tmp_path, monkeypatch):
    """debug_model.toml with options, the way the entry sees it."""
    monkeypatch.chdir(ROOT)

    def read(*options: str):
        config = copy.deepcopy(parsed(*options))
        if not any("dump_folder" in option for option in options):
            config.job.dump_folder = str(tmp_path / "out")
        return config

    return read


def launch(*options: str) -> subprocess.CompletedProcess:
    """`python -m momoe_titan.train`, from the repository's root."""
    return commands.run("-m", "momoe_titan.train", *options)


def test_debug_model_is_accepted(read):
    config = read()
    trainer.check_config(config)
    assert config.momoe.save_percent == [0.0]
    assert Path(config.model.hf_assets_path, "tokenizer.json").is_file()


def test_check_leaves_the_registered_model_alone(read):
    from torchtitan.protocols.train_spec import get_train_spec

    trainer.check_config(read("--momoe.vocab_size=4096"))
    assert get_train_spec("momoe_llama").model_args["debugmodel"].vocab_size == 2048


@pytest.mark.parametrize(
    "option, named",
    [
        ("--experimental.custom_import=no.such.module", "experimental.custom_import 'no.such"),
        ("--model.name=no_such_model", "model.name 'no_such_model'"),
        ("--model.flavor=no_such_flavor", "model.flavor 'no_such_flavor'"),
        ("--model.hf_assets_path=no/such/folder", "model.hf_assets_path 'no/such/folder'"),
        ("--training.dataset=no_such_data", "training.dataset 'no_such_data'"),
        ("--validation.dataset=no_such_data", "validation.dataset 'no_such_data'"),
        ("--momoe.vocab_size=100", "momoe.vocab_size"),
        ("--job.dump_folder=/proc/momoe", "job.dump_folder '/proc/momoe'"),
    ],
)
def test_unusable_job_is_refused_before_anything_is_built(read, option, named):
    with pytest.raises(ValueError) as refused:
        trainer.check_config(read(option))
    assert named in str(refused.value)


@pytest.mark.parametrize(
    "field, value, must",
    [
        ("lr_scheduler.decay_type", "exp", "one of 'linear', 'sqrt', 'cosine'"),
        ("training.mixed_precision_param", "float16", "one of 'bfloat16', 'float32'"),
        ("checkpoint.enable", "false", "true or false"),
        ("training.steps", 3.5, "of type int"),
        ("training.steps", True, "of type int"),
        ("training.steps", 0, "at least 1"),
        ("optimizer.lr", "3e-3", "of type float"),
        ("optimizer.name", "SGD", "one of 'Adam', 'AdamW'"),
        ("optimizer.implementation", "foo", "one of 'for-loop', 'foreach', 'fused'"),
        ("compile.components", ["model", 1], "a list of str"),
        ("training.dataset_path", 1, "of type str or left out"),
        ("training.max_norm", -1.0, "above 0"),
        ("training.max_norm", float("nan"), "above 0"),
        ("training.gc_freq", 0, "at least 1"),
        ("metrics.log_freq", 0, "at least 1"),
        ("validation.freq", 0, "at least 1"),
        ("validation.seq_len", 0, "at least 1"),
        ("training.dataloader.num_workers", "2", "of type int"),
        ("optimizer.lr", -1.0, "at least 0"),
        ("optimizer.beta2", 1.0, "from 0 to below 1"),
        ("validation.steps", 0, "at least 1, or -1"),
    ],
)
def test_values_that_no_job_can_have_are_refused(read, field, value, must):
    """As TorchTitan takes them from a TOML file, where it checks neither type nor range."""
    config = read("--validation.enable")
    *sections, name = field.split(".")
    section = functools.reduce(getattr, sections, config)
    assert hasattr(section, name)
    setattr(section, name, value)
    with pytest.raises(ValueError, match=f"^{field} is {re.escape(repr(value))}, must be {must}"):
        trainer.check_config(config)


def test_values_that_only_the_types_forbid_are_accepted(read):
    config = read()
    config.training.mixed_precision_reduce = "bfloat16"
    config.training.max_norm, config.optimizer.lr = 1, 1
    trainer.check_config(config)


def test_a_seed_checkpoint_needs_checkpoints_and_one_process(read, monkeypatch):
    with pytest.raises(ValueError, match="create_seed_checkpoint is true, but checkpoint.enable is false"):
        trainer.check_config(read("--checkpoint.no-enable", "--checkpoint.create_seed_checkpoint"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="create_seed_checkpoint is true, which takes one process, but there are 2"):
        trainer.check_config(read("--checkpoint.enable", "--checkpoint.create_seed_checkpoint"))


@pytest.mark.parametrize("config_file", sorted(DEBUG_MODEL.parent.glob("*.toml")), ids=lambda file: file.stem)
def test_fields_of_the_configurations_are_accepted(config_file):
    check_fields(ConfigManager().parse_args(["--job.config_file", str(config_file)]))


def test_save_percent_of_the_wrong_length_is_refused(read):
    with pytest.raises(ValueError, match=r"momoe\.save_percent"):
        trainer.check_config(read("--momoe.save_percent", *["50"] * 9))


def test_dump_folder_that_is_a_file_is_refused(read, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ValueError, match="job.dump_folder"):
        trainer.check_config(read("--job.dump_folder", str(tmp_path / "taken")))


@pytest.mark.parametrize(
    "option", ["--checkpoint.interval=0", "--checkpoint.keep_latest_k=1", "--checkpoint.folder=/proc/no"]
)
def test_checkpoints_that_could_not_be_written_are_refused(read, option):
    with pytest.raises(ValueError, match=option[2:].partition("=")[0]):
        trainer.check_config(read("--checkpoint.enable", option))
    trainer.check_config(read("--checkpoint.no-enable", option))


def test_pinned_memory_is_refused_on_the_cpu(read):
    with pytest.raises(ValueError, match="checkpoint.async_mode"):
        trainer.prepare_cpu_job(read("--checkpoint.async_mode=async_with_pinned_mem"), [])


@pytest.mark.parametrize(
    "option",
    [
        "--training.enable_cpu_offload",
        "--profiling.enable_memory_snapshot",
        "--parallelism.enable_async_tensor_parallel",
        "--profiling.enable_profiling",
        "--parallelism.context_parallel_degree=2",
    ],
)
def test_gpu_options_are_refused_on_the_cpu(read, option):
    with pytest.raises(ValueError, match=option[2:].partition("=")[0]):
        trainer.prepare_cpu_job(read(option), [])


def test_cpu_job_is_float32_unless_said_otherwise(read, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    for args, expected in (
        ([], "float32"),
        (["--training.mixed_precision_param=bfloat16"], "bfloat16"),
    ):
        config = read(*args)
        trainer.prepare_cpu_job(config, ["--job.config_file", str(DEBUG_MODEL), *args])
        assert config.training.mixed_precision_param == expected
    # there is no device "cpu:1"
    assert os.environ["LOCAL_RANK"] == "0"


def test_the_end_of_a_process_leaves_out_the_interpreter_s_alone():
    program = """
import atexit, threading, time
from momoe_titan.train import end_process

class Late:
    def __del__(self):
        print("interpreter's end")

late = Late()
atexit.register(print, "at exit")
threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
print("main")
end_process()
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "main\nthread\nat exit\n")


def test_gloo_has_one_thread_in_a_job_on_the_cpu():
    program = """
from datetime import timedelta
from momoe_titan.train import describe_cpu, one_gloo_thread
from torch.distributed import HashStore, ProcessGroupGloo, destroy_process_group, init_process_group

def threads_and_timeout(*options, **timeout):
    options = ProcessGroupGloo(HashStore(), 0, 1, *options, **timeout).options
    return options._threads, options._timeout

with describe_cpu():
    assert threads_and_timeout(timeout=timedelta(seconds=7)) == (1, timedelta(seconds=7))
    with one_gloo_thread():
        assert threads_and_timeout() == (1, timedelta(minutes=30))
    own = ProcessGroupGloo._Options()
    own._devices, own._threads = [ProcessGroupGloo.create_default_device()], 3
    assert threads_and_timeout(own)[0] == 3
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)  # with all that this release of torch gives
    destroy_process_group()
assert threads_and_timeout()[0] == 2
"""
    done = commands.run("-c", program)
    assert done.returncode == 0, done.stderr


def test_one_process_without_torchrun(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "")  # so that it is restored after the test
        monkeypatch.delenv(name)
    train.set_single_process_defaults()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("0", "1")
    # torchrun's own are kept
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    train.set_single_process_defaults()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("3", "4")


def test_help_shows_the_section_always(tmp_path):
    (tmp_path / "job.toml").write_text("[training]\nsteps = 3\n")
    for options in (["--help"], ["--job.config_file", str(tmp_path / "job.toml"), "-h"]):
        shown = launch(*options)
        assert shown.returncode == 0
        assert "--momoe.save-percent" in shown.stdout
        assert "keep for the backward" in shown.stdout


def test_no_arguments_give_usage():
    command = [sys.executable, "-m", "momoe_titan.train"]
    shown = subprocess.run(command, cwd=ROOT, env=commands.environment(), capture_output=True, text=True, timeout=300)
    assert (shown.returncode, shown.stdout) == (2, "")
    assert shown.stderr.startswith("usage: python -m momoe_titan.train --job.config_file FILE")
    assert len(shown.stderr.splitlines()) < 8


def test_message_without_traceback_and_exit_status(tmp_path):
    job = tmp_path / "job.toml"
    job.write_text(DEBUG_MODEL.read_text().replace("save_percent = 0 ", "save_percent = 101 "))
    refused = launch("--job.config_file", str(job))
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith("train.py: error: momoe.save_percent")
    assert "101" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_missing_configuration_file_is_named():
    refused = launch("--job.config_file", "no/such/job.toml")
    assert refused.returncode == 2
    assert "no/such/job.toml" in refused.stderr.splitlines()[-1]
    assert "Traceback" not in refused.stdout + refused.stderr


def test_corrupt_dataset_file_stops_the_job_before_the_first_step(tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"text": "fine"}\n{"text": \n')
    refused = launch(
        *("--job.config_file", str(DEBUG_MODEL), "--job.dump_folder", str(tmp_path / "out")),
        *("--training.dataset", "local", "--training.dataset_path", str(file)),
    )
    assert refused.returncode == 2
    assert f"{str(file)!r}: line 2 is not JSON" in refused.stderr.splitlines()[-1]
    assert "step:" not in refused.stdout


@pytest.mark.parametrize("command", ["train", "generate", "export"])
def test_threads_of_a_command_wait_asleep(command):
    """Spinning on shared cores, they are fifty times slower. torch reads the setting when it is imported."""
    program = """
import importlib, os, sys

class Watch:
    def find_spec(self, name, *rest):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"))
            sys.exit()

sys.meta_path.insert(0, Watch())
importlib.import_module(sys.argv[1])
"""
    env = {name: value for name, value in commands.environment().items() if name != "OMP_WAIT_POLICY"}
    arguments = [sys.executable, "-c", program, f"momoe_titan.{command}"]
    assert subprocess.run(arguments, env=env, capture_output=True, text=True, check=True).stdout == "passive\n"
