"""`VectorCodec`: distortion against theory, mixed widths, extreme vectors, and independence of tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_seqkv.codec.rotation import random_rotation
from hf_seqkv.codec.vector import VectorCodec

WIDTHS = [0, 1, 2, 3, 4, 5, 8]
# Mean squared error of the Lloyd-Max quantiser of a unit Gaussian; 8 bits by Panter and Dite, sqrt(3) pi / 2 / 4^8.
THEORY = {2: 0.1175, 3: 0.03454, 4: 0.009497, 8: 4.151e-5}
# Mean squared relative error of rounding a scale to 8 significant bits, mantissas spread as 1 / m.
BF16 = 2.0**-16 / 12 * 3 / 2 / 0.6931


def data_free(heads=2, dim=64, page_size=16, bits=4, rotation="orthogonal", scale="fit", seed=0):
    return VectorCodec.data_free(
        heads, dim, page_size, bits=bits, rotation=rotation, codebook="lloyd_max", scale=scale, seed=seed
    )


def mixed(widths, page_size=16, scale="fit", seed=0):
    """A codec as a calibration makes them: every head its basis, mean, levels and gains; `widths [H, D]`."""
    generator = torch.Generator().manual_seed(seed)
    widths = torch.as_tensor(widths, dtype=torch.uint8)
    heads, dim = widths.shape
    levels = torch.zeros(heads, 9, 256)
    for width in set(widths.flatten().tolist()):
        levels[:, width, : 2**width] = torch.randn(heads, 2**width, generator=generator).sort(-1).values
    gains = torch.rand(heads, dim, 1, generator=generator) + 0.5
    basis = torch.stack([random_rotation(dim, "orthogonal", seed + h) for h in range(heads)])
    mean = torch.randn(heads, dim, generator=generator)
    encode_matrix = (basis / gains).transpose(1, 2).contiguous()
    return VectorCodec(encode_matrix, basis * gains, mean, widths, levels, scale, page_size)


def relative_error(codec, x):
    """Mean over vectors of squared error over squared length."""
    error = (codec.decode(*codec.encode(x)).double() - x.double()).square().sum(-1)
    return (error / x.double().square().sum(-1)).mean().item()


@pytest.mark.parametrize("bits", THEORY)
def test_published_distortion(bits):
    # A large dimension, where a coordinate of a random vector is Gaussian.
    codec = data_free(heads=1, dim=256, page_size=512, bits=bits, scale="norm")
    assert relative_error(codec, torch.randn(1, 512, 256)) == pytest.approx(THEORY[bits] + BF16, rel=0.03)


@pytest.mark.parametrize("bits", THEORY)
@pytest.mark.parametrize("rotation", ["hadamard", "orthogonal"])
@pytest.mark.parametrize("dim", [16, 64])
def test_fit_is_never_worse_than_norm(bits, rotation, dim):
    x = torch.randn(2, 256, dim) * torch.rand(2, 256, 1)
    fit, norm = (
        relative_error(data_free(dim=dim, page_size=256, bits=bits, rotation=rotation, scale=scale), x)
        for scale in ("fit", "norm")
    )
    assert fit < norm


def test_rotation_serves_vectors_of_one_component():
    # What the rotation is for: without it a lone component lies far outside every level.
    x = torch.zeros(2, 16, 64)
    x[..., 5] = torch.linspace(1, 9, 16)
    assert relative_error(data_free(rotation="orthogonal", scale="norm"), x) < 0.02


@pytest.mark.parametrize("scale", ["fit", "norm"])
def test_mixed_widths(scale):
    widths = [[0] * 8 + [8] * 8, [WIDTHS[i % 7] for i in range(16)]]
    codec = mixed(widths, scale=scale)
    x = torch.randn(3, 2, 16, 16)
    codes, scales = codec.encode(x)
    assert codes.shape == (3, 2, 16, 16)
    assert scales.shape == (3, 2, 16)
    assert scales.dtype == torch.bfloat16
    # Component d of head h holds codes below 2 ** widths[h, d], and uses them.
    limit = 1 << codec.widths.int()
    assert (codes < limit[..., None]).all()
    assert (codes.amax((0, 3))[codec.widths > 0] > 0).all()
    assert codec.code_bytes == 16 // 8 * int(codec.widths.sum())
    packed = codec.pack(codes)
    assert packed.shape == (3, codec.code_bytes)
    assert torch.equal(codec.unpack(packed), codes)
    # Decoding by its definition, one component at a time.
    y = torch.zeros(3, 2, 16, 16)
    for h in range(2):
        for d in range(16):
            width = int(codec.widths[h, d])
            if width:
                y[:, h, :, d] = codec.levels[h, width][codes[:, h, d].long()] * scales[:, h].float()
    expected = y @ codec.decode_matrix + codec.mean[:, None]
    assert torch.allclose(codec.decode(codes, scales), expected, atol=1e-5)


def test_fit_gain_is_least_squares():
    codec = mixed([[WIDTHS[(i + h) % 7] for i in range(16)] for h in range(2)])
    x = torch.randn(2, 16, 16)
    codes, _ = codec.encode(x)
    unit = (codec.decode(codes, torch.ones(2, 16)) - codec.mean[:, None]).double()
    target = (x - codec.mean[:, None]).double()
    best = (unit * target).sum(-1) / unit.square().sum(-1)
    # The basis is orthogonal up to its gains, so the metric of the gain is that of the vector itself.
    _, scales = codec.encode(x)
    assert torch.allclose(scales.double(), best, rtol=2**-8)


def test_vector_that_overshoots_its_narrow_components_gets_a_larger_gain():
    codec, plain = (mixed([[8] * 8 + [2] * 8] * 2, page_size=256) for _ in range(2))
    plain.mixed = False  # one gain a vector, its length
    x = torch.randn(2, 256, 16) @ codec.decode_matrix
    narrow = (torch.arange(16) >= 8) * torch.randn(2, 256, 16) ** 3 @ codec.decode_matrix
    assert relative_error(codec, narrow) < 0.9 * relative_error(plain, narrow)
    assert relative_error(codec, x) <= relative_error(plain, x)


@given(st.lists(st.sampled_from(range(9)), min_size=1, max_size=12), st.sampled_from([8, 16, 24, 64]), st.integers(0))
def test_pack_round_trip(widths, page_size, seed):
    codec = mixed([widths, widths[::-1]], page_size=page_size)
    generator = torch.Generator().manual_seed(seed % 2**31)
    codes = torch.randint(0, 256, (2, 2, len(widths), page_size), generator=generator, dtype=torch.uint8)
    codes &= ((1 << codec.widths.int()) - 1).to(torch.uint8)[..., None]
    packed = codec.pack(codes)
    assert packed.shape == (2, codec.code_bytes)
    assert torch.equal(codec.unpack(packed), codes)


def test_offsets_are_where_components_begin():
    codec = mixed([[3, 0, 8, 1]])
    codes = torch.zeros(1, 4, 16, dtype=torch.uint8)
    codes[0, 2] = torch.arange(16)
    at = int(codec.offsets[0, 2])
    assert codec.offsets.tolist() == [[0, 6, 6, 22]]
    assert codec.pack(codes)[at : at + 16].tolist() == list(range(16))


def test_all_components_dropped():
    codec = mixed([[0, 0, 0]], page_size=8)
    codes, scales = codec.encode(torch.randn(1, 8, 3))
    assert codec.code_bytes == 0
    assert codec.pack(codes).shape == (0,)
    assert torch.equal(codec.decode(codes, scales), codec.mean[:, None].expand(1, 8, 3))


@pytest.mark.parametrize("scale", ["fit", "norm"])
def test_zero_vectors_stay_zero(scale):
    codec = data_free(scale=scale)
    x = torch.randn(2, 16, 64)
    x[:, 3] = 0
    decoded = codec.decode(*codec.encode(x))
    assert torch.equal(decoded[:, 3], torch.zeros(2, 64))
    assert (decoded[:, 4] != 0).all()


@pytest.mark.parametrize("scale", ["fit", "norm"])
@pytest.mark.parametrize("magnitude", [1e-30, 1e-10, 1e10, 1e30])
def test_magnitude_does_not_matter(scale, magnitude):
    codec = data_free(scale=scale)
    x = torch.randn(2, 16, 64)
    error = relative_error(codec, x)
    assert relative_error(codec, x * magnitude) == pytest.approx(error, rel=0.01)


def test_large_and_small_vectors_share_a_page():
    codec = data_free()
    x = torch.randn(2, 16, 64)
    scaled = x * torch.logspace(-6, 6, 16)[:, None]
    assert relative_error(codec, scaled) == pytest.approx(relative_error(codec, x), rel=0.01)


@pytest.mark.parametrize("dim", [16, 64, 80, 128])
@pytest.mark.parametrize("kind", ["data free", "mixed widths"])
def test_token_is_coded_on_its_own(dim, kind):
    codec = data_free(dim=dim) if kind == "data free" else mixed([[WIDTHS[i % 7] for i in range(dim)]] * 2)
    x = torch.randn(5, 2, 16, dim)
    codes, scales = codec.encode(x)
    # Other tokens of its page.
    changed = torch.randn_like(x) * 100
    changed[..., 7, :] = x[..., 7, :]
    other_codes, other_scales = codec.encode(changed)
    assert torch.equal(other_codes[..., 7], codes[..., 7])
    assert torch.equal(other_scales[..., 7], scales[..., 7])
    assert not torch.equal(other_codes, codes)
    # Neighbours in the batch, and none.
    for row in range(5):
        for alone in (codec.encode(x[row]), [part[0] for part in codec.encode(x[row : row + 1])]):
            assert torch.equal(alone[0], codes[row])
            assert torch.equal(alone[1], scales[row])


@pytest.mark.parametrize("threads", [1, 2])
def test_layout_in_memory_does_not_matter(threads):
    codec = data_free()
    x = torch.randn(40, 16, 2, 64)
    before = torch.get_num_threads()
    codes, scales = codec.encode(x.transpose(1, 2).contiguous())
    try:
        torch.set_num_threads(threads)
        other = codec.encode(x.transpose(1, 2))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(other[0], codes)
    assert torch.equal(other[1], scales)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_input_is_coded_in_fp32(dtype):
    codec = data_free()
    x = torch.randn(2, 16, 64).to(dtype)
    codes, scales = codec.encode(x)
    expected = codec.encode(x.float())
    assert torch.equal(codes, expected[0])
    assert torch.equal(scales, expected[1])


def test_fingerprint_covers_what_decoding_reads():
    widths = [[4, 2, 0, 8]]
    same, base = mixed(widths).fingerprint, mixed(widths)
    assert base.fingerprint == same
    others = [mixed(widths, page_size=24), mixed(widths, seed=1), mixed([[4, 2, 8, 0]])]
    for table in ("mean", "levels", "decode_matrix"):
        other = mixed(widths)
        setattr(other, table, getattr(other, table).clone())
        getattr(other, table).view(-1)[-1] += 1
        others.append(other)
    assert same not in {other.fingerprint for other in others}
    assert len({other.fingerprint for other in others}) == len(others)
