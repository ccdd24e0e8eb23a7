"""Without a GPU, kernels run through Triton's interpreter; it must be chosen before they are first
imported."""
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)  # tensors are small: threads that wait for each other cost more than they bring


@pytest.fixture(autouse=True)
def give_memory_back():
    """So that several test processes (pytest -n 8) fit on one GPU."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
