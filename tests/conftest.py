"""What several test files start from: a user's folder, a finished run, a run with a control."""
import shutil

import pytest

from tests.scripts import call, train


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A user's folder with a text file, and a data cache apart from the real one."""
    folder = tmp_path_factory.mktemp("user")
    lines = [f"line {i}: the square of {i % 97} is {(i % 97) ** 2}\n" for i in range(2000)]
    (folder / "text.txt").write_text("".join(lines))
    return folder


@pytest.fixture(scope="session")
def run(place):
    """-> the folder of a run through all stages, and what it printed."""
    code, out, err = train(place, "out")
    assert code == 0, err
    return place / "out", out, err


@pytest.fixture(scope="session")
def control(place, run):
    """-> the folder of a copy of the run with a dense control added to it."""
    shutil.copytree(run[0], place / "with-control")
    # with the run's options
    code, _, err = call(place, "train.py", "--out_dir=with-control", "--stage=control")
    assert code == 0, err
    return place / "with-control"
