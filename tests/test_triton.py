"""The Triton kernels compute what the reference does: `triton_parity.py`, interpreted, and on a GPU if there is one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be interpreted here")


@pytest.mark.parametrize("group", ["test_gathered", "not test_gathered"])
@pytest.mark.parametrize("where", ["interpreted", "on a GPU"])
def test_parity(where, group):
    """Triton must be told to interpret before anything imports it."""
    if where == "on a GPU" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", here / "triton_parity.py", "-k", group]
    environment = os.environ | {"TRITON_INTERPRET": "1" if where == "interpreted" else "0"}
    result = subprocess.run(command, cwd=here.parent, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
