"""The compiled kernel where processors, memory and pools of threads are others, and the sources it is compiled from."""

import dataclasses
import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import emulated
import pytest
import torch
from kernel_cases import CASES, build
from test_encode import on_another
from test_kernels import assert_close

from hf_seqkv.kernels import cpu, reference
from hf_seqkv.kernels.cpu import threads
from hf_seqkv.kernels.cpu.jit import features

SOME = (
    *("plain", "page of 64", "4 bits, page of 64", "3 bits, page of 64", "mixed widths, page of 64"),
    *("widths 6 and 7, page of 64", "G 3", "center of 64"),
    *("center without rope", "8-bit scales", "everything"),
)


PATHS = {"generic": "fp32 vectors"}
if "avx512bw" in features():
    PATHS["haswell"] = "int16 dot products (AVX2)"


@pytest.mark.parametrize("name", PATHS)
def test_other_processors(name):
    assert on_another(name, __file__) == f"{PATHS[name]}, {len(SOME)} cases"


@pytest.mark.skipif("avx2" not in features(), reason="its instructions stand in for AVX-512's")
@pytest.mark.skipif("avx512bw" in features(), reason="has AVX-512 itself")
def test_avx512(tmp_path):
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, emulated.__file__], capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == f"int16 dot products (AVX-512, VNNI), {len(SOME)} cases"


def check_some():
    for name in SOME:
        arguments = build(CASES[name])
        assert_close(cpu.attend_codes(*arguments), reference.attend_codes(*arguments), "cpu")
    print(f"{cpu.path()}, {len(SOME)} cases")


@pytest.mark.skipif(sys.platform != "linux", reason="glibc fills freed memory on request, others do not")
def test_freed_memory_is_not_read():
    """Arrays are passed by address, where numba may free one too early: with freed memory overwritten it shows."""
    env = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.perturb=85"}
    result = subprocess.run([sys.executable, __file__, "perturbed"], capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["perturbed", str(len(CASES))]


def check_perturbed():
    for case in CASES.values():
        query, view, mask, scoring = build(case)
        runs = {
            name: dataclasses.replace(run, k=run.k.bfloat16(), v=run.v.bfloat16())
            for name, run in (("sinks", view.sinks), ("recent", view.recent))
        }
        for seen in (view, dataclasses.replace(view, **runs)):
            arguments = query, seen, mask, scoring
            assert_close(cpu.attend_codes(*arguments), reference.attend_codes(*arguments), "cpu")
    print("perturbed", len(CASES))


def test_numbas_pool_gives_the_same(monkeypatch):
    """Where torch has no pool that kernels can run on."""
    arguments = build(CASES["many splits"])
    expected = cpu.attend_codes(*arguments)
    monkeypatch.setattr(threads, "torch_pool", lambda: None)
    assert torch.equal(cpu.attend_codes(*arguments), expected)


def sources(entry, seen=None):
    """Kernel files that a file's compiled functions come from: what it imports, and what that imports."""
    seen = set() if seen is None else seen
    for name in re.findall(r"^ *from (?:\.(\w+) import|\. import (\w+)(?: as \w+)?$)", entry.read_text(), re.MULTILINE):
        path = entry.with_name(f"{name[0] or name[1]}.py")
        if path not in seen and path.name != "threads.py":
            seen.add(path)
            sources(path, seen)
    return seen


@pytest.mark.parametrize("name", ["attend_worker.py", "encode_worker.py"])
def test_compiled_code_is_of_these_sources(name):
    """numba's cache looks at the entry file alone: `CALLS` changes it with what it calls, or old code would run."""
    entry = Path(threads.__file__).with_name(name)
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(sources(entry)))).hexdigest()[:16]
    assert f'CALLS = "{digest}"' in entry.read_text()


if __name__ == "__main__":
    torch.manual_seed(0)
    check_perturbed() if "perturbed" in sys.argv else check_some()
