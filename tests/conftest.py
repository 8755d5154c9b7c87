import pytest
import torch

torch.set_num_threads(1)  # the tests run in parallel already


@pytest.fixture
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
