"""Fitting a sequence codec to tokens whose structure is known."""

import functools

import pytest
import torch

from hf_seqkv.calibration.fit import fit_held
from hf_seqkv.calibration.sensitivity import Sensitivity
from hf_seqkv.calibration.sequence_fit import Ingredients, Sample, fit_sequence
from hf_seqkv.codec.importance import features
from hf_seqkv.codec.sequence_part import INPUTS, sources

HEADS, DIM, PAGE, EMBEDDED, PAGES = 2, 6, 16, 16, 64
WIDTH = HEADS * DIM
NOISE = 0.05  # share of the variance of every part but the first layer's keys that nothing predicts
MIXING = torch.Generator().manual_seed(5)
MAPS = [torch.linalg.qr(torch.randn(n, WIDTH, generator=MIXING))[0] for n in (EMBEDDED, WIDTH, WIDTH, WIDTH)]


def mixed(x, weights, noise):
    """A linear function of `x` of unit variance, with a share of noise."""
    return (1 - noise) ** 0.5 * x @ weights + noise**0.5 * torch.randn(*x.shape[:2], WIDTH)


def make_sample(pages=PAGES, seed=0):
    """Keys 0 are the embeddings' alone; values are the keys'; layer 1 is layer 0's, with noise."""
    torch.manual_seed(seed)
    embedded = torch.randn(pages, PAGE, EMBEDDED)
    k0 = mixed(embedded, MAPS[0], 0)
    v0 = mixed(k0, MAPS[1], NOISE)
    k1 = mixed(k0, MAPS[2], NOISE)
    v1 = mixed(k1, MAPS[3], NOISE)
    keys, values = ([x.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for x in group] for group in ((k0, k1), (v0, v1)))
    return Sample(keys, values, embedded, torch.arange(pages * PAGE).view(pages, PAGE))


def tokens(sample, layer):
    """Keys and values of a layer, `[n, H, D]` each."""
    return [x[layer].transpose(1, 2).flatten(0, 1) for x in (sample.keys, sample.values)]


def make_sensitivities(sample, size=0.7):
    """Gradients that differ between directions, and are larger for tokens whose first component is."""
    found = []
    for layer in range(len(sample.keys)):
        x, sensitivity = tokens(sample, layer), Sensitivity((4, 4))
        spread = size * torch.linspace(0.5, 2, DIM)
        gradients = [2 ** x[0][:, :1, :1] * spread * torch.randn_like(t) for t in x]
        sensitivity.add(x, gradients, sample.positions.flatten(), torch.full((len(x[0]),), len(x[0])), len(x[0]))
        found.append(sensitivity)
    return found


@functools.cache
def fitted(predict=True):
    """A codec, its report, the sample and the sensitivities that it was fitted to."""
    sample = make_sample()
    sensitivities = make_sensitivities(sample)
    return *fit_sequence(sample, sensitivities, Ingredients(prediction=predict), progress=False), sample, sensitivities


def coded(codec, sample):
    """Bytes of a sample's pages, and for every part what it errs in the codec's coefficients, `[n, W]`."""
    encoder = codec.encoder(sample.embedded if codec.predicts else None)
    held = [encoder.add(k, v, sample.positions) for k, v in zip(sample.keys, sample.values, strict=True)]
    errors = []
    for layer, pair in enumerate(held):
        for side, (x, t) in enumerate(zip(pair, tokens(sample, layer), strict=True)):
            error = x.transpose(1, 2).flatten(0, 1) - t
            errors.append(error.flatten(1) @ codec.parts[2 * layer + side].analysis)
    return sum(map(len, encoder.finish())), errors


def test_what_is_left_is_the_noise():
    left = fitted()[1]["left"]
    assert left["key"][0] < 1e-4
    assert left["value"][0] == pytest.approx(NOISE, rel=0.15)
    assert left["key"][1] == pytest.approx(NOISE, rel=0.2)
    assert left["value"][1] == pytest.approx(NOISE, rel=0.2)
    assert fitted(predict=False)[1]["left"] == {"key": [1, 1], "value": [1, 1]}


def test_inputs_are_those_that_tell_something():
    """Of embeddings, both sides of the layer before and of the one before that, and a part's own keys."""
    codec = fitted()[0]
    from_keys = [tuple(part.inputs) for part in codec.parts[1:]]
    assert codec.parts[0].inputs == (EMBEDDED, 0, 0, 0, 0, 0)
    assert from_keys == [(0, 0, 0, 0, 0, WIDTH), (0, WIDTH, 0, 0, 0, 0), (0, 0, 0, 0, 0, WIDTH)]
    assert all(part.inputs == (0,) * INPUTS for part in fitted(predict=False)[0].parts)


def test_without_a_choice_all_inputs_are_used():
    sample, sensitivities = fitted()[2:]
    codec, _ = fit_sequence(sample, sensitivities, Ingredients(chosen=False), progress=False)
    for index, part in enumerate(codec.parts):
        assert [width > 0 for width in part.inputs] == [n is not None for n in ("embedding", *sources(index))]


def test_prediction_saves_what_it_explains():
    """Bits of other tokens than were fitted, at the same error: half the octaves of the variance it takes away."""
    other = make_sample(16, seed=1)
    (bytes_with, errors_with), (bytes_without, errors_without) = (coded(fitted(x)[0], other) for x in (True, False))
    for a, b in zip(errors_with, errors_without, strict=True):
        assert a.square().mean() <= 1.1 * b.square().mean()
    saved = 8 * (bytes_without - bytes_with) / (16 * PAGE * 4 * WIDTH)
    assert saved > 0.8 * 0.5 * torch.log2(torch.tensor(1 / NOISE)).item()


@pytest.mark.parametrize("predict", [True, False])
def test_errors_are_those_of_the_step(predict):
    """In coefficients, whose unit is what the output feels, on other tokens: no more than `step**2 / 12` or so."""
    codec = fitted(predict)[0]
    for error in coded(codec, make_sample(16, seed=1))[1]:
        assert error.square().mean() < 1.15 * codec.base**2 / 12
    for error in coded(codec.at(4), make_sample(16, seed=1))[1]:
        assert error.square().mean() < 1.15 * 4 * codec.base**2 / 12


def test_analysis_is_the_inverse_of_synthesis():
    for part in fitted()[0].parts:
        torch.testing.assert_close(part.synthesis @ part.analysis, torch.eye(WIDTH), atol=1e-4, rtol=0)


def test_coefficients_are_in_the_metrics_unit():
    """One step of any coefficient costs the same: rows of `synthesis` are orthonormal in the metric."""
    codec, _, _, sensitivities = fitted()
    for index, part in enumerate(codec.parts):
        metric = torch.block_diag(*sensitivities[index // 2].metric(index % 2))
        rows = part.synthesis.double()
        torch.testing.assert_close(rows @ metric @ rows.T, torch.eye(WIDTH, dtype=torch.float64), atol=1e-4, rtol=0)


def test_coefficients_are_uncorrelated():
    codec, _, sample, _ = fitted(predict=False)
    for index, part in enumerate(codec.parts):
        z = (tokens(sample, index // 2)[index % 2].flatten(1) - part.bias) @ part.analysis
        covariance = z.T @ z / len(z)
        strength = covariance.diagonal()
        assert (strength[:-1] >= strength[1:] * 0.999).all()  # largest first
        assert (covariance - strength.diag()).abs().max() < 1e-3 * strength.max()


def test_equal_inputs_give_equal_codecs():
    codec, report, sample, _ = fitted()
    again, report_again = fit_sequence(sample, make_again(sample), progress=False)
    assert again.fingerprint == codec.fingerprint
    assert report_again == report
    assert all(torch.equal(a.importance, b.importance) for a, b in zip(again.parts, codec.parts, strict=True))


def make_again(sample):
    make_sample()  # draws what was drawn before the gradients
    return make_sensitivities(sample)


def test_share_is_counted():
    codec, _, sample, _ = fitted()
    encoder = codec.encoder(sample.embedded)
    for k, v in zip(sample.keys, sample.values, strict=True):
        encoder.add(k, v, sample.positions)
    for index, part in enumerate(codec.parts):
        levels = encoder.coded(index)[0]
        assert part.share == int(8 * (levels == 0).double().mean())


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_held_tokens_are_the_share_asked_for(share):
    _, _, sample, sensitivities = fitted()
    for layer, weights in enumerate(fit_held(sample, sensitivities, share)):
        found = features(*tokens(sample, layer), sample.positions.flatten())
        assert (found @ weights > 0).double().mean().item() == pytest.approx(share, abs=2 / len(found))
