"""The compiled encoder against the codec's own: the same bytes where arithmetic is exact, as good elsewhere."""

import os
import subprocess
import sys

import pytest
import torch
from encode_cases import ALL, CASES, Case, exact_codec, integers, make_center, paged, real_codec
from hypothesis import given
from hypothesis import strategies as st

from hf_seqkv.codec.center import Center
from hf_seqkv.kernels.cpu import encode_pages, threads
from hf_seqkv.kernels.cpu.jit import features


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


# What other processors run: tables in no registers; where there is AVX-512, in half as wide ones too.
PROCESSORS = {"generic": ""}
if "avx512f" in features():
    PROCESSORS["haswell"] = "+avx,+avx2,+bmi,+bmi2,+fma,+f16c,+popcnt,+lzcnt,+sse4.2"


def on_another(name, script):
    """What a script prints whose kernels are compiled for another processor."""
    env = {**os.environ, "NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": PROCESSORS[name]}
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize("name", PROCESSORS)
def test_other_processors(name):
    assert on_another(name, __file__) == str(len(CASES))


if __name__ == "__main__":
    torch.manual_seed(0)
    for case in CASES.values():
        check_exact(case)
    print(len(CASES))
