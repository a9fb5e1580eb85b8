"""`seqkv inspect --env`: what it reports here, and where numba or a GPU is not as here."""

import io
import json
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import hf_seqkv
from hf_seqkv import kernels
from hf_seqkv.cli import main
from hf_seqkv.eval import environment


@pytest.fixture(scope="module")
def printed():
    """Table and JSON from processes of their own, as a user gets them."""
    command = [sys.executable, "-m", "hf_seqkv", "inspect", "--env"]
    shown = [subprocess.run([*command, *more], capture_output=True, text=True, check=True) for more in ([], ["--json"])]
    return [done.stdout for done in shown]


def test_table(printed):
    rows = {line[:26].strip(): line[26:] for line in printed[0].splitlines()}
    assert rows["hf_seqkv"] == hf_seqkv.__version__
    assert rows["python"] == platform.python_version()
    assert rows["torch"] == torch.__version__
    for name in ("features", "threads", "CPU kernel", "HF_SEQKV_BACKEND", "downloads in", "compiled kernel in"):
        assert rows[name]
    assert rows["backend 'auto' on cpu"] in ("cpu", "reference")


def test_json_is_one_line(printed):
    assert len(printed[1].splitlines()) == 1
    found = json.loads(printed[1])
    assert set(found["machine"]["features"]) == {"avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx2", "neon"}
    assert set(found["auto_backend"]) == {"cpu", "cuda"}
    assert found["kernel"]["path"]
    assert found["threads"]["torch"] >= 1


@pytest.fixture
def kernel(monkeypatch):
    """A stand-in for the compiled kernel, or None for one that cannot be imported."""

    def stand_in(module):
        monkeypatch.setitem(sys.modules, "hf_seqkv.kernels.cpu", module)
        monkeypatch.delattr(kernels, "cpu", raising=False)
        if module is not None:
            monkeypatch.setattr(kernels, "cpu", module, raising=False)

    return stand_in


def test_kernel(kernel, monkeypatch, tmp_path):
    kernel(SimpleNamespace(path=lambda: "generic fp32", thread_count=lambda: 1, __file__=str(tmp_path / "cpu.py")))
    numba = SimpleNamespace(config=SimpleNamespace(CACHE_DIR=""))
    monkeypatch.setitem(sys.modules, "numba", numba)
    found = environment._kernel()
    assert found == {"path": "generic fp32", "threads": 1, "directory": str(tmp_path / "__pycache__")}
    numba.config.CACHE_DIR = "/elsewhere"
    assert environment._kernel()["directory"] == "/elsewhere"


def test_no_numba(kernel):
    kernel(None)
    found = environment._kernel()
    assert found["path"].startswith("none: ")
    assert found["threads"] is None
    assert found["directory"] is None


def test_not_installed(monkeypatch):
    monkeypatch.setattr(environment, "PACKAGES", ("torch", "no-such-package"))
    assert environment.versions()["no-such-package"] == "not installed"
    assert environment.versions()["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("text", "machine", "name", "has"),
    [
        ("model name\t: Zen\nflags\t\t: fpu avx2 avx512f avx512bw avx512_vnni\n", "x86_64", "Zen", "avx512_vnni"),
        ("model name\t: Old\nflags\t\t: fpu avx2\n", "x86_64", "Old", "avx2"),
        ("processor\t: 0\nFeatures\t: fp asimd\n", "aarch64", None, "neon"),
        (None, "arm64", None, "neon"),
        (None, "x86_64", None, None),
    ],
    ids=["avx512", "avx2", "arm", "mac", "unknown"],
)
def test_processors(monkeypatch, text, machine, name, has):
    def opened(path):
        if text is None:
            raise OSError(path)
        return io.StringIO(text)

    monkeypatch.setattr(environment, "open", opened, raising=False)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(platform, "processor", lambda: "")
    assert environment.cpu_name() == (name or machine)
    features = environment.cpu_features()
    assert features["neon"] is (has == "neon" if has else None)
    if has:
        assert features[has] is True
        assert features["avx512f"] is (has == "avx512_vnni")
    else:
        assert set(features.values()) == {None}


@pytest.mark.parametrize(("hip", "runtime"), [(None, "CUDA 13.0"), ("7.1", "ROCm 7.1")])
def test_devices(monkeypatch, hip, runtime):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    card = SimpleNamespace(name="A card", total_memory=24 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found = environment._devices()
    assert found == [{"name": "A card", "memory_bytes": 24 * 10**9, "runtime": runtime}]


def test_backend_chosen(monkeypatch):
    monkeypatch.setenv("HF_SEQKV_BACKEND", "reference")
    assert environment._auto_backend("cpu") == "reference"
    monkeypatch.setenv("HF_SEQKV_BACKEND", "magic")
    assert environment._auto_backend("cuda").startswith("none: backend 'magic' is not one of")


def test_nothing_asked(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["inspect"])
    assert stopped.value.code == 2
    assert "--env" in capsys.readouterr().err
