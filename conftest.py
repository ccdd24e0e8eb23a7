"""Without a GPU, kernels run through Triton's interpreter; it must be chosen before they are first
imported."""
import contextlib
import dataclasses
import functools
import os

import pytest
import torch

from tests.common import poison


def spare_the_interpreter():
    """Two thirds of the time that Triton's interpreter takes are for nothing. It patches its language when a
    kernel starts, and again at every call of a function in the kernel; and it computes whether integers
    overflow, to look at the answer only in debug mode."""
    import triton.language as tl
    from triton.runtime import interpreter
    patch = interpreter._patch_lang

    @functools.cache
    def languages(function):
        return [value for value in function.__globals__.values() if value is tl or value is tl.core]

    def patch_what_is_not(function):
        if any(tl.core.is_builtin(language.load) for language in languages(function)):
            return patch(function)

    interpreter._patch_lang = patch_what_is_not
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)  # tensors are small: threads that wait for each other cost more than they bring
    with contextlib.suppress(ImportError, AttributeError):  # not installed, or of another make: slower
        spare_the_interpreter()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """pytest -n auto: a process per core, on a GPU no more than share its memory."""
    return min(os.cpu_count(), 8) if torch.cuda.is_available() else os.cpu_count()


# files whose tests share a run, or a model that has learned, of 15 to 60 seconds
IN_ONE_PROCESS = ("tests/test_errors.py", "tests/test_parallel.py", "tests/test_post_train.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """What tests share is made once, not once a process: those of such a file go to one, the first, as they
    take long; of the other files any test goes to any process. Beside a GPU are processes enough."""
    if torch.cuda.is_available():
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.split("::")[0]
            return file if file in IN_ONE_PROCESS else nodeid

    return Scheduler(config, log)


@pytest.fixture(autouse=True)
def fresh():
    """The same random numbers whatever ran before, and memory that holds NaN; given back afterwards, so that
    several test processes fit on one GPU."""
    torch.manual_seed(0)
    poison()
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
