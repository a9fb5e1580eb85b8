"""The Triton kernels compute what the reference does: `triton_parity.py`, in a process where Triton interprets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be interpreted here")


@pytest.mark.parametrize("group", ["test_gathered", "not test_gathered"])
def test_parity(group):
    """Triton must be told to interpret before anything imports it."""
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", here / "triton_parity.py", "-k", group]
    result = subprocess.run(
        command, cwd=here.parent, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
