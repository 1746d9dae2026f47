"""Test processes of `pytest -n` as forks of one that has imported what they need: to import it takes longer than most
test files do, and without files of bytecode each process would also compile it.

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


def start() -> str:
    """Start the process with the imports; returns what the `python` of its forks is."""
    address = f"momoe-titan-tests-{os.getpid()}"
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    reads, writes = os.pipe()
    os.set_inheritable(reads, True)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.preloaded_workers", address],
        **{"cwd": ROOT, "env": env, "stdin": reads, "stdout": subprocess.PIPE},
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


def imports_of_tests() -> list[str]:
    """The modules of other packages that test files import before their first test."""
    import ast

    found = set()
    for file in (ROOT / "tests").rglob("*.py"):
        for line in ast.parse(file.read_text()).body:
            if isinstance(line, ast.ImportFrom):
                found.add(line.module)
            elif isinstance(line, ast.Import):
                found.update(name.name for name in line.names)
    return sorted(name for name in found if name.partition(".")[0] not in ("tests", "compiled", "pytest", "xdist"))


def import_all() -> None:
    import gc
    import importlib

    from tests.support import commands
    from tests.support.interpreter import without_repeated_work

    without_repeated_work()
    import tests.support.preloaded  # noqa: F401 - as on a machine without a GPU

    for name in imports_of_tests():
        with contextlib.suppress(ImportError):  # of another version, or of the folder of a script
            importlib.import_module(name)
    commands.start_server()
    gc.freeze()


def serve(address: str) -> str:
    """Fork for each request. Returns in a fork, with the program that it is to run."""
    import select
    import signal

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{address}")
        listener.listen()
        os.write(1, b"1")
        os.dup2(2, 1)  # nobody reads on: what a library says when it is imported goes to the messages
        import_all()
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


def main(address: str, *options: str) -> None:
    if options:
        in_fork(address, options[-1])
        return
    program = serve(address)
    from multiprocessing import resource_tracker

    from tests.support import commands

    commands.share_server()
    resource_tracker._resource_tracker.__init__()  # a fork has one of its own: it could not wait for this one's end
    sys.argv, sys.stdin = ["-c"], os.fdopen(0)
    exec(program, {"__name__": "__main__"})


if __name__ == "__main__":
    main(*sys.argv[1:])
