import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Threads only get in each other's way on tensors this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
