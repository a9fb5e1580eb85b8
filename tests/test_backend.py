"""Which kernel a cache gets, and what is said where it is not the fast one."""

import sys
import warnings

import pytest
import torch

from hf_seqkv.codec.page import DensePageCodec, QuantizedPageCodec
from hf_seqkv.codec.vector import VectorCodec
from hf_seqkv.errors import BackendError, SeqKVWarning
from hf_seqkv.kernels import cpu, interface, reference
from hf_seqkv.kernels.interface import select_backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def quantised():
    side = VectorCodec.data_free(1, 8, 8, bits=4, rotation="hadamard", codebook="lloyd_max", scale="fit", seed=0)
    return QuantizedPageCodec(side, side)


def dense():
    return DensePageCodec(8, 1, 8, 8, torch.float32)


@pytest.fixture(autouse=True)
def _unset(monkeypatch):
    monkeypatch.delenv("HF_SEQKV_BACKEND", raising=False)
    interface._warn_once.cache_clear()


@pytest.fixture
def no_numba(monkeypatch):
    real = interface._backend
    missing = "numba cannot be imported (No module named 'numba'): pip install numba"
    monkeypatch.setattr(interface, "_backend", lambda name: missing if name == "cpu" else real(name))


@pytest.mark.parametrize(
    ("name", "codec", "device", "chosen"),
    [
        ("auto", quantised, CPU, cpu),
        ("auto", dense, CPU, reference),
        ("auto", dense, CUDA, reference),
        ("cpu", quantised, CPU, cpu),
        ("cpu", dense, CPU, reference),
        ("reference", quantised, CPU, reference),
        ("reference", quantised, CUDA, reference),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)).rpartition(".")[2],
)
def test_choice(name, codec, device, chosen):
    assert select_backend(name, codec(), device).attend_codes is chosen.attend_codes


@pytest.mark.parametrize(("value", "chosen"), [("reference", reference), ("cpu", cpu), ("auto", cpu)])
def test_environment_overrides_auto(monkeypatch, value, chosen):
    monkeypatch.setenv("HF_SEQKV_BACKEND", value)
    assert select_backend("auto", quantised(), CPU).attend_codes is chosen.attend_codes


def test_environment_does_not_override_a_choice(monkeypatch):
    monkeypatch.setenv("HF_SEQKV_BACKEND", "reference")
    assert select_backend("cpu", quantised(), CPU).attend_codes is cpu.attend_codes


def test_unknown_name_is_refused():
    with pytest.raises(BackendError, match=r"'gpu'.*'auto', 'reference', 'cpu'"):
        select_backend("gpu", quantised(), CPU)


@pytest.mark.parametrize("codec", [quantised, dense])
def test_unknown_name_in_the_environment_is_refused(monkeypatch, codec):
    monkeypatch.setenv("HF_SEQKV_BACKEND", "fast")
    with pytest.raises(BackendError, match=r"'fast'.*HF_SEQKV_BACKEND"):
        select_backend("auto", codec(), CPU)


def test_cpu_kernel_on_another_device_is_refused():
    with pytest.raises(BackendError, match=r"'cpu'.*cuda.*'auto' or 'reference'"):
        select_backend("cpu", quantised(), CUDA)


@pytest.mark.usefixtures("no_numba")
def test_missing_numba_is_said_once():
    with pytest.warns(SeqKVWarning, match=r"No module named 'numba'.*pip install numba") as said:
        assert select_backend("auto", quantised(), CPU).attend_codes is reference.attend_codes
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select_backend("auto", quantised(), CPU).attend_codes is reference.attend_codes


@pytest.mark.usefixtures("no_numba")
@pytest.mark.parametrize(("name", "codec", "device"), [("auto", dense, CPU), ("reference", quantised, CPU)])
def test_missing_numba_is_not_said_where_it_would_not_be_used(name, codec, device):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select_backend(name, codec(), device).attend_codes is reference.attend_codes


@pytest.mark.usefixtures("no_numba")
def test_cpu_kernel_without_numba_is_refused():
    with pytest.raises(BackendError, match=r"No module named 'numba'.*pip install numba.*'reference'"):
        select_backend("cpu", quantised(), CPU)


@pytest.mark.usefixtures("no_numba")
def test_cpu_kernel_from_the_environment_without_numba_is_refused(monkeypatch):
    monkeypatch.setenv("HF_SEQKV_BACKEND", "cpu")
    with pytest.raises(BackendError, match="numba"):
        select_backend("auto", quantised(), CPU)


def test_reason_is_the_import_s_own(monkeypatch):
    # None in `sys.modules` makes the import fail; the attribute would answer before it.
    monkeypatch.setitem(sys.modules, "hf_seqkv.kernels.cpu", None)
    monkeypatch.delattr("hf_seqkv.kernels.cpu")
    interface._backend.cache_clear()
    try:
        assert "hf_seqkv.kernels" in interface._backend("cpu")
    finally:
        interface._backend.cache_clear()


@pytest.fixture
def no_triton(monkeypatch):
    real = interface._backend
    missing = "triton cannot be imported (No module named 'triton'): pip install triton"
    monkeypatch.setattr(interface, "_backend", lambda name: missing if name == "triton" else real(name))


@pytest.mark.usefixtures("no_triton")
def test_missing_triton_is_said_once():
    with pytest.warns(SeqKVWarning, match=r"triton kernel.*No module named 'triton'.*pip install triton") as said:
        assert select_backend("auto", quantised(), CUDA).attend_codes is reference.attend_codes
    assert len(said) == 1


def test_triton_kernel_on_a_cpu_is_refused():
    with pytest.raises(BackendError, match=r"'triton'.*cpu.*'auto' or 'reference'"):
        select_backend("triton", quantised(), CPU)


def test_gpu_gets_the_triton_kernel_for_the_pages_it_reads():
    pytest.importorskip("triton")
    side = VectorCodec.data_free(1, 64, 64, bits=4, rotation="hadamard", codebook="lloyd_max", scale="fit", seed=0)
    assert select_backend("auto", QuantizedPageCodec(side, side), CUDA).name == "triton"
    with pytest.warns(SeqKVWarning, match="pages of 8 tokens"):
        assert select_backend("auto", quantised(), CUDA).name == "reference"
