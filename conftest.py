"""Without a GPU, kernels run through Triton's interpreter; it must be chosen before they are first
imported."""
import os

import pytest
import torch

from tests.common import poison

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)  # tensors are small: threads that wait for each other cost more than they bring


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """pytest -n auto: a process per core, on a GPU no more than share its memory."""
    return min(os.cpu_count(), 8) if torch.cuda.is_available() else os.cpu_count()


@pytest.fixture(autouse=True)
def fresh():
    """The same random numbers whatever ran before, and memory that holds NaN; given back afterwards, so that
    several test processes fit on one GPU."""
    torch.manual_seed(0)
    poison()
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
