import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty and its kin hold NaN and the largest integers, so that an element nobody wrote is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    from momoe_titan.kernels.gpu import interpreting  # not before tests.support.every_test

    if request.param == "cpu" and not interpreting():
        pytest.skip("Triton runs on the GPU here, not in its interpreter")
    return request.param
