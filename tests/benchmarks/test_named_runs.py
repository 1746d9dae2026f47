import sys

import pytest

from benchmarks import in_turns, train


@pytest.mark.parametrize("script, option", [(in_turns, "--out"), (train, "--config")])
@pytest.mark.parametrize("runs", [["no colon"], ["twice: ", "twice: --x 1"]])
def test_unclear_runs_are_refused(script, option, runs, monkeypatch, capsys):
    flags = [flag for run in runs for flag in ("--run", run)]
    monkeypatch.setattr(sys, "argv", ["script.py", option, "x", *flags])
    with pytest.raises(SystemExit):
        script.main()
    assert f"--run {runs[-1]!r} must be 'NAME: OPTIONS'" in capsys.readouterr().err
