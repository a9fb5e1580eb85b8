"""The Triton kernels compute what the reference does: `triton_parity.py`, interpreted, and on a GPU if there is one."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from kernel_cases import Case, build

triton = pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be interpreted here")


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


class Absent:
    """A GPU for which Triton says what it would compile; there is none."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)


@contextlib.contextmanager
def compiled():
    """Collects what would be compiled: names of kernels and keys."""
    found, before = set(), triton.runtime.driver._active
    triton.runtime.driver.set_active(Absent())
    try:
        with mock.patch.object(
            triton.JITFunction, "_do_compile", lambda self, key, *rest: found.add((self.fn.__name__, key))
        ):
            yield found
    finally:
        triton.runtime.driver._active = before


def test_numbers_for_a_graph_are_those_copied():
    from hf_seqkv.kernels import triton_attend

    rows = ((3, 1), (4, 25), (0, 21))
    assert triton_attend._filled(rows, torch.device("cpu")).tolist() == [list(row) for row in rows]


def test_lengths_batches_and_masks_compile_nothing_new():
    """Of numbers that are 1 or multiples of 16 Triton makes kernels of their own: those that vary must not count."""
    from hf_seqkv.codec.center import Center
    from hf_seqkv.kernels import triton_attend, triton_pages

    def attend(**changes):
        options = {"page_size": 64, "half": 10, "mask": "additive", "side": 3, "counts": (2,), "pads": (0,)}
        with mock.patch.object(triton_attend, "use_tables", return_value=True):
            triton_attend.attend_codes(*build(Case(**options | changes)))

    def encode(pages, rows=1):
        codec = build(Case(page_size=64))[1].codec
        k, v = torch.randn(2, rows, pages, 2, 64, 64)
        turns = torch.ones(rows, pages, 20), torch.ones(64, 20)
        triton_pages.encode_pages(codec, k, v, Center(torch.ones(rows, 2, 64), *turns, False))

    with compiled() as found:
        attend()
        encode(3)
        assert {name for name, _ in found} == {"prepare", "partials", "combine", "encode_kernel"}
        before = set(found)
        for recent in (1, 2, 15, 16, 33):
            attend(recent=recent)
        for counts in ((1,), (16,), (40,), (2, 0, 1), (16,) * 16):
            attend(counts=counts, pads=(0,) * len(counts))
        attend(sinks=16, side=17, offset=1)
        for pages in (1, 16, 5):
            encode(pages)
        encode(2, rows=16)
        assert found == before
