import signal

import pytest
import torch

torch.set_num_threads(1)  # the tests run in parallel already
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A script's background job ignores Ctrl-C, and so would the processes that tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
