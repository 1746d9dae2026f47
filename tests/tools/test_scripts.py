"""How scripts/test.sh starts the tests."""

import os
import subprocess

from tests.support.commands import ROOT


def started_with(tmp_path, *options: str, **env: str) -> tuple[list[str], dict[str, str]]:
    """Arguments and environment that the script gives to Python, in a virtual environment that has nothing else."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir(exist_ok=True)
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@" >"$VENV/arguments"\nenv >"$VENV/env"\n')
    python.chmod(0o755)
    (tmp_path / ".installed-test").touch()
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [ROOT / "scripts" / "test.sh", *options]
    subprocess.run(command, env={**inherited, **env, "VENV": str(tmp_path)}, check=True, timeout=60)
    lines = (tmp_path / "env").read_text().splitlines()
    return (tmp_path / "arguments").read_text().splitlines(), dict(line.partition("=")[::2] for line in lines)


def test_bytecode_is_kept_with_the_environment_where_none_may_lie_beside_the_sources(tmp_path):
    """Or every process that a test starts would compile torch anew."""
    _, env = started_with(tmp_path, PYTHONDONTWRITEBYTECODE="1")
    assert "PYTHONDONTWRITEBYTECODE" not in env
    assert env["PYTHONPYCACHEPREFIX"] == f"{tmp_path.resolve()}/pycache"
    assert "PYTHONPYCACHEPREFIX" not in started_with(tmp_path)[1]
    chosen = started_with(tmp_path, PYTHONDONTWRITEBYTECODE="1", PYTHONPYCACHEPREFIX="/elsewhere")[1]
    assert chosen["PYTHONPYCACHEPREFIX"] == "/elsewhere"


def test_options_come_last(tmp_path):
    arguments, _ = started_with(tmp_path, "-n", "0", "tests/kernels")
    assert arguments[:2] == ["-m", "pytest"] and arguments[-3:] == ["-n", "0", "tests/kernels"]
