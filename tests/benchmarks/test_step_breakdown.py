"""The breakdown of a profiler's trace by part of the step."""

import json

import pytest

from benchmarks.step_breakdown import Trace, breakdown, busy_pct, busy_pct_of, exposed_ms, gaps_between, part_of


def event(cat, name, ts, dur, tid=1, **args):
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}


def test_counts_parts_gaps_and_host(tmp_path):
    events = [
        event("user_annotation", "ProfilerStep#1", 0, 90),
        event("cpu_op", "aten::mm", 0, 10, **{"Input Dims": [[4, 8], [8, 100]]}),
        event("cuda_runtime", "cudaLaunchKernel", 2, 3, correlation=7),
        event("kernel", "nvjet", 20, 30, 9, correlation=7),
        event("cpu_op", "momoe_titan::moe_forward", 60, 20),
        event("cuda_runtime", "cudaLaunchKernel", 61, 1, correlation=8),
        event("kernel", "up_proj_kernel", 70, 20, 9, correlation=8),
        event("kernel", "from a graph", 80, 20, 9),  # at the same time as the one before
        {"ph": "M", "name": "thread_name"},
    ]
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": events}))
    result = breakdown(Trace(tmp_path / "trace.json"), 2, 100, 8)
    assert result["parts_ms"] == pytest.approx({"loss": 0.015, "experts": 0.01, "elementwise": 0.01})
    assert (result["busy_ms"], result["whole_ms"]) == pytest.approx((0.03, 0.04))
    assert result["gaps_ms_by_length"] == pytest.approx({"from 20 us": 0.01})
    (ended_by,) = result["gaps_ms_before"]
    assert ended_by == "momoe_titan::moe_forward > cudaLaunchKernel > up_proj_kernel"
    assert result["host_ms"]["aten::mm"] == pytest.approx(0.0035)


@pytest.mark.parametrize(
    "names, shapes, part",
    [
        (["aten::mm", "nvjet"], "[[64, 16], [16, 32]]", "router"),
        (["aten::mm", "nvjet"], "[[64, 16], [16, 80]]", "dense"),
        (["Optimizer.step#AdamW.step", "aten::mul", "vectorized"], "", "optimizer"),
        (["triton_per_fused__fused_rms_norm_0"], "", "norm"),
        (["rows_kernel"], "", "experts"),
        (["_cross_entropy_kernel"], "", "loss"),
        (["_add_entropy_kernel"], "", "router"),
        (["triton_poi_fused_accumulate_entropy_clamp_sigmoid_4"], "", "router"),
        (["Memcpy HtoD"], "", "copies"),
        (["FSDP::all_gather", "fsdp::all_gather_copy_in", "Memcpy DtoD"], "", "FSDP copies"),
        (["FSDP::all_gather", "ncclDevKernel_AllGather_RING_LL(x)"], "", "collectives"),
    ],
)
def test_knows_the_part_of_a_kernel(names, shapes, part):
    assert part_of(names, shapes, 100, 8) == part


def test_busy_leaves_out_the_first_launch(tmp_path):
    """Of three steps, 10 us of idle time in the last two; the first begins after 500."""
    model = [event("kernel", "gemm", ts, dur) for ts, dur in ((0, 1), (500, 20), (530, 20), (560, 25))]
    optimizer = [event("kernel", "_adamw_kernel", ts, 5) for ts in (520, 550, 585)]
    kernels = sorted([*model, *optimizer], key=lambda e: e["ts"])
    assert busy_pct(kernels, optimizer, 3) == pytest.approx(100 * 55 / 65)
    assert busy_pct(kernels, optimizer[:2], 3) is None and busy_pct(kernels, optimizer, 1) is None
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": kernels[::-1]}))
    assert busy_pct_of(tmp_path / "trace.json", 3) == busy_pct(kernels, optimizer, 3)


def test_gaps_lie_between_what_is_covered():
    assert gaps_between([(0, 2), (1, 5), (2, 3), (7, 8)]) == (6, [(5, 7)])


def test_a_collective_is_exposed_where_no_other_kernel_runs():
    kernels = [
        event("kernel", "up", 0, 10),
        event("kernel", "ncclDevKernel_AllGather_RING_LL(args)", 5, 10),  # 5 beside the first, 3 beside the next
        event("kernel", "down", 12, 20),
        event("kernel", "beside", 12, 4),
        event("kernel", "ncclDevKernel_ReduceScatter_Sum_f32(args)", 20, 5),
        event("kernel", "ncclDevKernel_AllReduce(args)", 40, 7),
    ]
    total, rows = exposed_ms(kernels)
    assert total == pytest.approx(0.009)
    assert [row["exposed_ms"] for row in rows] == pytest.approx([0.002, 0, 0.007])
    assert [row["name"] for row in rows] == ["AllGather_RING_LL", "ReduceScatter_Sum_f32", "AllReduce"]
    assert rows[1]["at_ms"] == pytest.approx(0.02)
