"""The compiled encoder against the codec's own: the same bytes where arithmetic is exact, as good elsewhere."""

import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_seqkv.codec.center import Center
from hf_seqkv.codec.page import QuantizedPageCodec
from hf_seqkv.codec.quantize import CODEBOOKS
from hf_seqkv.codec.rotation import random_rotation
from hf_seqkv.codec.vector import VectorCodec
from hf_seqkv.kernels.cpu import encode_pages, threads
from hf_seqkv.kernels.cpu.simd16 import features

ALL = (4, 0, 1, 8, 3, 7, 2, 6, 5)


@dataclass(frozen=True)
class Case:
    """`widths` are the bits of all components (one number) or of each in turn; `half` the number of RoPE pairs."""

    batch: int = 1
    pages: int = 2
    heads: int = 2
    page_size: int = 64
    dim: int = 64
    value_dim: int = 64
    key_widths: int | tuple[int, ...] = 5
    value_widths: int | tuple[int, ...] = 4
    scale: str = "fit"
    scale_bits: int = 16
    half: int | None = None
    interleaved: bool = False
    dtype: torch.dtype = torch.float32


def widths_of(heads, dim, bits):
    bits = (bits,) if isinstance(bits, int) else bits
    return torch.tensor([[bits[(d + h) % len(bits)] for d in range(dim)] for h in range(heads)], dtype=torch.uint8)


def exact_codec(case):
    """Identity rotations and levels on a grid: sums of small integers are the same in any order."""

    def side(dim, bits):
        identity, levels = torch.eye(dim).repeat(case.heads, 1, 1), torch.zeros(case.heads, 9, 256)
        for head in range(case.heads):
            for width in range(9):
                step = 2.0 ** (head % 2 - max(width - 3, 0))  # edges at multiples of a quarter or so: ties happen
                levels[head, width, : 2**width] = step * (torch.arange(2**width) - (2**width - 1) / 2)
        mean = torch.randint(-2, 3, (case.heads, dim)).float()
        widths = widths_of(case.heads, dim, bits)
        return VectorCodec(identity, identity, mean, widths, levels, case.scale, case.page_size, case.scale_bits)

    return QuantizedPageCodec(side(case.dim, case.key_widths), side(case.value_dim, case.value_widths))


def real_codec(case):
    """As a calibration makes them: every head its basis, gains, mean and levels."""

    def side(dim, bits, seed):
        widths = widths_of(case.heads, dim, bits)
        middle = widths.float().mean()
        gains = 2.0 ** (widths.float() - middle)[..., None]
        levels = torch.zeros(case.heads, 9, 256)
        for width in range(1, 9):
            book = CODEBOOKS["lloyd_max"](width, 64)
            levels[:, width, : 2**width] = book * (1 + 0.1 * torch.rand(case.heads, 1))
        basis = torch.stack([random_rotation(dim, "orthogonal", seed + h) for h in range(case.heads)])
        mean = torch.randn(case.heads, dim)
        matrix = (basis / gains).transpose(1, 2).contiguous()
        return VectorCodec(matrix, basis * gains, mean, widths, levels, case.scale, case.page_size, case.scale_bits)

    return QuantizedPageCodec(side(case.dim, case.key_widths, 0), side(case.value_dim, case.value_widths, 50))


def make_center(case, exact):
    if case.half is None:
        return None
    shape = (case.batch, case.pages, case.half)
    if exact:  # quarter turns
        first, step = torch.randint(0, 4, shape), torch.randint(0, 4, (case.half,))
        turns = first, torch.arange(case.page_size)[:, None] * step
        cosine, sine = torch.tensor([1.0, 0, -1, 0]), torch.tensor([0.0, 1, 0, -1])
        tables = [torch.cat([cosine[turn % 4], sine[turn % 4]], -1) for turn in turns]
        mean = torch.randint(-3, 4, (case.batch, case.heads, case.dim)).float()
    else:
        angles = torch.rand(shape) * 6, torch.arange(case.page_size)[:, None] * torch.rand(case.half)
        tables = [torch.cat([angle.cos(), angle.sin()], -1) for angle in angles]
        mean = 3 * torch.randn(case.batch, case.heads, case.dim)
    return Center(mean, *tables, case.interleaved)


def paged(case, x):
    """`[B, H, N * P, D]` as the cache hands pages over: a view `[B, N, H, P, D]`."""
    return x.to(case.dtype).unflatten(2, (-1, case.page_size)).transpose(1, 2)


def integers(case):
    shape = (case.batch, case.heads, case.pages * case.page_size)
    dims = case.dim, case.value_dim
    return [paged(case, torch.randint(-9, 10, (*shape, dim)) // torch.randint(1, 10, (*shape, 1))) for dim in dims]


def by_definition(codec, k, v, center):
    return codec.encode(k.float() - (0 if center is None else center.keys(0, k.shape[1])), v)


def check_exact(case):
    codec, (k, v), center = exact_codec(case), integers(case), make_center(case, exact=True)
    assert torch.equal(encode_pages(codec, k, v, center), by_definition(codec, k, v, center))


def check_close(case, codec=None, inputs=None):
    """Errors as good as the codec's own; returns the share of codes that are the same."""
    codec = codec or real_codec(case)
    if inputs is None:
        shape = (case.batch, case.heads, case.pages * case.page_size)
        inputs = [torch.randn(*shape, side.dim) @ side.decode_matrix for side in (codec.key, codec.value)]
        inputs = [paged(case, x * torch.rand(*shape, 1) * 4) for x in inputs]
    center = make_center(case, exact=False)
    pages, expected = encode_pages(codec, *inputs, center), by_definition(codec, *inputs, center)
    inputs = [inputs[0].float() - (0 if center is None else center.keys(0, case.pages)), inputs[1].float()]
    ours, theirs = codec.unpack(pages), codec.unpack(expected)
    decoded = zip(inputs, codec.decode(pages), codec.decode(expected), strict=True)
    same = []
    for at, (x, our, their) in enumerate(decoded):
        codes, scales = ours[2 * at] == theirs[2 * at], ours[2 * at + 1]
        ulps = (scales.view(torch.int16).int() - theirs[2 * at + 1].view(torch.int16).int()).abs()
        # One gain and one set of codes, but for rounding; or another gain that serves equally well.
        agree = codes.all(-2)
        assert (ulps[agree] <= 1).all()
        energy = (x - (codec.key, codec.value)[at].mean[:, None]).double().square().sum(-1)
        error, reference = ((y.double() - x.double()).square().sum(-1) for y in (our, their))
        limit = reference * (1 + 1e-3) + 2e-6 * energy
        if case.scale == "norm":  # the scale that was rounded is not the best: the next one may be worse, or better
            limit += (ulps > 0) * 2**-7 * (energy * reference).sqrt()
        assert (error <= limit).all()
        same.append(codes.flatten())
    return torch.cat(same).double().mean()


BASE = {
    "data free": Case(),
    "all widths": Case(key_widths=ALL, value_widths=ALL[::-1]),
    "center, halves": Case(half=32, key_widths=(5, 4, 6)),
    "center, neighbours": Case(half=32, interleaved=True),
    "part of the components turned": Case(half=12, interleaved=True, dim=80),
    "no component turned": Case(half=0),
    "norm": Case(scale="norm", half=32),
    "mixed norm": Case(scale="norm", key_widths=(3, 5), value_widths=ALL),
    "8-bit scales": Case(scale_bits=8, key_widths=(3, 4), value_widths=2, half=16),
    "8-bit scales, norm": Case(scale="norm", scale_bits=8, page_size=40),
    "bf16": Case(dtype=torch.bfloat16, half=32, value_widths=(2, 4)),
    "fp16": Case(dtype=torch.float16, half=32, value_widths=(2, 4)),
    "fp64": Case(dtype=torch.float64),
    "rows": Case(batch=3, pages=3, half=32, page_size=16),
    "no codes": Case(key_widths=0, value_widths=(0, 0)),
    "one dimension": Case(dim=1, value_dim=3, page_size=8, heads=1),
}
CASES = (
    BASE
    | {f"page of {size}": Case(page_size=size, key_widths=ALL, half=32, heads=3) for size in (8, 16, 24, 40, 72, 128)}
    | {f"{bits} bits": Case(key_widths=bits, value_widths=9 - bits) for bits in range(1, 9)}
    | {f"dim {d}": Case(dim=d, value_dim=d, half=d // 2, key_widths=(4, 5, 6)) for d in (64, 80, 96, 128, 256)}
)


@pytest.mark.parametrize("name", CASES)
def test_same_bytes_where_arithmetic_is_exact(name):
    check_exact(CASES[name])


@given(
    st.builds(
        Case,
        batch=st.integers(1, 3),
        pages=st.integers(1, 3),
        heads=st.integers(1, 3),
        page_size=st.integers(1, 12).map(lambda n: 8 * n),
        dim=st.integers(2, 40),
        value_dim=st.integers(1, 40),
        key_widths=st.lists(st.integers(0, 8), min_size=1, max_size=5).map(tuple),
        value_widths=st.integers(0, 8),
        scale=st.sampled_from(["fit", "norm"]),
        half=st.none() | st.integers(0, 1),
        interleaved=st.booleans(),
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    )
)
def test_any_shape(case):
    check_exact(case)


@pytest.mark.parametrize("name", CASES)
def test_errors_are_those_of_the_codec(name):
    check_close(CASES[name])


@pytest.mark.parametrize("widths", [4, (4, 5, 6), ALL], ids=str)
def test_codes_are_those_of_the_codec(widths):
    case = Case(pages=24, key_widths=widths, value_widths=widths, half=32)
    assert check_close(case) >= 0.999


def test_narrow_components_that_overshoot():
    # Vectors unlike those the widths were made for, for which larger gains are tried.
    case = Case(key_widths=(8, 2), value_widths=(6, 3), pages=8)
    codec = real_codec(case)
    inputs = []
    for side in (codec.key, codec.value):
        z = torch.randn(1, 2, 8 * 64, 64) ** 3 * (side.widths < 4)[:, None]
        inputs.append(paged(case, z @ side.decode_matrix))
    assert check_close(case, codec, inputs) >= 0.999


@pytest.mark.parametrize("power", [-140, -126, -60, 60, 123])
@pytest.mark.parametrize("name", ["data free", "all widths", "mixed norm"])
def test_magnitude_changes_no_code(name, power):
    case = CASES[name]
    codec, (k, v) = exact_codec(case), integers(case)
    codec.key.mean.zero_()
    codec.value.mean.zero_()
    codes = codec.unpack(encode_pages(codec, k, v, None))
    k, v = k * 2.0**power, v * 2.0**power
    pages = encode_pages(codec, k, v, None)
    for at, (ours, plain) in enumerate(zip(codec.unpack(pages), codes, strict=True)):
        if at % 2 == 0:
            assert torch.equal(ours, plain)
        elif power > -126:  # below, scales are no longer bf16's normal numbers
            assert torch.equal(ours, (plain.double() * 2.0**power).to(plain.dtype))
    if power > -140:
        assert torch.equal(pages, codec.encode(k, v))


@pytest.mark.parametrize(
    ("name", "magnitude"),
    [("data free", 1e-38), ("data free", 1e38), ("all widths", 1e-38), ("all widths", 1e36)],
)
def test_extreme_numbers(name, magnitude):
    case = CASES[name]
    codec = real_codec(case)
    codec.key.mean.zero_()
    codec.value.mean.zero_()
    x = [paged(case, torch.randn(1, 2, 128, 64).clamp(-3, 3) * magnitude) for _ in range(2)]
    ours, theirs = codec.unpack(encode_pages(codec, *x, None)), codec.unpack(codec.encode(*x))
    for at, side in enumerate((codec.key, codec.value)):
        finite = (x[at] @ side.encode_matrix).isfinite().all(-1)  # 1e38 may not survive a rotation
        assert finite.double().mean() > (0.2 if magnitude == 1e38 else 0.99)
        same = (ours[2 * at] == theirs[2 * at]).double().mean(-2)
        assert same[finite].mean() > 0.99


@pytest.mark.parametrize("name", ["data free", "all widths", "norm"])
def test_zero_vectors_stay_zero(name):
    case = CASES[name]
    codec, (k, v) = exact_codec(case), integers(case)
    codec.value.mean.zero_()
    k[:, :, :, 5], v[:, :, :, 3] = codec.key.mean, 0
    pages = encode_pages(codec, k, v, None)
    assert torch.equal(pages, codec.encode(k, v))
    decoded = codec.decode(pages)
    assert torch.equal(decoded[0][:, :, :, 5], k[:, :, :, 5])
    assert (decoded[1][:, :, :, 3] == 0).all()


def test_padding_is_zero():
    case = Case(heads=1, page_size=8, dim=5, value_dim=7, key_widths=3, value_widths=5)
    codec = exact_codec(case)
    assert any(size % 16 for _, size in codec.sections.values())
    pages = encode_pages(codec, *integers(case), None)
    for at, size in codec.sections.values():
        pages[..., at : at + size] = 0
    assert not pages.any()


def test_layout_in_memory_does_not_matter():
    case = Case(batch=2, pages=3)
    codec, (k, v) = real_codec(case), [torch.randn(2, 3, 2, 64, 64) for _ in range(2)]
    expected = encode_pages(codec, k, v, None)
    orders = ((3, 1, 0, 2, 4), (4, 0, 1, 2, 3), (2, 1, 3, 0, 4))
    for order in orders:
        back = [order.index(d) for d in range(5)]
        strided = [x.permute(order).contiguous().permute(back) for x in (k, v)]
        assert torch.equal(encode_pages(codec, *strided, None), expected)
    wide = torch.randn(2, 3, 2, 64, 100)
    wide[..., 9:73] = k
    assert torch.equal(encode_pages(codec, wide[..., 9:73].requires_grad_(), v, None), expected)
    assert torch.equal(encode_pages(codec, k[:1].expand_as(k), v[:1].expand_as(v), None)[1], expected[0])


@pytest.mark.parametrize("name", ["data free", "all widths", "bf16"])
def test_page_depends_on_nothing_else(name):
    case = CASES[name]
    case = Case(**vars(case) | {"batch": 3, "pages": 4, "half": 16})
    codec, center = real_codec(case), make_center(case, exact=False)
    k, v = (paged(case, torch.randn(3, 2, 4 * 64, 64)) for _ in range(2))
    expected = encode_pages(codec, k, v, center)
    for b in range(3):
        for n in range(4):
            here = Center(center.mean[b : b + 1], center.starts[b : b + 1, n : n + 1], center.relative, False)
            alone = encode_pages(codec, k[b : b + 1, n : n + 1], v[b : b + 1, n : n + 1], here)
            assert torch.equal(alone[0, 0], expected[b, n])
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(encode_pages(codec, k, v, center), expected)
    finally:
        torch.set_num_threads(before)


def test_numbas_pool_gives_the_same(monkeypatch):
    """Where torch has no pool that kernels can run on."""
    case = Case(pages=3)
    codec, (k, v) = exact_codec(case), integers(case)
    expected = encode_pages(codec, k, v, None)
    monkeypatch.setattr(threads, "torch_pool", lambda: None)
    assert torch.equal(encode_pages(codec, k, v, None), expected)


def test_no_pages():
    case = Case()
    codec = exact_codec(case)
    pages = encode_pages(codec, torch.zeros(2, 0, 2, 64, 64), torch.zeros(2, 0, 2, 64, 64), None)
    assert pages.shape == (2, 0, codec.page_bytes)


# What other processors run: tables in half as wide registers, and none.
PROCESSORS = {"generic": ""}
if "avx2" in features():
    PROCESSORS["haswell"] = "+avx,+avx2,+bmi,+bmi2,+fma,+f16c,+popcnt,+lzcnt,+sse4.2"


@pytest.mark.parametrize("name", PROCESSORS)
def test_other_processors(name):
    """The same kernel compiled for another processor, in a process of its own."""
    env = {**os.environ, "NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": PROCESSORS[name]}
    result = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(len(CASES))]


if __name__ == "__main__":
    torch.manual_seed(0)
    for case in CASES.values():
        check_exact(case)
    print(len(CASES))
