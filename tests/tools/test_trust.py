"""What the scripts of tests/trust make of what they find."""

import math

import pytest

from tests.trust import long, mutate, sanitize

REPORT = """========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 2 bytes
=========     at {kernel}
=========     by thread (32,0,0) in block (2,0,0)
=========         Host Frame: _run_kernel in cross_entropy.py:105
=========
========= Uninitialized __global__ memory read of size 16 bytes
=========     at void at::native::reduce_kernel<(int)128>(T3)+0xaeb0
=========         Host Frame: test_kernel in test_cross_entropy.py:70
=========
========= ERROR SUMMARY: {number} errors
"""
OURS, OTHERS = "_cross_entropy_kernel+0x220 in cross_entropy.py:74", "nvjet_sm90_tst_64x8+0xaf0"


@pytest.mark.parametrize(
    ("tool", "kernel", "number", "found"),
    [
        ("initcheck", OURS, 2, (2, 1)),
        ("initcheck", OTHERS, 2, (2, 0)),
        ("initcheck", OTHERS, 5, (5, 3)),  # three were not printed
        ("memcheck", OTHERS, 2, (2, 2)),
        ("racecheck", OTHERS, 2, (-1, -1)),  # has another summary: did not come to its end
    ],
)
def test_findings_of_the_sanitizer_are_ours_or_of_other_libraries(tool, kernel, number, found):
    assert sanitize.findings(tool, REPORT.format(kernel=kernel, number=number)) == found


def test_a_fault_without_a_verdict_does_not_count(tmp_path):
    rows = [
        {"id": number, "room": "moe", "file": "momoe_titan/moe/layers.py", "line": 1, "verdict": verdict}
        for number, verdict in enumerate(["killed", "late", "no verdict", "killed"])
    ]
    (tmp_path / "results.jsonl").write_text("".join(mutate.json.dumps(row) + "\n" for row in rows))
    (tmp_path / mutate.FAILING).write_text('["tests/test_a.py::test_b", "why"]\n' * 2)
    told = mutate.told(tmp_path)
    assert "| moe | 3 | 3 | 1 | 100% |" in told
    assert told.count("fails without a fault too: tests/test_a.py::test_b") == 1


def test_tests_that_fail_without_a_fault_are_found_at_once(tmp_path, monkeypatch):
    """With the reason, all of a file where one of them was seen; none of them if that one passes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_of_it.py").write_text(
        "def test_a():\n    assert 1 == 2\n\n\ndef test_b():\n    pass\n\n\ndef test_c():\n    assert 3 == 4\n"
    )
    found = dict(mutate.failing_without("test_of_it.py::test_c", 60))
    assert found.keys() == {"test_of_it.py::test_a", "test_of_it.py::test_c"}
    assert "1 == 2" in found["test_of_it.py::test_a"]
    assert mutate.failing_without("test_of_it.py::test_b", 60) == []


def test_long_jobs_are_compared_by_the_means_of_their_seeds():
    ends = {"stock": (2.0, 3.0), "ours-0": (2.1, 2.9), "ours-100": (2.0, 3.1)}
    rows = [
        {"arm": arm, "seed": seed, "validation": {400: 9.0, 800: loss}}
        for arm, losses in ends.items()
        for seed, loss in enumerate(losses)
    ]
    assert long.compared(rows, ["stock", "ours-0", "ours-100"], 800) == pytest.approx(
        {"stock": 0, "ours-0": 0, "ours-100": 0.02}
    )
    assert math.isnan(long.compared(rows, ["stock"], 1200)["stock"])  # not ended
