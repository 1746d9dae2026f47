"""Train through TorchTitan's own trainer, also where there is no GPU.

    python -m momoe_titan.train --job.config_file train_configs/debug_model.toml
    torchrun --nproc_per_node=2 -m momoe_titan.train --job.config_file ...

On a GPU this is `torchrun -m torchtitan.train` with the configuration checked
before anything is built. On the CPU it also supplies what TorchTitan 0.2.2 takes
for granted from a GPU: see `describe_cpu` and `prepare_cpu_job`. Without torchrun
it is a job of one process.

Exit status: 0 after training, 2 for a configuration that cannot be used (with a
message that names the field), another one when training fails.
"""

import atexit
import importlib
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn
from unittest import mock

# Before torch loads its OpenMP runtime: threads that wait for one another asleep.
# Spinning, they slow a step several times over on cores shared with other work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from momoe_titan.config.command_line import missing_section_option, was_given

if TYPE_CHECKING:
    from torchtitan.config import JobConfig

# TorchTitan reads the device type once, where it is first imported (many of its
# modules bind the value), so it must not be imported above `describe_cpu`.


class CpuDevice:
    """What TorchTitan asks of its device module, for a CPU.

    torch.cpu itself will not do: its current device is "cpu", where a barrier
    wants an index.
    """

    @staticmethod
    def set_device(device: torch.device) -> None:
        """Nothing to choose from."""

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def synchronize() -> None:
        """The CPU has nothing under way when a call returns."""


@contextmanager
def describe_cpu() -> Iterator[None]:
    """While open, TorchTitan sees that the device of this machine is the CPU.

    Three functions stand in for their originals: during TorchTitan's import the
    two by which it learns the device's type and module (TorchTitan 0.2.2 falls back
    to "cuda" where there is no device), and while the job runs the one that looks
    up a device's peak FLOPS (which takes an unknown device for an A100). A CPU's
    peak is not a number: no utilisation is reported rather than a wrong one.
    Process groups have one thread: see `one_gloo_thread`.

    Raises:
        RuntimeError: TorchTitan was imported before and took the device for a GPU.
    """
    with (
        mock.patch("torch._utils._get_available_device_type", return_value="cpu"),
        mock.patch("torch._utils._get_device_module", return_value=CpuDevice),
    ):
        from torchtitan.tools import utils
    if utils.device_type != "cpu":
        raise RuntimeError("momoe_titan.train must be started before torchtitan is imported on a machine without a GPU")
    with mock.patch.object(utils, "get_peak_flops", return_value=float("nan")), one_gloo_thread():
        yield


@contextmanager
def one_gloo_thread() -> Iterator[None]:
    """While open, gloo's process groups get one thread for their collectives in place of two.

    With two, torch 2.13 writes the name of the collective that ended last from both at once, without
    a lock. Where it is a long one, as that of DTensor's all-gathers, a block of the heap is freed twice,
    and the process ends with a signal.
    """
    gloo = torch.distributed.ProcessGroupGloo
    original = gloo.__init__

    def init(
        self: Any, store: Any, rank: int, size: int, options: Any = None, *,
        timeout: timedelta = torch.distributed.constants.default_pg_timeout,
    ) -> None:  # fmt: skip
        if options is None:
            options = gloo._Options()
            options._devices = [gloo.create_default_device()]
            options._threads = 1
            options._timeout = timeout
        original(self, store, rank, size, options)

    with mock.patch.object(gloo, "__init__", init):
        yield


def set_single_process_defaults() -> None:
    """Environment of a job of one process, where torchrun has set none."""
    if "RANK" in os.environ:
        return
    for name, value in (
        ("RANK", "0"),
        ("LOCAL_RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("MASTER_ADDR", "localhost"),
        ("MASTER_PORT", "0"),  # the store picks a free one
    ):
        os.environ[name] = value


def prepare_cpu_job(config: "JobConfig", args: list[str]) -> None:
    """Adapt a configuration to the CPU, in place.

    Mixed precision becomes float32 unless `training.mixed_precision_param` was
    given: bfloat16 saves no memory worth having there and is slower.

    Raises:
        ValueError: The job asks for something that only a GPU has.
    """
    from torchtitan.tools.logging import logger

    for field, given in (
        ("training.enable_cpu_offload", config.training.enable_cpu_offload),
        (
            "profiling.enable_memory_snapshot",
            config.profiling.enable_memory_snapshot,
        ),
        ("profiling.enable_profiling", config.profiling.enable_profiling),
        (
            "parallelism.enable_async_tensor_parallel",
            config.parallelism.enable_async_tensor_parallel,
        ),
    ):
        if given:
            raise ValueError(f"{field} is true, but this machine has no GPU")
    if (degree := config.parallelism.context_parallel_degree) > 1:
        raise ValueError(
            f"parallelism.context_parallel_degree is {degree}, but this machine has no GPU: "
            "torch's ring attention has no kernel for a CPU"
        )
    if config.checkpoint.async_mode == "async_with_pinned_mem":
        raise ValueError(
            "checkpoint.async_mode is 'async_with_pinned_mem', but this machine has no GPU; 'async' works here"
        )
    if not was_given("training.mixed_precision_param", args):
        config.training.mixed_precision_param = "float32"
    logger.info(
        "No GPU: training on the CPU with "
        f"{torch.get_num_threads()} threads per process, "
        f"{config.training.mixed_precision_param} arithmetic"
    )
    # Every process of the job is on the one device "cpu:0".
    os.environ["LOCAL_RANK"] = "0"
    # TorchTitan turns autocast on with float32 too, which is the same as off.
    warnings.filterwarnings("ignore", "In CPU autocast, but the target dtype")


def check_config(config: "JobConfig") -> None:
    """Refuse a job that would fail later, before anything is built.

    Also resolves `model.hf_assets_path` where it names a folder of this package.

    Raises:
        ValueError: Names the field and its value.
    """
    from torchtitan.hf_datasets.text_datasets import DATASETS

    from momoe_titan.config.fields import check_fields, check_flavor
    from momoe_titan.data.tokenizer import build_tokenizer, resolve_assets_path

    check_fields(config)
    module = config.experimental.custom_import
    if module:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as e:
            raise ValueError(f"experimental.custom_import {module!r}: {e}") from e

    folder = config.job.dump_folder
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise ValueError(f"job.dump_folder {folder!r} cannot be written: {e}") from e
    if config.checkpoint.enable and not config.checkpoint.load_only:
        # Not made here: a run without this folder is a new one.
        parent = checkpoints = os.path.join(folder, config.checkpoint.folder)
        while not os.path.exists(parent):
            parent = os.path.dirname(parent)
        try:
            tempfile.TemporaryFile(dir=parent).close()
        except OSError as e:
            raise ValueError(f"checkpoint.folder {checkpoints!r} cannot be written: {e}") from e
        if config.checkpoint.interval < 1:
            raise ValueError(f"checkpoint.interval is {config.checkpoint.interval}, must be at least 1")
        # One may be in the writing.
        if config.checkpoint.keep_latest_k == 1 or config.checkpoint.keep_latest_k < 0:
            raise ValueError(
                f"checkpoint.keep_latest_k is {config.checkpoint.keep_latest_k}, must be 0 (all) or at least 2"
            )

    model_args = check_flavor(config)
    model_args.update_from_config(config)

    config.model.hf_assets_path = resolve_assets_path(config.model.hf_assets_path)
    n_tokens = build_tokenizer(config).get_vocab_size()
    n_embedded = getattr(model_args, "vocab_size", n_tokens)
    if n_tokens > n_embedded:
        raise ValueError(
            f"model.hf_assets_path {config.model.hf_assets_path!r} has a tokenizer of "
            f"{n_tokens} entries, but the model embeds {n_embedded}; set "
            f"momoe.vocab_size to {n_tokens} or more"
        )

    datasets = [("training.dataset", config.training.dataset)]
    if config.validation.enable:
        datasets.append(("validation.dataset", config.validation.dataset))
    for field, name in datasets:
        if name.lower() not in DATASETS:
            raise ValueError(f"{field} {name!r} is none of {', '.join(map(repr, DATASETS))}")


def complete_hf_folder(config: "JobConfig") -> None:
    """Give the last checkpoint, if it was saved in Hugging Face's format, the config.json and the
    tokenizer that transformers needs; TorchTitan writes the weights alone.

    A run that was at its end before has saved nothing: its last checkpoint stays what it is, and a
    warning says so."""
    from torchtitan.protocols.train_spec import get_train_spec
    from torchtitan.tools.logging import logger

    from momoe_titan.model.hugging_face.config import saved_dtype, write_hf_config
    from momoe_titan.register import MODEL_NAME

    checkpoint = config.checkpoint
    if not (checkpoint.enable and checkpoint.last_save_in_hf and config.model.name == MODEL_NAME):
        return
    folder = os.path.join(config.job.dump_folder, checkpoint.folder, f"step-{config.training.steps}")
    if os.environ["RANK"] == "0" and os.path.isdir(folder):
        if not any(name.endswith(".safetensors") for name in os.listdir(folder)):
            logger.warning(
                f"checkpoint.last_save_in_hf is true, but {folder!r} is of an earlier run and not in "
                "Hugging Face's format: this run saved nothing. python -m momoe_titan.export converts it"
            )
            return
        model_args = get_train_spec(MODEL_NAME).model_args[config.model.flavor]
        model_args.update_from_config(config)
        write_hf_config(folder, model_args, config.model.hf_assets_path, saved_dtype(folder))


def run(args: list[str]) -> None:
    """Read the configuration, check it, train.

    Args:
        args: Those of the process, which TorchTitan reads by itself.
    """
    from torchtitan import train as titan

    from momoe_titan.components.checkpoint import CheckpointError, CheckpointManager
    from momoe_titan.data.errors import DataError

    accepted: JobConfig | None = None

    def build_trainer(config: "JobConfig") -> Any:
        nonlocal accepted
        if not torch.cuda.is_available():
            prepare_cpu_job(config, args)
        check_config(config)
        accepted = config
        return titan.Trainer(config)

    try:
        # The trainer has no field for it.
        with mock.patch.object(titan, "CheckpointManager", CheckpointManager):
            titan.main(build_trainer)
        complete_hf_folder(accepted)
    except (ValueError, OSError) as e:  # OSError: the configuration file itself
        if accepted is not None and not isinstance(e, (DataError, CheckpointError)):
            raise
        # The message says which field to change; a traceback would bury it.
        print(f"{os.path.basename(sys.argv[0])}: error: {e}", file=sys.stderr)
        sys.exit(2)


def main() -> None:
    set_single_process_defaults()
    # Without it there would be no section [momoe], and none of it in --help.
    sys.argv += missing_section_option(sys.argv[1:])
    if torch.cuda.is_available():
        run(sys.argv[1:])
    else:
        with describe_cpu():
            run(sys.argv[1:])


def end_process() -> NoReturn:
    """End with status 0, after all that Python does at its end but that end itself.

    DTensor's caches keep device meshes beyond destroy_process_group, and these threads of gloo. One that
    then frees a tensor of the last collective asks for the GIL, and Python before 3.14 ends it for that,
    which in C++ is std::terminate: a trained job would fail on its way out.
    """
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
    if not torch.cuda.is_available():
        end_process()
