import signal

import pytest
import torch

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a job in the background hands that down to whom it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)
