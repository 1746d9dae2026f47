import json
from pathlib import Path

from tests.support import commands

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "layer.py"


def run_layer(*options):
    return commands.run(SCRIPT, *options)


def test_a_table_and_charts_for_both_routings(tmp_path):
    out, charts = tmp_path / "bench.json", tmp_path / "charts"
    options = ["--device", "cpu", "--shapes", "tiny", "--routing", "balanced,skewed", "--save_percent", "0,100"]
    options += ["--implementations", "ours,torchtitan,sonicmoe", "--seconds_per_case", "0.1"]
    run = run_layer(*options, "--out", out, "--charts", charts)
    assert run.returncode == 0, run.stderr
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 8 and f"| {rows[0]['shape']} | balanced | {rows[0]['implementation']} |" in run.stdout
    for row in rows:
        if row["implementation"] == "SonicMoE":
            assert "not installed" in row["failed"]
            continue
        assert max(row["errors"].values()) < 0.02
        assert row["inf_ms"] > 0 and 0 < row["of_limit"] < 1.5
        # 30% of the tokens choose one of 8 experts, each of which would have 25%
        assert row["routing"] == "balanced" or row["max_load"] > 1.19
    assert {f.name for f in charts.iterdir()} == {"fwd_bwd.png", "fwd.png", "memory.png"}


def test_other_numbers_of_tokens(tmp_path):
    out = tmp_path / "bench.json"
    options = ["--device", "cpu", "--shapes", "tiny", "--tokens", "4,16", "--save_percent", "100"]
    run = run_layer(*options, "--implementations", "ours", "--seconds_per_case", "0.1", "--out", out)
    assert run.returncode == 0, run.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [(row["shape"], row["T"]) for row in rows] == [("tiny T=4", 4), ("tiny T=16", 16)]
    assert all(max(row["errors"].values()) < 0.02 for row in rows)


def test_what_cannot_be_is_refused():
    for options, message in (
        (["--routing", "odd"], "'odd' is none of balanced, skewed"),
        (["--from", "x"], "needs --charts"),
        (["--tokens", "4,0"], "'4,0' are not all positive"),
        (["--device", "cpu", "--cuda_graph"], "needs a GPU, --device is 'cpu'"),
    ):
        run = run_layer(*options)
        assert run.returncode == 2 and message in run.stderr
