"""Jobs measured in turn, and the line through models of a few layers: what is asked when, and the arithmetic."""

import json
import sys
from types import SimpleNamespace

import pytest

from benchmarks import in_turns, layers_fit
from benchmarks.in_turns import Job, Plan, take_turns


class Link:
    """The end of a pipe to a job that sends these messages and then ends."""

    def __init__(self, name, messages, order):
        self.name, self.messages, self.order = name, list(messages), order

    def recv(self):
        if not self.messages:
            raise EOFError
        return self.messages.pop(0)

    def send(self, message):
        self.order.append(self.name)


def turn(ms, layers=2):
    return {
        "step_ms": ms, "backward_ms": 0.8 * ms, "optimizer_ms": 0.1 * ms, "tokens": 1000, "flops_per_token": 1e9,
        "peak_flops": 1e15, "layers": layers, "allocated_gib": 1.0, "reserved_gib": 2.0,
    }  # fmt: skip


def job(name, messages, order, group=""):
    made = object.__new__(Job)
    made.name, made.rounds, made.error, made.plan = name, [], None, Plan(1, 1, 2, group=group)
    made.link = Link(name, ["imported", *messages], order)
    made.process = SimpleNamespace(exitcode=-9, join=lambda timeout: None)
    return made


@pytest.mark.parametrize("groups, order", [("xx", "ab" * 4), ("xy", "aaaabbbb")])
def test_each_job_trains_alone_in_its_turn(groups, order, capsys):
    seen = []
    jobs = [
        job(name, [turn(0.0), turn(ms), turn(3 * ms), {"error": None}], seen, group)
        for name, ms, group in (("a", 10, groups[0]), ("b", 20, groups[1]))
    ]
    take_turns(jobs)
    assert "".join(seen) == order
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows == [j.row() for j in jobs]
    assert [row["step_ms"] for row in rows] == [[10, 30], [20, 60]]
    assert rows[0] | {"tokens_per_s": 50000, "mfu": 5.0, "backward_ms": 16.0, "optimizer_ms": 2.0} == rows[0]


def test_a_run_has_options_of_its_own(monkeypatch, tmp_path):
    """Beside those of the job. Its process may have others, which compile kernels."""
    started = []

    class Process:
        def __init__(self, target, args, daemon=False):
            started.append((args[1], args[3], daemon))

        def start(self):
            pass

    context = SimpleNamespace(Process=Process, Pipe=lambda: (None, SimpleNamespace(close=lambda: None)))
    monkeypatch.setattr(in_turns.multiprocessing, "get_context", lambda kind: context)
    own = ["--layers", "2", "--rounds", "5", "--group", "g", "--profiled", "6", "--memory_gib", "79.5"]
    Job("a", ["--x", "1", *own], tmp_path / "log", Plan(3, 4, 1))
    ((options, plan, daemon),) = started
    assert options == ["--x", "1", "--training.steps", "29"] and not daemon
    assert plan == Plan(3, 4, 5, 79.5, "g", 2, 6)


def test_steps_under_a_profiler_come_after_the_turns():
    seen = []
    profiled = job("a", [turn(0.0), turn(10), turn(10), {"error": None, "busy_pct": 97.531}], seen)
    profiled.plan = Plan(1, 1, 2, profiled=6)
    other = job("b", [turn(0.0), turn(10), turn(10), {"error": None, "busy_pct": None}], seen)
    take_turns([other, profiled])
    assert "".join(seen) == "bababaab"  # alone at the end, too
    assert "busy_pct" not in other.row() and profiled.row()["busy_pct"] == 97.53


def test_a_job_that_fails_is_a_row_that_says_so():
    seen = []
    jobs = [
        job("never built", [{"error": "out of memory: 3 GiB"}], seen),
        job("killed", [turn(0.0), turn(10.0)], seen),
        job("good", [turn(0.0), turn(10.0), turn(10.0), {"error": None}], seen),
    ]
    take_turns(jobs)
    rows = [j.row() for j in jobs]
    assert rows[0] == {"run": "never built", "error": "out of memory: 3 GiB"}
    assert rows[1]["error"] == "the process ended with -9" and rows[1]["step_ms"] == [10]
    assert "error" not in rows[2] and rows[2]["tokens_per_s"] == 100000


def test_a_large_model_is_the_sum_of_its_layers(tmp_path, monkeypatch):
    """Of 10 layers at 3 ms each over 4 ms, with an optimizer of 40 ms shared by two ranks over five microbatches."""

    def measured(runs, args):
        asked.extend(options[-2:] for options in runs.values())
        return [
            turn(0.0, n) | {"backward_ms": 4 + 3 * n, "optimizer_ms": 4 * n, "flops_per_token": 1e9 * (2 + n)}
            for n in (2, 4, 6)
        ]

    asked = []
    monkeypatch.setattr(layers_fit, "measured", measured)
    out = tmp_path / "fit.json"
    command = ["layers_fit.py", "--out", str(out), "--of", "10", "--ranks", "2", "--microbatches", "5"]
    monkeypatch.setattr(sys, "argv", [*command, "--peak_tflops", "1000", "--", "--x", "1"])
    layers_fit.main()
    fit = json.loads(out.read_text())["fit"]
    assert asked == [["--layers", "2"], ["--layers", "4"], ["--layers", "6"]]
    assert (fit["per_layer_ms"], fit["at_0_layers_ms"], fit["largest_distance_ms"]) == (3, 4, 0)
    assert fit["ms"] == 4 + 30 + 40 / 10
    assert fit["tokens_per_s"] == round(1000 / 0.038)
    assert fit["mfu"] == round(100 * 12e9 * 1000 / 0.038 / 1e15, 1)
    assert fit["mfu_of_a_layer"] == round(100 * 1e9 * 1000 / 0.003 / 1e15, 1)
