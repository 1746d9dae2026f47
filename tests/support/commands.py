"""Commands of this package, each in a process that has imported torch and TorchTitan before it begins.

To import them takes longer than most commands take. Python's fork server does so once (tests/support/preloaded.py),
and each command is a fork of it, which runs a module, a script or a program as `python` would: under the name
`__main__`, with arguments, environment, folder and output of its own, and to the end of the process.

The environment comes too late for what libraries read when they are imported: no command sees a GPU, Triton compiles
in place of interpreting, and OpenMP has one thread. Tests of just that start `python` itself.
"""

import io
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import NoReturn
from unittest import mock

ROOT = Path(__file__).parents[2]


def environment(**more: str) -> dict[str, str]:
    """That of this process, for one without a GPU and without Triton's interpreter."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **more}
    env.pop("TRITON_INTERPRET", None)
    return env


def free_port() -> int:
    """A port of this machine on which nothing listens."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


class _Streams:
    """File descriptors, of which the process that gets this object has copies."""

    def __init__(self, *fds: int):
        self.fds = fds

    def __getstate__(self) -> list:
        return [DupFd(fd) for fd in self.fds]

    def __setstate__(self, copies: list) -> None:
        self.fds = [copy.detach() for copy in copies]


class _CommandLine(Sequence):
    """sys.argv[1:] as it is when it is read: TorchTitan takes the one of its import for a default."""

    def __getitem__(self, index):
        return sys.argv[1:][index]

    def __len__(self) -> int:
        return len(sys.argv) - 1


def _run(command: list[str], env: dict[str, str], cwd: str, streams: _Streams, before: list[Callable]) -> NoReturn:
    from torchtitan.config import ConfigManager

    from momoe_titan.train import end_process

    for mine, fd in enumerate(streams.fds):
        os.dup2(fd, mine)
        os.close(fd)
    sys.stdin = os.fdopen(0, closefd=False)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    status = 1
    try:
        for function in before:
            function()
        ConfigManager.parse_args.__defaults__ = (_CommandLine(),)
        if command[0] == "-m":
            sys.argv = command[1:]
            sys.modules.pop(command[1], None)  # which may have been imported, and is run as __main__
            sys.modules.pop(f"{command[1]}.__main__", None)
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        elif command[0] == "-c":
            sys.argv = ["-c", *command[2:]]
            exec(compile(command[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = command
            sys.path.insert(0, os.path.abspath(os.path.dirname(command[0])))
            runpy.run_path(command[0], run_name="__main__")
        status = 0
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
        if status == 1 and not isinstance(e.code, int):
            print(e.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        end_process(status)


def start_server() -> None:
    """Start the process that all commands are forks of, if it does not run."""
    forkserver.set_forkserver_preload(["tests.support.preloaded"])
    with mock.patch.dict(os.environ, environment(), clear=True):
        forkserver._forkserver.ensure_running()


def share_server() -> None:
    """To be called in a process that the one which has started the server has forked: there the server is no child."""
    forkserver._forkserver.ensure_running = lambda: None  # it runs


def start(
    *command: str | Path,
    stdout: int,
    stderr: int | None = None,
    stdin: int | None = None,
    env: dict[str, str] | None = None,
    cwd: Path = ROOT,
    before: Sequence[Callable[[], object]] = (),
) -> ForkServerProcess:
    """Start what `python COMMAND` would.

    Args:
        command: a file, `-m` and a module, or `-c` and a program; and the arguments.
        stdout: file descriptor that the process writes to.
        stderr: the same for its messages; that of `stdout` where left out.
        stdin: file descriptor that the process reads from; it finds nothing to read where left out.
        env: its environment; what `environment()` gives where left out.
        cwd: the folder it is in.
        before: functions that the process calls before the command; they can be pickled.
    """
    start_server()
    context = multiprocessing.get_context("forkserver")
    words = [str(word) for word in command]
    with open(os.devnull) as nothing:
        streams = _Streams(nothing.fileno() if stdin is None else stdin, stdout, stdout if stderr is None else stderr)
        process = context.Process(target=_run, args=(words, env or environment(), str(cwd), streams, list(before)))
        process.start()
    return process


def follow(*command: str | Path, **options) -> tuple[ForkServerProcess, io.TextIOWrapper]:
    """Start a command; also gives what it says, line by line as it says it."""
    reads, writes = os.pipe()
    try:
        return start(*command, stdout=writes, **options), open(reads)
    finally:
        os.close(writes)


def run(
    *command: str | Path, timeout: float = 900, merge: bool = False, stdin: str = "", **options
) -> subprocess.CompletedProcess:
    """Run a command to its end. `merge` puts its messages into `stdout`; `stdin` is what it reads.

    Raises:
        subprocess.TimeoutExpired: it took more than `timeout` seconds, and was killed.
    """
    with ExitStack() as open_files:
        given, out, err = (open_files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(3))
        given.write(stdin)
        given.seek(0)
        streams = {"stdin": given.fileno(), "stdout": out.fileno(), "stderr": (out if merge else err).fileno()}
        process = start(*command, **streams, **options)
        process.join(timeout)
        is_late = process.exitcode is None
        if is_late:
            process.kill()
            process.join()
        out.seek(0)
        err.seek(0)
        done = subprocess.CompletedProcess(command, process.exitcode, out.read(), err.read())
    if is_late:
        raise subprocess.TimeoutExpired(command, timeout, done.stdout, done.stderr)
    return done


class Popen:
    """In place of subprocess.Popen, as far as this package uses it: for `python` commands that run to their end."""

    def __init__(self, args: Sequence[str], stdin=None, stdout=None, stderr=None, text: bool = False, **options):
        self.args, self.stdout, self.stderr, self.text, self.options = args, stdout, stderr, text, options
        assert args[0] == sys.executable

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        pass

    def poll(self) -> int:
        return self.returncode

    def communicate(self, input=None, timeout: float | None = None) -> tuple:
        given = input if self.text or input is None else input.decode()
        done = run(*self.args[1:], stdin=given or "", merge=self.stderr == subprocess.STDOUT, **self.options)
        self.returncode = done.returncode
        for file, said in ((self.stdout, done.stdout), (self.stderr, done.stderr)):
            if hasattr(file, "write"):
                file.write(said)
        return done.stdout if self.text else done.stdout.encode(), None


def fork_children() -> None:
    """For `before` of `start`: commands that the command starts come from the same fork server."""
    share_server()
    subprocess.Popen = Popen
