"""Ridge regression of many targets on inputs that they share, its strength chosen on held-out tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

RIDGES = (1e-4, 1e-3, 1e-2)  # of each input's own energy
HELD_OUT = 8  # one page in so many, the last, chooses among them


class Regression:
    """Ridge regression of parts on what they are predicted from: inputs are added once, their products shared.

    The last pages are held out to choose the ridge.
    """

    def __init__(self, pages: int, size: int):
        self.split = (pages - max(1, pages // HELD_OUT)) * size
        self.means: dict[int, torch.Tensor] = {}
        self.blocks: dict[int, torch.Tensor] = {}
        self.products: dict[tuple[int, int], list[torch.Tensor]] = {}

    def add(self, name: int, x: torch.Tensor) -> None:
        """An input, `[n, F]`."""
        self.means[name] = x.mean(0)
        self.blocks[name] = x - self.means[name]
        for other in self.blocks:
            self.products[other, name] = self._product(self.blocks[other], self.blocks[name])
            self.products[name, other] = [x.T for x in self.products[other, name]]

    def keep(self, names: list[int]) -> None:
        """Forget all other inputs."""
        self.blocks = {name: self.blocks[name] for name in names}
        self.products = {pair: x for pair, x in self.products.items() if {*pair} <= {*names}}

    def _product(self, a: torch.Tensor, b: torch.Tensor) -> list[torch.Tensor]:
        """Of the fitted tokens, and of those held out."""
        return [a[: self.split].T @ b[: self.split], a[self.split :].T @ b[self.split :]]

    def width(self, name: int) -> int:
        """Components of an input."""
        return len(self.means[name])

    def choose(
        self, names: Sequence[int], target: torch.Tensor, cost: Callable[[torch.Tensor], float], price: float
    ) -> list[int]:
        """Those of the inputs that are worth their price; what predicts little also errs, for want of samples.

        Inputs are left out one by one, in the order of their names, where the cost of what is left of the held-out
        tokens' targets grows by less than the price.

        Args:
            target: `[n, W]`.
            cost: Of second moments `[W, W]`.
            price: Of `W` components.
        """
        target = target - target.mean(0)
        energy = target[self.split :].T @ target[self.split :]
        crosses = {name: self._product(self.blocks[name], target) for name in names}

        def spent(some: list[int]) -> float:
            left = energy
            if some:
                fitted, held = self._grams(some)
                cross, other = (torch.cat([crosses[name][i] for name in some]) for i in range(2))
                weights = _ridge(fitted, cross, RIDGES[1])
                moved = weights.T @ other
                left = energy - moved - moved.T + weights.T @ held @ weights
            return cost(left / (len(target) - self.split))

        kept, least = list(names), spent(list(names))
        for name in sorted(names):
            rest = [n for n in kept if n != name]
            found = spent(rest)
            if found < least + price * self.width(name) / target.shape[1]:
                kept, least = rest, found
        return kept

    def solve(self, names: list[int], target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Predictor `[F, W]` from inputs in order, bias `[W]`, and the part of the target's variance left, held out."""
        mean = target.mean(0)
        if not names:
            return target.new_zeros(0, target.shape[1]), mean, 1.0
        target = target - mean
        grams = self._grams(names)
        crosses = [torch.cat(x) for x in zip(*(self._product(self.blocks[a], target) for a in names), strict=True)]
        energy = target[self.split :].square().sum()

        def left(weights):  # of the held-out tokens: |y - x w|^2
            return energy + (weights * (grams[1] @ weights - 2 * crosses[1])).sum()

        best, ridge = min((left(_ridge(grams[0], crosses[0], ridge)).item(), ridge) for ridge in RIDGES)
        weights = _ridge(sum(grams), sum(crosses), ridge)
        bias = mean - torch.cat([self.means[name] for name in names]) @ weights
        return weights, bias, best / max(energy.item(), 1e-30)

    def _grams(self, names: list[int]) -> list[torch.Tensor]:
        """Products of inputs with each other, `[F, F]`: of the fitted tokens, and of those held out."""
        return [torch.cat([torch.cat([self.products[a, b][i] for b in names], 1) for a in names]) for i in range(2)]


def _ridge(gram: torch.Tensor, cross: torch.Tensor, ridge: float) -> torch.Tensor:
    energy = gram.diagonal()
    matrix = gram.double() + torch.diag(ridge * (energy + energy.mean()).double() + 1e-12)
    return torch.cholesky_solve(cross.double(), torch.linalg.cholesky(matrix)).float()
