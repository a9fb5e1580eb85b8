"""From a sample of keys and values, and what the output feels of them, to a sequence codec.

Layers are fitted in the order in which they are coded, each on the codec's own reconstruction of those before: a
predictor trained on anything else than what the decoder has amplifies errors. What a part is predicted from is what
saves bits on held-out pages: the rest costs time, memory and, with few tokens, bits.

Source: predictors by ridge regression, its strength and inputs chosen on held-out pages; the Karhunen–Loève transform
of the residual in the metric of `sensitivity.py`; reverse water-filling by one step for all coefficients.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from tqdm.auto import tqdm

from ..codec.importance import LEVELS, features, levels
from ..codec.sequence import SequenceCodec
from ..codec.sequence_part import (
    CLASSES,
    LADDER,
    LEVEL_CLASSES,
    SHARES,
    SHIFT_CLASS,
    SHIFTS,
    SIZES,
    Context,
    Part,
    PartCoder,
    best_shifts,
    dct,
    shifted,
    size_codes,
    sources,
)
from ..codec.symbol_tables import LIMIT, SymbolTables
from .layout import SIDES
from .regression import Regression
from .sensitivity import Sensitivity

COUNTED = 4  # one row in so many is counted: there are plenty
EMBEDDED = -1  # the name of the embeddings among inputs that are numbers of parts
# The step at which everything is fitted; at others sizes are measured. Predictors fitted to fine inputs suit coarse
# ones too; those fitted at step 0 cost fine ones 6 % more, when symbols stood for what they were on average.
FITTED = LADDER[0]
PRICE = 0.002  # bits a value that an input as wide as a part must save
FORECAST = 0.00064  # nats a token that step 0 would cost, were errors uniform and small, and no token above most


@dataclass(frozen=True)
class Ingredients:
    """What a sequence codec is made of; what is left out shows what it is worth.

    Args:
        prediction: Parts are predicted from others.
        chosen: From those that are worth it; without, from all.
        metric: Errors are measured by what the output feels; without, all keys and values alike.
        heads: The transform goes across the heads of a layer; without, each head has its own.
        tokens: A DCT goes along a page's tokens.
        importance: Tokens on which much depends are refined.
    """

    prediction: bool = True
    chosen: bool = True
    metric: bool = True
    heads: bool = True
    tokens: bool = True
    importance: bool = True


PROFILES = {"full": Ingredients(), "light": Ingredients(prediction=False)}


@dataclass
class Sample:
    """Tokens to fit to, whole pages.

    Args:
        keys, values: Of each layer, before RoPE, `[N, H, P, D]`, any float dtype.
        embedded: `[N, P, E]`.
        positions: In their sequence, `[N, P]`.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    embedded: torch.Tensor
    positions: torch.Tensor


class _Tally:
    """Counts of symbols by class."""

    def __init__(self) -> None:
        self.counts = torch.zeros(CLASSES, 2 * LIMIT + 1, dtype=torch.float64)
        self.beyond = torch.zeros(CLASSES, dtype=torch.float64)

    def add(self, uniform, x: torch.Tensor, which: torch.Tensor, bits: torch.Tensor | None = None) -> torch.Tensor:
        """Quantise `x [n, M]` and count some of it, with shifts by `bits` where given; returns what is rebuilt."""
        symbols, rebuilt = uniform.quantise(x, which)
        symbols, kinds = symbols[::COUNTED], uniform.classes.long()[which[::COUNTED]]
        if bits is not None:
            shifts = best_shifts(symbols, uniform.classes[0], bits)
            self._count(torch.full_like(shifts, SHIFT_CLASS), shifts)
            kinds = shifted(uniform.classes[0])[shifts + SHIFTS].long()
        sizes = symbols.abs().long()
        inside = sizes <= LIMIT
        self._count(kinds[inside], symbols[inside].long())
        self.beyond += torch.bincount(kinds[~inside], minlength=CLASSES)
        return rebuilt

    def _count(self, kinds: torch.Tensor, values: torch.Tensor) -> None:
        found = torch.bincount(kinds * (2 * LIMIT + 1) + values + LIMIT, minlength=self.counts.numel())
        self.counts += found.view_as(self.counts)

    def add_levels(self, share: int, found: torch.Tensor) -> None:
        self._count(torch.full_like(found, LEVEL_CLASSES + share), found)

    def tables(self) -> SymbolTables:
        return SymbolTables.fit(self.counts, self.beyond)


def _provisional() -> SymbolTables:
    """Tables of Laplacian coefficients, to choose shifts by until there are measured ones."""
    deviation = 2.0 ** ((torch.arange(CLASSES, dtype=torch.float64) % SIZES - SIZES // 3) / 4)
    rate = 2**0.5 / deviation[:, None]
    value = torch.arange(-LIMIT, LIMIT + 1).abs()
    counts = torch.where(value == 0, 1 - (-rate / 2).exp(), (-rate * value).exp() * (rate / 2).sinh())
    return SymbolTables.fit(1e4 * counts)


def fit_sequence(
    sample: Sample, sensitivities: list[Sensitivity], using: Ingredients = PROFILES["full"], progress: bool = True
) -> tuple[SequenceCodec, dict]:
    """Fit a codec, at step 0.

    Args:
        sensitivities: Of each layer.
        using: Without prediction pages decode faster and take more bytes; without any other they only take more.

    Returns:
        The codec, and a report: for every layer and side `left` (variance that prediction leaves, held out) and `floor`
        (see `Sensitivity.floor`), and `forecast`, nats a token that the errors of each step cost by the metric, were
        they small and apart.
    """
    values = sum(x.shape[1] * x.shape[3] for x in (*sample.keys, *sample.values))
    base = (24 * FORECAST / values) ** 0.5
    size, layers = sample.positions.shape[1], len(sample.keys)
    along = dct(size).clone() if using.tokens else torch.eye(size)
    tally, bits = _Tally(), _provisional().bits()
    parts: list[Part] = [None] * (2 * layers)
    measured: dict[tuple[int, int], tuple] = {}
    left: list[float] = []
    bar = tqdm(total=len(LADDER) * layers, desc="calibrate: sequence codec", unit="layer", disable=not progress)
    regression = Regression(len(sample.positions), size)
    forecast = dict.fromkeys(map(str, LADDER), 0.0)
    for step in LADDER:
        context = Context(sample.embedded.float() if using.prediction else None)
        if using.prediction and step == FITTED:
            regression.add(EMBEDDED, context.embedded)
        for index in range(2 * layers):
            layer, side = divmod(index, 2)
            if side == 0:
                x = [t[layer].float().transpose(1, 2).flatten(0, 1) for t in (sample.keys, sample.values)]
                found = features(*x, sample.positions.flatten())
            flat = x[side].flatten(1)
            if step == FITTED:
                blank = torch.zeros(len(LADDER), 1, flat.shape[1], dtype=torch.uint8)
                sizes = {"sizes": blank.expand(-1, size, -1), "refined": blank.expand(-1, LEVELS, -1)}
                factor = _factor(sensitivities[layer], side, using)
                names = [EMBEDDED, *sources(index)]
                chosen = [n for n in names if n is not None and using.prediction]
                if using.prediction and using.chosen:
                    cost = functools.partial(_rate, factor, base * 2.0 ** (FITTED / 4))
                    chosen = regression.choose(chosen, flat, cost, PRICE)
                predictor, bias, rest = regression.solve(chosen, flat)
                inputs = tuple(regression.width(n) if n in chosen else 0 for n in names)
                parts[index] = Part(bias, inputs, predictor, None, importance=None, share=0, **sizes)
                left.append(rest)
            predicted = context.predict(parts[index])
            residual = flat - predicted
            if step == FITTED:
                groups = 1 if using.heads else x[side].shape[1]
                weights = sensitivities[layer].importance(side) * using.importance
                parts[index] = _fit_transform(parts[index], residual, factor, groups, weights, found)
            chosen = levels(found, parts[index].importance)
            measured[index, step], z, found_z = _measure(parts[index], along, residual, chosen, step, base, bits, tally)
            forecast[str(step)] += ((z - found_z).square().sum() / len(z) / 2).item()
            decoded = found_z @ parts[index].synthesis + predicted
            context.add(decoded)
            if using.prediction and step == FITTED:
                regression.add(index, decoded)
                regression.keep([EMBEDDED, *(i for i in range(index - 4 + side, index + 1) if i >= 0)])
            bar.update(side)
    bar.close()
    done = []
    for index, part in enumerate(parts):
        sizes, refined = (torch.stack([measured[index, step][i] for step in LADDER]) for i in range(2))
        done.append(replace(part, sizes=sizes, refined=refined))
    floors = {side: [of.floor(i) for of in sensitivities] for i, side in enumerate(SIDES)}
    report = {"left": {"key": left[::2], "value": left[1::2]}, "floor": floors, "forecast": forecast}
    return SequenceCodec(done, along, tally.tables(), base, 0), report


def _factor(sensitivity: Sensitivity, side: int, using: Ingredients) -> torch.Tensor:
    """What errors times it are, `[W, W]` fp64, the output feels alike."""
    metric = sensitivity.metric(side)
    if not using.metric:
        metric = metric.diagonal(dim1=-2, dim2=-1).mean() * torch.eye(metric.shape[-1]).expand_as(metric).double()
    return torch.block_diag(*torch.linalg.cholesky(metric))


def _rate(factor: torch.Tensor, step: float, second: torch.Tensor) -> float:
    """Bits a value that a residual of second moments `[W, W]` takes: of a Gaussian's components, noise of a step."""
    felt = factor.T @ second.double() @ factor
    return (1 + 12 / step**2 * torch.linalg.eigvalsh(felt).clamp_min(0)).log2().mean().item() / 2


def _fit_transform(part: Part, residual, factor, groups: int, weights, found) -> Part:
    """The part with its transform, apart for so many groups of heads, and its importance by `weights` of features."""
    felt = residual @ factor.float()
    second = (felt.T @ felt / len(felt)).double()
    size = len(second) // groups
    _, basis = torch.linalg.eigh(second * torch.block_diag(*torch.ones(groups, size, size)))
    basis = basis.flip(-1)
    basis = basis * basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()  # the sign is arbitrary: fix it
    synthesis = torch.linalg.inv(factor @ basis).float().contiguous()
    weights[-1] -= (found @ weights).median()
    share = int((levels(found, weights) == 0).float().mean() * (SHARES - 1))
    return replace(part, synthesis=synthesis, importance=weights, share=share)


def _measure(part: Part, along, residual, found_levels, step: int, base: float, bits, tally: _Tally):
    """Code a part's residuals at a step: sizes met, `[P, W]` and `[LEVELS, W]` codes; transformed, and as decoded."""
    z = residual @ part.analysis
    coefficients = (along @ z.unflatten(0, (-1, len(along)))).flatten(1)
    codes = size_codes(coefficients.square().mean(0).sqrt(), base).unflatten(0, (len(along), -1))
    coder = PartCoder(_with_sizes(part, codes, part.refined[0]), along, step, base, bits)
    rows = torch.zeros(len(coefficients), dtype=torch.int64)
    rebuilt = coder.tokens(tally.add(coder.coarse, coefficients, rows, bits))
    error = z - rebuilt
    typical = error.square().mean(0).sqrt()
    finer = torch.stack([_typical(error[found_levels == v], typical) for v in range(1, LEVELS + 1)])
    refined = size_codes(finer, base)
    coder = PartCoder(_with_sizes(part, codes, refined), along, step, base, bits)
    chosen = found_levels.nonzero()[:, 0]
    rebuilt[chosen] += tally.add(coder.fine, error[chosen], found_levels[chosen] - 1)
    tally.add_levels(part.share, found_levels)
    return (codes, refined), z, rebuilt


def _typical(rows: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    """Standard deviation of each column, drawn towards `otherwise` where there are few rows."""
    prior = 16
    return ((rows.square().sum(0) + prior * otherwise.square()) / (len(rows) + prior)).sqrt()


def _with_sizes(part: Part, codes: torch.Tensor, refined: torch.Tensor) -> Part:
    """The part, of these sizes at every step."""
    same = [t[None].expand(len(LADDER), *t.shape) for t in (codes, refined)]
    return replace(part, sizes=same[0], refined=same[1])
