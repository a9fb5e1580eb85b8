"""What a model's output feels of its cache, from gradients that are known."""

import pytest
import torch

from hf_seqkv.calibration.sensitivity import GAIN, Sensitivity
from hf_seqkv.codec.importance import features

HEADS, DIM = 2, 6


def test_metric_of_known_gradients():
    """Of every head: the sum of outer products a query, and a floor."""
    sensitivity = Sensitivity((4, 4))
    windows = [[torch.randn(20, HEADS, DIM), torch.randn(20, HEADS, 3)] for _ in range(2)]
    for gradients in windows:
        for g in gradients:
            g /= g.square().sum((1, 2), keepdim=True).sqrt()  # all of one energy
        x = [torch.randn_like(t) for t in gradients]
        sensitivity.add(x, gradients, torch.arange(20), torch.full((20,), 7), 20)
    for side, dim in enumerate((DIM, 3)):
        g = torch.cat([gradients[side] for gradients in windows]).double()
        expected = torch.stack([g[:, h].T @ g[:, h] for h in range(HEADS)]) / 14
        extra = sensitivity.metric(side) - expected
        floor = extra[:, :1, :1] * torch.eye(dim, dtype=torch.float64)
        torch.testing.assert_close(extra, floor.expand_as(extra), atol=1e-5, rtol=1e-4)
        mean = expected.diagonal(dim1=1, dim2=2).mean(-1)
        share = torch.full((HEADS,), sensitivity.floor(side), dtype=torch.float64)
        torch.testing.assert_close(extra[:, 0, 0] / mean, share, atol=1e-4, rtol=0)


def test_floor_is_as_high_as_windows_disagree():
    """Lower where all tell of the same directions, and with more tokens; high where each has directions of its own."""
    steep, turned = 10.0 ** -torch.arange(0, 2, 2 / DIM), torch.linalg.qr(torch.randn(4, DIM, DIM))[0]

    def floor(count, turns):
        sensitivity = Sensitivity((4, 4))
        for turn in turns:
            x, gradients = [torch.randn(count, HEADS, DIM)] * 2, [torch.randn(count, HEADS, DIM) * steep @ turn] * 2
            sensitivity.add(x, gradients, torch.arange(count), torch.full((count,), count), count)
        return sensitivity.floor(0)

    same = turned[:1].expand(4, -1, -1)
    alike, few, apart = floor(4000, same), floor(3, same), floor(4000, turned)
    assert alike < few < apart
    assert alike < 0.01
    assert apart > 0.2
    assert floor(4000, turned[:1]) == 1  # of one window nothing is known


def test_a_token_above_most_counts_by_what_refinement_leaves():
    """Of `E` times the energy of most: as one of `E ** (1 - GAIN)`. Those below most count as they are."""
    sizes = torch.tensor([0.1] * 5 + [1.0] * 11 + [3.0, 10.0, 1000.0])
    gradients = torch.randn(len(sizes), HEADS, DIM)
    gradients *= sizes[:, None, None] / gradients.square().sum((1, 2), keepdim=True).sqrt()
    sensitivity, count = Sensitivity((4, 4)), len(sizes)
    x, queries = torch.randn(count, HEADS, DIM), torch.full((count,), 9)
    sensitivity.add([x] * 2, [gradients] * 2, torch.arange(count), queries, 9)
    g = gradients.double() * sizes.double().clamp_min(1)[:, None, None] ** -GAIN
    expected = torch.einsum("nhi,nhj->hij", g, g) / count
    expected += expected.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None] * torch.eye(DIM)  # the floor of one window
    for side in range(2):
        torch.testing.assert_close(sensitivity.metric(side), expected, rtol=1e-4, atol=1e-4 * expected.max().item())


def test_each_token_counts_by_the_queries_that_see_it():
    """As in a sliding window: what is summed over more queries is larger, and what none sees tells nothing."""
    x, gradients = ([torch.randn(600, HEADS, DIM) for _ in range(2)] for _ in range(2))
    positions, queries = torch.arange(600), torch.randint(1, 50, (600,))
    seen, alike, beside = (Sensitivity((4, 4)) for _ in range(3))
    alike.add(x, gradients, positions, torch.ones(600), 30)
    summed = [g * queries.sqrt()[:, None, None] for g in gradients]
    seen.add(x, summed, positions, queries, 30)
    blind = [torch.cat([t, 9 * torch.randn(100, HEADS, DIM)]) for t in (*x, *summed)]
    beside.add(blind[:2], blind[2:], torch.arange(700), torch.cat([queries, torch.zeros(100)]), 30)
    for side in range(2):
        assert torch.equal(seen.metric(side), beside.metric(side))
        assert torch.equal(seen.importance(side), beside.importance(side))
        torch.testing.assert_close(seen.metric(side), alike.metric(side), atol=0.1 * 30, rtol=0.1)
        torch.testing.assert_close(seen.importance(side), alike.importance(side), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("size", [1, 1e-6, 0])
def test_metric_of_few_gradients_is_positive_definite(size):
    sensitivity = Sensitivity((4, 4))
    x = [torch.randn(50, HEADS, DIM) for _ in range(2)]
    gradients = [size * torch.randn(50, HEADS, 1) * torch.eye(DIM)[0] for _ in range(2)]
    sensitivity.add(x, gradients, torch.arange(50), torch.full((50,), 50), 50)
    for side in range(2):
        torch.linalg.cholesky(sensitivity.metric(side))
        eigenvalues = torch.linalg.eigvalsh(sensitivity.metric(side))
        assert (eigenvalues[:, 0] > 1e-3 * eigenvalues[:, -1]).all()
        assert sensitivity.importance(side).isfinite().all()


@pytest.mark.parametrize("target", [0, 1])
def test_importance_recovers_a_linear_rule(target):
    """The logarithm of a token's energy is made a known function of its keys and position."""
    count = 4000
    x = [torch.randn(count, HEADS, DIM) for _ in range(2)]
    positions = torch.randint(1, 5000, (count,))
    rule = torch.zeros(features(*(t[:1] for t in x), positions[:1]).shape[1])
    rule[1], rule[7], rule[-3], rule[-1] = 1.5, -1.0, -0.5, 3.0
    energy = 2.0 ** (features(*x, positions) @ rule)
    directions = [torch.nn.functional.normalize(torch.randn(count, HEADS * DIM), dim=1) for _ in range(2)]
    energies = [energy if side == target else torch.ones(count) for side in range(2)]
    gradients = [d * e.sqrt()[:, None] for d, e in zip(directions, energies, strict=True)]
    sensitivity = Sensitivity((4, 4))
    sensitivity.add(x, [g.view(count, HEADS, DIM) for g in gradients], positions, torch.ones(count), count)
    fresh = [torch.randn(500, HEADS, DIM) for _ in range(2)]
    found = features(*fresh, torch.randint(1, 5000, (500,)))
    predicted, expected = found @ sensitivity.importance(target), GAIN / 2 * found @ rule  # in levels, factors of 4
    assert (predicted - expected).std() < 0.03 * expected.std()  # a constant is the threshold's to set
    assert (found @ sensitivity.importance(1 - target)).abs().max() < 0.01  # the other side is the same for all


@pytest.mark.parametrize("dear", [0, 1])
def test_hot_cost_is_of_the_side_with_fewer_bits(dear):
    """Both sides differ in size between tokens and are felt alike: what has fewer bits decides what an error costs."""
    count = 3000
    sizes = [2.0 ** torch.randn(count) for _ in range(2)]
    x = [size[:, None, None] * torch.nn.functional.normalize(torch.randn(count, HEADS, DIM), dim=-1) for size in sizes]
    sensitivity = Sensitivity((2, 5) if dear == 0 else (5, 2))
    sensitivity.add(x, [torch.ones(count, HEADS, DIM)] * 2, torch.arange(count), torch.ones(count), count)
    scores = features(*x, torch.arange(count)) @ sensitivity.importance(2)
    alike = [torch.corrcoef(torch.stack([scores, size.log2()]))[0, 1].item() for size in sizes]
    assert alike[dear] > 0.95
    assert alike[1 - dear] < 0.2


def test_constant_part_of_keys_costs_nothing():
    """It is not coded: energies of keys about their mean, and so scores, are the same with and without it."""
    x = [torch.randn(500, HEADS, DIM) for _ in range(2)]
    crosses = []
    for shift in (0, 100):
        sensitivity = Sensitivity((4, 4))
        gradients = [torch.ones(500, HEADS, DIM), torch.zeros(500, HEADS, DIM)]
        sensitivity.add([x[0] + shift, x[1]], gradients, torch.arange(500), torch.ones(500), 500)
        crosses.append(sensitivity.cross[-1, 2])
    torch.testing.assert_close(*crosses, rtol=1e-4, atol=0)
