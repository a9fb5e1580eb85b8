"""What GPU compilers make of the Triton kernels: no spills, matrix units, wide loads, few instructions a code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be compiled here")

from triton_aot import BUDGETS, GATE, REQUIRED, SPILT

pairs = [(name, target) for name, targets in GATE.items() for target in targets]


@pytest.fixture(scope="module")
def compiled():
    """Facts of every variant: in a process of its own, where nothing is interpreted."""
    script = Path(__file__).with_name("triton_aot.py")
    result = subprocess.run([sys.executable, script, "--json"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-5000:]
    return json.loads(result.stdout)


@pytest.mark.parametrize(("name", "target"), pairs, ids=[f"{name}, {target}" for name, target in pairs])
def test_compiled_code_keeps_its_budget(compiled, name, target):
    facts, recorded = compiled[name][target], json.loads(BUDGETS.read_text())[name][target]
    assert facts["spills"] <= SPILT.get(name, 0)
    assert facts["shared"] <= recorded["shared"]
    if "per_code" in facts:
        assert facts["mma"] >= recorded["mma"] > 0
        assert facts["per_code"] <= min(recorded["per_code"] * 1.03, REQUIRED.get((name, target), 1e9))
    if name[0].isdigit() and target.startswith("sm"):
        # A lane's share of half a piece: 16 bytes of 4-bit codes, 8 of 2-bit ones, 4 of the odd bits of others.
        widest = 4 if "mask" in name else {"4": 16, "2": 8}.get(name[0], 4)
        assert facts["copies"][0] >= widest
        assert facts["copies"] == recorded["copies"]


def test_required_speeds_are_recorded():
    budgets = json.loads(BUDGETS.read_text())
    for (name, target), most in REQUIRED.items():
        assert budgets[name][target]["per_code"] <= most
