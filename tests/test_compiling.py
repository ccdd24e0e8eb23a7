"""Without a GPU: do the kernels compile for one? See tests/compiling.py."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the kernels run")
def test_kernels_compile(tmp_path):
    """Two variants of each, anew."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.compiling", "2"], cwd=Path(__file__).parent.parent,
        env=os.environ | dict(TRITON_CACHE_DIR=str(tmp_path)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
