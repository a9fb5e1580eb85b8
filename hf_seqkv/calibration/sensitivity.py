"""What a model's output feels of its cache: second moments of gradients, and which tokens they are large for.

With `g` the gradient, with respect to one token's cached keys of one head, of the negative log-likelihoods of later
tokens sampled from the model, `E[g g^T]` is the Fisher information: an error `e` of those keys costs half of
`e^T E[g g^T] e` in nats of Kullback–Leibler divergence. Source: Amari, "Natural gradient works efficiently in
learning", 1998.

A few tokens have nearly all of that energy, and those are refined: their errors are smaller by a power of their energy.
Tokens count by the energy that is then left. At 0.0044 nats from SmolLM2, fitted to 16,384 tokens with a floor of 0.02
and one median for all windows, that takes 0.525 bits a value; 0.611 where all energy counts, 0.595 where levels say
what is left. Other powers of it (0.75, 1; below the median, too) took 8 % less to 4 % more at 0.018 nats.

What one half of the windows says of the other decides how far the moments are drawn towards those of errors that are
felt alike in all directions. Source: cross-validated linear shrinkage, after Ledoit and Wolf, "A well-conditioned
estimator for large-dimensional covariance matrices", 2004.
"""

from __future__ import annotations

import torch

from ..codec import importance

# Of the mean over components, that are tried as what no direction has less of.
FLOORS = torch.tensor([2.0**n for n in range(-11, 3)], dtype=torch.float64)
UNKNOWN = 1.0  # where there is one window only
GAIN = 0.5  # of the logarithm of a token's energy that the energy of its error follows
RIDGE = 20.0  # in standardised features


class Sensitivity:
    """Running statistics of one layer's gradients.

    Args:
        bits: Of keys and of values in hot pages, whose error is weighed where a token is to be held dense.
    """

    def __init__(self, bits: tuple[float, float]) -> None:
        self.errors = [4.0**-b for b in bits]
        self.metrics: list[torch.Tensor] | None = None  # of keys and of values, [2, H, D, D]: of every other window
        self.gram = self.cross = None
        self.tokens = self.windows = self.pairs = self.visible = 0

    def add(
        self,
        x: list[torch.Tensor],
        gradients: list[torch.Tensor],
        positions: torch.Tensor,
        queries: torch.Tensor,
        visible: int,
    ) -> None:
        """Add one window's tokens.

        Args:
            x: Keys before RoPE and values, `[n, H, D]` each.
            gradients: The same of the summed loss of later tokens.
            positions: `[n]`.
            queries: How many of the later tokens attend to each, `[n]`; a token to which none does tells nothing.
            visible: Coded tokens that a query attends to where a cache has `n` of them: fewer in a sliding window.
        """
        known = queries > 0
        x, gradients = ([t[known].float() for t in group] for group in (x, gradients))
        positions, queries = positions[known], queries[known]
        if not len(queries):
            return
        found = importance.features(*x, positions).double()
        energies = [g.square().sum((1, 2)).double() / queries for g in gradients]
        # What the hot codes' error costs: it is a fraction of a vector, keys without their constant part.
        coded = [x[0] - x[0].mean(0), x[1]]
        parts = zip(self.errors, coded, gradients, strict=True)
        costs = [e * (t.square().sum(2) * g.square().sum(2)).sum(1).double() / queries for e, t, g in parts]
        energies = torch.stack([*energies, sum(costs)], 1)
        logs = energies.clamp_min(1e-30).maximum(energies.mean(0) * 1e-9).log2()
        if self.metrics is None:
            self.metrics = [g.new_zeros(2, *g.shape[1:], g.shape[2], dtype=torch.float64) for g in gradients]
            self.gram, self.cross = (found.new_zeros(found.shape[1], n) for n in (found.shape[1], logs.shape[1]))
        for halves, g, e in zip(self.metrics, gradients, energies[:, :2].T, strict=True):
            halves[self.windows % 2] += _second_moments(g, e)
        self.gram, self.cross = self.gram + found.T @ found, self.cross + found.T @ logs
        self.tokens, self.pairs = self.tokens + len(found), self.pairs + queries.sum().item()
        self.windows, self.visible = self.windows + 1, self.visible + visible

    def metric(self, side: int) -> torch.Tensor:
        """Twice what errors cost, nats a query, of tokens that are not refined: `[H, D, D]` fp64, positive definite."""
        second = self.metrics[side].cpu().sum(0) * (self.visible / self.windows / self.pairs)
        return second + (self.floor(side) * _mean(second))[..., None] * torch.eye(second.shape[-1], dtype=torch.float64)

    def floor(self, side: int) -> float:
        """What is added to the metric in all directions, of its mean over them: the more, the less windows agree.

        Chosen so that errors spread by one half's metric, as its inverse, cost least by the other's at the same rate;
        and a quarter of that, because all windows tell twice as much, and because at low rates less is at stake. At
        0.0048 nats from SmolLM2 (16,384 tokens; the texts of `bench quality`) that took 0.430 bits; a tenth 0.447,
        half 0.443; 0.02 for every layer and side 0.526, 0.12 0.495. At 0.0044 on held-back text of the fitted kinds: a
        quarter 0.395, a tenth 0.389, half 0.409, all of it 0.433.
        """
        if self.windows < 2:
            return UNKNOWN
        one, other = self.metrics[side].cpu()
        return FLOORS[(_costs(one, other) + _costs(other, one)).argmin()].item() / 4

    def importance(self, target: int) -> torch.Tensor:
        """Weights of `codec.importance.features` that give a token's level, before its threshold; `[F]` fp32.

        A ridge regression of the binary logarithm of a token's energy; a level is a factor of 4 in energy.

        Args:
            target: 0 for its keys' energy, 1 for its values', 2 for what its hot codes' error costs.
        """
        gram, cross = self.gram.cpu() / self.tokens, self.cross[:, target].cpu() / self.tokens
        mean = gram[:-1, -1]
        spread = (gram.diagonal()[:-1] - mean.square()).clamp_min(0).sqrt() + 1e-6
        covariance = (gram[:-1, :-1] - mean[:, None] * mean) / spread / spread[:, None]
        target = (cross[:-1] - mean * cross[-1]) / spread
        eye = torch.eye(len(mean), dtype=torch.float64)
        weights = torch.linalg.solve(covariance + RIDGE / self.tokens * eye, target) / spread
        return (GAIN / 2 * torch.cat([weights, -(weights @ mean)[None]])).float()


def _second_moments(gradients: torch.Tensor, energies: torch.Tensor) -> torch.Tensor:
    """Sums of `g g^T` of each head, `[n, H, D]` to `[H, D, D]` fp64, of tokens of energies `[n]`.

    What a token has more of than most is divided by its power `GAIN`.
    """
    most = energies.median().maximum(energies.mean() * 1e-9).clamp_min(1e-30)
    weights = (energies / most).clamp_min(1).pow(-GAIN / 2)
    scaled = gradients * weights.to(gradients.dtype)[:, None, None]
    return torch.einsum("nhi,nhj->hij", scaled, scaled).double()


def _mean(second: torch.Tensor) -> torch.Tensor:
    """Over components, `[H, D, D]` to `[H, 1]`; more than nothing."""
    return second.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).clamp_min(1e-20)


def _costs(fitted: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Logarithms of what errors cost by `other [H, D, D]`, at one rate spread by `fitted` and each of `FLOORS`."""
    values, vectors = torch.linalg.eigh(fitted)
    values = values.clamp_min(0) + FLOORS[:, None, None] * _mean(fitted)
    felt = torch.einsum("hij,hik,hkj->hj", vectors, other, vectors)
    return (felt / values).mean((1, 2)).clamp_min(1e-30).log() + values.log().mean((1, 2))
