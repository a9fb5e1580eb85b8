"""The Triton kernels compute what the reference does, interpreted, and on a GPU if there is one.

`triton_parity.py` and `triton_live.py` have the tests.
"""

import contextlib
import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from kernel_cases import Case, build

triton = pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be interpreted here")


@pytest.mark.parametrize(
    ("file", "group"), [("parity", "test_gathered"), ("parity", "not test_gathered"), ("live", "test")]
)
@pytest.mark.parametrize("where", ["interpreted", "on a GPU"])
def test_parity(where, file, group):
    """Triton must be told to interpret before anything imports it."""
    if where == "on a GPU" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", here / f"triton_{file}.py", "-k", group]
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


class Form:
    """What Triton would have compiled; `started` holds grids and arguments of its launches."""

    function = packed_metadata = name = None

    def __init__(self, started):
        self.started = started

    def launch_metadata(self, *arguments):
        return None

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments):
        self.started.append(((x, y, z), arguments))

    def __getitem__(self, grid):
        return lambda *arguments: self.run(*grid, 0, *[None] * 5, *arguments)


def seen(x):
    """An argument as a compiled form takes it, wherever a tensor lies."""
    return (x.dtype, x.shape, x.stride()) if isinstance(x, torch.Tensor) else x


def test_what_was_compiled_is_started_as_the_launcher_does():
    """The first call goes through the launcher, the second does not; what the launcher would compile anew, it does."""
    from hf_seqkv.kernels import triton_attend

    query, view, mask, scoring = build(
        Case(page_size=64, counts=(2,), pads=(0,), half=10, mask="additive", side=3, sink_logits=True)
    )
    started, compilations = [], []

    def attend(query=query, view=view, mask=mask):
        with mock.patch.object(triton_attend, "use_tables", return_value=True):
            triton_attend.attend_codes(query, view, mask, scoring)
        what = [(grid, [seen(x) for x in arguments]) for grid, arguments in started]
        count = len(compilations)
        started.clear()
        compilations.clear()
        return what, count

    def compile_nothing(self, key, *rest):
        compilations.append(self.fn.__name__)
        return Form(started)

    with compiled(), mock.patch.object(triton.JITFunction, "_do_compile", compile_nothing):
        first, count = attend()
        assert count == len(first) == 3
        assert attend() == (first, 0)
        longer = dataclasses.replace(view, length=view.length + 1)
        assert attend(view=longer)[1] == 0
        odd = torch.zeros(query.numel() + 1)[1:].view_as(query)  # not at a multiple of 16 bytes
        assert attend(query=odd)[1] == 3
        assert attend(query=query.half())[1] == 3
        wide = torch.zeros(*query.shape[:-1], query.shape[-1] + 1)[..., :-1]
        assert attend(query=wide)[1] == 3
        assert attend(mask=mask.half())[1] == 3
        assert attend(mask=mask[..., :1].expand_as(mask))[1] == 0  # laid out anew
        assert attend(mask=None)[1] == 3
        assert attend(view=dataclasses.replace(view, side=None))[1] == 3
        assert attend() == (first, 0)


def test_lengths_batches_and_masks_compile_nothing_new():
    """Of numbers that are 1 or multiples of 16 Triton makes kernels of their own: those that vary must not count."""
    from hf_seqkv.codec.center import Center
    from hf_seqkv.kernels import triton_attend, triton_launch, triton_pages

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
        triton_launch.written(((2, 3),), torch.device("cpu"))
        assert {name for name, _ in found} == {"prepare", "partials", "combine", "encode_kernel", "_write"}
        before = set(found)
        for recent in (1, 2, 15, 16, 33):
            attend(recent=recent)
        for counts in ((1,), (16,), (40,), (2, 0, 1), (16,) * 16):
            attend(counts=counts, pads=(0,) * len(counts))
        attend(sinks=16, side=17, offset=1)
        for pages in (1, 16, 5):
            encode(pages)
        encode(2, rows=16)
        triton_launch.written(((1, 16, 0, 32),) * 16, torch.device("cpu"))
        assert found == before
