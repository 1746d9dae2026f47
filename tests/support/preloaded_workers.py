"""Test processes of `pytest -n` as forks of one that has imported the tests and all that they need: to import it takes
longer than most test files do, and without files of bytecode each process would also compile it.

xdist starts this file in place of python, once for each test process:

    python -I -S preloaded_workers.py ADDRESS -u -c PROGRAM

That hands its streams and PROGRAM to the process with the imports, listening at ADDRESS, and waits for its fork to end.
The process with the imports ends with the one that has started it, whose pipe it reads from. It also starts the process
that commands are forks of (tests/support/commands.py), which all test processes share.
"""

import contextlib
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def start(tests: list[str], folder: Path) -> str:
    """Start the process with the imports; returns what the `python` of its forks is.

    Args:
        tests: what pytest is to find tests in, as in its command line.
        folder: where that command line was given.
    """
    address = f"momoe-titan-tests-{os.getpid()}"
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    reads, writes = os.pipe()
    os.set_inheritable(reads, True)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.preloaded_workers", address, *tests],
        **{"cwd": folder, "env": env, "stdin": reads, "stdout": subprocess.PIPE},
    )
    os.close(reads)  # the other end stays open as long as this process lives
    assert process.stdout.read(1), "it has ended before it listens"
    return shlex.join([sys.executable, "-I", "-S", __file__, address])


def in_fork(address: str, program: str) -> None:
    """Have a fork run a program with the streams of this process, and wait for its end, also after Ctrl-C."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(f"\0{address}")
        socket.send_fds(server, [program.encode()], [0, 1, 2])
        for fd in (0, 1):  # which are the fork's alone: the end of a stream is the end of its process
            os.close(fd)
        server.recv(1)


def import_all(tests: list[str]) -> None:
    import gc

    from tests.support import commands

    commands.start_server()  # it imports the same at the same time
    gc.disable()
    from tests.support import preloaded  # noqa: F401 - as on a machine without a GPU

    import_tests(tests)
    gc.enable()
    gc.freeze()


def import_tests(tests: list[str]) -> None:
    """By pytest, which finds them in sys.modules when it looks for tests in a fork."""
    import io

    import pytest

    class Reports:
        def pytest_collectreport(self, report):
            if not report.passed:  # a file has been imported in part; each fork finds out and says why
                file = str(ROOT / report.nodeid)
                for name in [n for n, module in sys.modules.items() if getattr(module, "__file__", None) == file]:
                    del sys.modules[name]

    options = ["--collect-only", "--quiet", "--numprocesses=0", "-p", "no:cacheprovider"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        pytest.main([*options, *tests], plugins=[Reports()])


def serve(address: str, tests: list[str]) -> str:
    """Fork for each request. Returns in a fork, with the program that it is to run."""
    import select
    import signal

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{address}")
        listener.listen()
        os.write(1, b"1")
        os.dup2(2, 1)  # nobody reads on: what a library says when it is imported goes to the messages
        import_all(tests)
        at_ctrl_c = signal.signal(signal.SIGINT, signal.SIG_IGN)  # this ends when the first process does
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
            request, _ = listener.accept()
            program, fds, *_ = socket.recv_fds(request, 1 << 16, 3)
            if not os.fork():
                for fd, mine in enumerate(fds):
                    os.dup2(mine, fd)
                    os.close(mine)
                signal.signal(signal.SIGINT, at_ctrl_c)
                request.detach()  # is closed when the process ends, which its end tells
                return program.decode()
            for fd in fds:
                os.close(fd)
            request.close()
    sys.exit()


def main(address: str, *rest: str) -> None:
    if not __package__:  # as xdist starts it
        in_fork(address, rest[-1])
        return
    program = serve(address, list(rest))
    from multiprocessing import resource_tracker

    from tests.support import commands

    commands.share_server()
    resource_tracker._resource_tracker.__init__()  # a fork has one of its own: it could not wait for this one's end
    sys.argv, sys.stdin = ["-c"], os.fdopen(0)
    exec(program, {"__name__": "__main__"})


if __name__ == "__main__":
    main(*sys.argv[1:])
