"""The training command: checks a job and trains it with TorchTitan's trainer, also without a GPU.

    python -m momoe_titan.train --job.config_file train_configs/debug_model.toml
    torchrun --nproc_per_node=2 -m momoe_titan.train --job.config_file ...

On a GPU this is `torchrun -m torchtitan.train` with the configuration checked
before anything is built. On the CPU it also supplies what TorchTitan 0.2.2 takes
for granted from a GPU: see `describe_cpu` and `components.trainer.prepare_cpu_job`. Without torchrun
it is a job of one process.

--log_level debug shows all that TorchTitan says, of all processes; warning and
error show less than the default, info.

Exit status: 0 after training, 2 for a configuration that cannot be used (with a
message that names the field), 130 and 143 where Ctrl-C or SIGTERM stopped it, 1
when training fails.
"""

import atexit
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any, NoReturn
from unittest import mock

# Before torch loads its OpenMP runtime: threads that wait for one another asleep.
# Spinning, they slow a step several times over on cores shared with other work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch.distributed.constants import default_pg_timeout

from momoe_titan.config.command_line import missing_section_option, take_log_level

USAGE = """usage: python -m momoe_titan.train --job.config_file FILE [--SECTION.FIELD VALUE ...]

A first run, on any machine: --job.config_file train_configs/debug_model.toml
--help lists every field with its default; a field on the command line overrides the one in the file."""
SAMPLE_TOKENS = 60  # of the text at the end of a run

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

    TorchTitan 0.2.2 asks two functions of torch for the device when it is imported, and falls back to "cuda"
    where there is no device: others stand in for them during the import. What its trainer logs about a GPU's peak
    FLOPS is left out, and process groups have one thread: see `one_gloo_thread`.

    Raises:
        RuntimeError: TorchTitan was imported before and took the device for a GPU.
    """
    with mock.patch.multiple(
        "torch._utils",
        _get_available_device_type=lambda: "cpu",
        _get_device_module=lambda device_type: CpuDevice,
    ):
        from torchtitan.tools import utils
    if utils.device_type != "cpu":
        raise RuntimeError("momoe_titan.train must be started before torchtitan is imported on a machine without a GPU")
    from torchtitan.tools.logging import logger

    logger.addFilter(_is_no_gpu_s_peak)
    try:
        with one_gloo_thread():
            yield
    finally:
        logger.removeFilter(_is_no_gpu_s_peak)


def _is_no_gpu_s_peak(record: logging.LogRecord) -> bool:
    """False for what TorchTitan's trainer says about the peak FLOPS of a device that it does not know."""
    return not str(record.msg).startswith(("Error running lspci", "Peak flops undefined", "Peak FLOPS used"))


@contextmanager
def one_gloo_thread() -> Iterator[None]:
    """While open, gloo's process groups run their collectives on one thread in place of two.

    In torch 2.13 each of the two threads writes the name of the collective that it ended last into the same string,
    without a lock. Where the name is long, as that of DTensor's all-gathers, a block of the heap is freed twice and
    the process ends with a signal. torch takes options of gloo nowhere: `init_process_group` and `new_group` ignore
    `pg_options`, and no environment variable names the number of threads.
    """
    gloo: Any = torch.distributed.ProcessGroupGloo  # its options have private names
    original = gloo.__init__

    def init(
        self: Any, store: Any, rank: int, size: int, options: Any = None, *,
        timeout: timedelta = default_pg_timeout, **more: Any,
    ) -> None:  # fmt: skip
        if options is None:
            options = gloo._Options()
            options._devices = [gloo.create_default_device()]
            options._threads = 1
            options._timeout = timeout
            for name in list(more):  # enable_reconfigure, which PyTorch 2.15 gives
                setattr(options, name, more.pop(name))
        original(self, store, rank, size, options, **more)

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


def sample_text(model: Any, tokenizer: Any) -> str:
    """A short text by a model that has just been trained, for the end of a run that someone watches."""
    from momoe_titan.inference.sampling import generate, stream_text

    prompt = tokenizer.encode("", add_bos=True, add_eos=False) or [tokenizer.eos_id]
    length = min(SAMPLE_TOKENS, model.freqs_cis.shape[0] - len(prompt))
    tokens = generate(model.eval(), prompt, length, temperature=0.8, seed=0)
    return "".join(stream_text(tokenizer, tokens))


def main() -> int:
    """Train. Returns the exit status, or ends the process with status 2 where the job cannot be used."""
    if not sys.argv[1:]:
        print(USAGE, file=sys.stderr)
        sys.exit(2)
    set_single_process_defaults()
    try:
        log_level = take_log_level(sys.argv)
    except ValueError as e:
        print(f"{os.path.basename(sys.argv[0])}: error: {e}", file=sys.stderr)
        sys.exit(2)
    # Without it there would be no section [momoe], and none of it in --help.
    sys.argv += missing_section_option(sys.argv[1:])
    with nullcontext() if torch.cuda.is_available() else describe_cpu():
        from momoe_titan.components.trainer import train

        return train(sys.argv[1:], log_level, sample_text)


def end_process(status: int = 0) -> NoReturn:
    """End with this status, after all that Python does at its end except the end of the interpreter.

    DTensor's caches keep device meshes alive after destroy_process_group, and so the threads of gloo. Such a thread
    that then frees a tensor of the last collective asks for the GIL. Python before 3.14 ends the thread for that, in
    C++ by std::terminate: a job that has been trained would fail on its way out.
    """
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]: what Python's own end calls first
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    exit_status = main()
    if not torch.cuda.is_available():
        end_process(exit_status)
    sys.exit(exit_status)
