"""What GPU compilers make of the Triton kernels: no spills, matrix units, wide loads, few instructions a code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be compiled here")

from triton_aot import GATE, REQUIRED, SPILT, TARGETS, recorded, stale, variants

RECORDED = recorded()
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
    facts, budget = compiled[name][target], RECORDED[name][target]
    check(name, target, facts)
    assert facts["spills"] <= budget["spills"]
    assert facts["shared"] <= budget["shared"]
    if "per_code" in facts:
        assert facts["mma"] >= budget["mma"]
        assert facts["per_code"] <= budget["per_code"] * 1.03
    assert facts.get("copies") == budget.get("copies")


def check(name, target, facts):
    """What holds for every variant."""
    assert facts["spilt_in_loops"] == 0
    assert facts["spills"] <= SPILT.get(name, {}).get(target, 0)
    if "per_code" in facts:
        assert facts["mma"] > 0
        assert facts["per_code"] <= REQUIRED.get((name, target), 1e9)
    if name[0].isdigit() and target.startswith("sm"):
        # A lane's share of half a piece: 16 bytes of 4-bit codes, 8 of 2-bit ones, 4 of the odd bits of others.
        assert facts["copies"][0] >= (4 if "mask" in name else {"4x": 16, "2x": 8}.get(name[:2], 4))


def test_every_variant_is_recorded_for_every_target():
    """Compiling them all takes a quarter of an hour: what is recorded must be of these kernels."""
    assert not stale(), "kernels have changed: run python tests/triton_aot.py --stale --update"
    for name in variants():
        for target in TARGETS:
            check(name, target, RECORDED[name][target])
