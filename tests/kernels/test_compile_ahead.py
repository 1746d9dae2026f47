import json

import pytest

from tests.support import commands

SHARED_LIMIT = {"sm80": 99 * 1024, "sm90": 227 * 1024, "sm100": 99 * 1024}  # sm80's tiles also serve smaller GPUs


@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_every_kernel_compiles_without_spills(arch):
    """Triton's own cache has those that are as they were."""
    run = commands.run("tests/support/compile_ahead.py", arch)
    assert run.returncode == 0, run.stderr[-3000:]
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    names = {row["kernel"] for row in rows}
    assert {"_up_proj_kernel", "_rows_gemm_kernel", "_down_proj_backward_kernel", "_weight_grad_kernel"} <= names
    assert {"_combine_kernel", "_score_grad_kernel", "_histogram_kernel", "_scan_kernel", "_place_kernel"} <= names
    assert {"_up_kernel", "_down_kernel", "_sum_kernel"} <= names
    assert ({"_fused_kernel", "_sum_parts_kernel"} <= names) == (arch == "sm90")
    assert {"_route_kernel", "_route_backward_kernel", "_parts_kernel", "_count_margins_kernel"} <= names
    assert {"_add_tokens_kernel", "_collect_kernel", "_quantiles_kernel", "_move_kernel"} <= names
    assert {"_mean_logits_kernel", "_follow_kernel"} <= names
    assert {"_adamw_kernel", "_count_steps_kernel", "_square_sums_kernel"} <= names
    # losses with gradients in two dtypes and sizes, and in one each of them alone
    assert len([row for row in rows if row["kernel"] == "_cross_entropy_kernel"]) == 5
    assert [row for row in rows if row["spills"] > 0] == []
    assert [row for row in rows if row["shared"] > SHARED_LIMIT[arch]] == []
