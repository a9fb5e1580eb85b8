"""Parts: what predicts, transforms and quantises one side, keys or values, of one layer in the sequence codec.

See `sequence.py` for the order of things.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from .importance import LEVELS
from .sequence_quiet import add_active, add_rows, are_active, flag_kinds, loud_count
from .symbol_tables import code_lengths
from .uniform import UniformQuantizer

LADDER = (-6, 0, 6)  # quarter octaves; steps at which sizes were measured
SIZES = 72  # classes of expected size: quarter octaves from 2**-6 to 2**12 steps
REFINED, LEVEL_CLASSES = SIZES, 2 * SIZES  # first class of refinements, and of levels
SHARES = 9  # classes of levels: eighths of the tokens that are not refined
SHIFT_CLASS = LEVEL_CLASSES + SHARES
CLASSES = SHIFT_CLASS + 1
INPUTS = 6  # that a part may be predicted from; see `Context.inputs`
NOTHING = (None, None)
SHIFTS = 3  # a page moves the classes of a part up or down by so many shifts at most,
SHIFT = 2  # of so many quarter octaves each
_MIDDLE = 128  # size code of a standard deviation of one base step


@dataclass(frozen=True)
class Part:
    """What codes one side of one layer, of width `W = H * D`; all fp32 but the codes.

    Args:
        bias: `[W]`.
        inputs: How many components of each of `Context.inputs` predict it: all, or 0.
        predictor: `[sum(inputs), W]`.
        synthesis: Rows are what one unit of each coefficient adds, `[W, W]`.
        sizes: Expected size of each coefficient at each step of the ladder, `[3, P, W]` uint8; see `size_codes`.
        refined: The same of refinements by level, `[3, LEVELS, W]` uint8.
        importance: Weights of `importance.features`, in levels, `[H * Dk + 4 * H + 3]`.
        share: Eighths of the tokens that are not refined, 0 to 8.
    """

    bias: torch.Tensor
    inputs: tuple[int, ...]
    predictor: torch.Tensor
    synthesis: torch.Tensor
    sizes: torch.Tensor
    refined: torch.Tensor
    importance: torch.Tensor
    share: int

    @property
    def embedding(self) -> torch.Tensor:
        """Rows of the predictor for the tokens' embeddings, none where they do not predict it."""
        return self.predictor[: self.inputs[0]]

    @functools.cached_property
    def weights(self) -> tuple[torch.Tensor, ...]:
        """The predictor in fp32, by input."""
        return self.predictor.float().split(self.inputs)

    @functools.cached_property
    def analysis(self) -> torch.Tensor:
        """Inverse of `synthesis`; only encoding needs it."""
        return torch.linalg.inv(self.synthesis.double()).float()


def size_codes(deviation: torch.Tensor, base: float) -> torch.Tensor:
    """Standard deviations to quarter octaves around the base step, uint8; 128 is one step."""
    octaves = torch.log2(deviation.double().clamp_min(1e-30) / base)
    return (4 * octaves + _MIDDLE).round().clamp(0, 255).to(torch.uint8)


def classes_at(codes: torch.Tensor, step: int, level: int = 0) -> torch.Tensor:
    """Classes of expected size at a step, from codes at the ladder's: `[3, ...]` uint8 to `[...]` int64, integers only.

    Args:
        level: Halvings of the step that what is coded is then quantised by.

    Source: linear interpolation and extrapolation in the logarithms.
    """
    low, middle, high = codes.long()
    first, second, left, right = (low, middle, *LADDER[:2]) if step < LADDER[1] else (middle, high, *LADDER[1:])
    at = first + torch.div((second - first) * (step - left), right - left, rounding_mode="floor")
    return (at - _MIDDLE - step + 4 * level + SIZES // 3).clamp(0, SIZES - 1)


def shifted(classes: torch.Tensor) -> torch.Tensor:
    """Classes of size `[M]` uint8 of a part at every shift, `-SHIFTS` to `SHIFTS`: `[2 * SHIFTS + 1, M]` uint8."""
    moved = SHIFT * torch.arange(-SHIFTS, SHIFTS + 1)[:, None]
    return (classes.long() + moved).clamp(0, SIZES - 1).to(torch.uint8)


_MOVES = shifted(torch.arange(SIZES, dtype=torch.uint8))


def best_shifts(symbols: torch.Tensor, classes: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Shifts with which a part's symbols `[N, M]`, of classes `[M]`, take the fewest bits: `[N]` int64."""
    return code_lengths(symbols, classes, _MOVES, bits).argmin(1) - SHIFTS


@functools.cache
def dct(size: int) -> torch.Tensor:
    """Orthonormal DCT-II, `[size, size]` fp32, rows are frequencies."""
    k = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (k + 0.5) * k[:, None]) * (2 / size) ** 0.5
    matrix[0] /= 2**0.5
    return matrix.float()


def sources(index: int) -> list[int | None]:
    """Numbers of the parts among `Context.inputs`, which follow the embeddings; None for those that are not there."""
    first = index - index % 2
    found = [first - 2, first - 1, first - 4, first - 3, first if index % 2 else -1]
    return [n if n >= 0 else None for n in found]


class Context:
    """What parts are predicted from: decoded parts of the two layers before, and the tokens' embeddings.

    Args:
        embedded: `[N, P, E]` fp32, or None where they predict nothing.
    """

    def __init__(self, embedded: torch.Tensor | None):
        self.embedded = None if embedded is None else embedded.flatten(0, 1)
        self.layers: list[list[torch.Tensor]] = []  # the last two, latest first
        self.current: list[torch.Tensor] = []

    def inputs(self) -> list[torch.Tensor | None]:
        """For the next part: embeddings, keys and values of the layer before, of the one before that, own keys."""
        before = [*self.layers, NOTHING, NOTHING][:2]
        return [self.embedded, *before[0], *before[1], *(self.current or [None])]

    def predict(self, part: Part) -> torch.Tensor:
        """`[N * P, W]`, or `[W]` where it is the same for all."""
        used = [pair for pair in zip(self.inputs(), part.weights, strict=True) if len(pair[1])]
        if not used:
            return part.bias
        found = torch.addmm(part.bias, *used[0])
        for x, weights in used[1:]:
            found.addmm_(x, weights)
        return found

    def add(self, decoded: torch.Tensor) -> None:
        """Take a decoded part, `[N * P, W]`; keys and values alternate."""
        self.current.append(decoded)
        if len(self.current) == 2:
            self.layers, self.current = [self.current, *self.layers][:2], []


class PartCoder:
    """A part at a step; arguments as `SequenceCodec` has them, `bits` of its tables.

    Attributes:
        loud: How many components come before the quiet ones (`sequence_quiet.py`).
        flags: Kinds of the flags of these, `[d]`.
        kinds: Classes of the others' symbols at every shift, `[S, P * loud]`.
        quiet_kinds: Of the quiet ones' symbols, if active, `[S, d, P]`.
    """

    def __init__(self, part: Part, along: torch.Tensor, step: int, base: float, bits: torch.Tensor):
        self.part, self.along = part, along
        self._scale = base * 2.0 ** (step / 4)
        self._classes = classes_at(part.sizes, step).to(torch.uint8)
        flags = flag_kinds(self._classes, bits)
        self.loud = loud_count(flags)
        self.flags = flags[self.loud :]
        size, count = len(along), len(self.flags)
        self._main = self._uniform(self._classes[:, : self.loud])
        by_component = torch.arange(size * count).view(size, count).T.reshape(1, -1)
        self._quiet = self._uniform(self._classes[:, self.loud :], by_component)
        self.kinds = shifted(self._main.classes[0])
        self.quiet_kinds = shifted(self._quiet.classes[0]).unflatten(1, (count, size))
        levels = torch.arange(1, LEVELS + 1)
        finer = torch.stack([classes_at(x, step, v) for v, x in enumerate(part.refined.unbind(1), 1)])
        steps = self._scale * 2.0 ** -levels.double()
        self.fine = UniformQuantizer((finer + REFINED).to(torch.uint8), steps)

    def _uniform(self, classes: torch.Tensor, order: torch.Tensor | None = None) -> UniformQuantizer:
        return UniformQuantizer(classes.flatten()[None], torch.tensor([self._scale]), order)

    @functools.cached_property
    def coarse(self) -> UniformQuantizer:
        """The quantiser of all coefficients alike, as fitting has it."""
        return self._uniform(self._classes)

    def encode(self, x: torch.Tensor, predicted: torch.Tensor, levels: torch.Tensor, out: torch.Tensor):
        """Code keys or values `[N * P, W]` of tokens with levels `[N * P]`; as decoded they go into `out`.

        Returns:
            Symbols of coefficients `[N, P * loud]`, of quiet ones `[N, d, P]`, and of refinements `[n, W]`.
        """
        z = (x - predicted) @ self.part.analysis
        first = torch.zeros(len(z) // len(self.along), dtype=torch.int64)
        pages = z.unflatten(0, (len(first), -1)).split([self.loud, len(self.flags)], 2)
        loud, found = self._main.quantise(self._across(self.along, pages[0]), first)
        quiet, beside = self._quiet.quantise(self._across(self.along, pages[1]), first)
        quiet, found, refined = quiet.unflatten(1, (-1, len(self.along))), self.tokens(found), levels.nonzero()[:, 0]
        chosen, others = are_active(quiet), torch.zeros(pages[1].shape)
        values = beside.view(others.shape).transpose(1, 2)[chosen]
        others.transpose(1, 2)[chosen] = values @ self.along
        near = torch.cat([x.index_select(0, refined) for x in (found, others.flatten(0, 1))], 1)
        finer, refinements = self.fine.quantise(z.index_select(0, refined) - near, levels[refined] - 1)
        self._build(found, (*chosen.nonzero().unbind(1), quiet[chosen]), refined, refinements, predicted, out)
        return loud, quiet, finer

    def decode(self, symbols: torch.Tensor, active, finer: torch.Tensor, levels, predicted, out: torch.Tensor) -> None:
        """Inverse of `encode`: its symbols, of tokens with those levels, to keys or values `[N * P, W]` in `out`.

        Args:
            active: Those of the quiet ones that are active; see `sequence_quiet.add_active`.
        """
        first = torch.zeros(len(symbols), dtype=torch.int64)
        found, refined = self.tokens(self._main.dequantise(symbols, first)), levels.nonzero()[:, 0]
        refinements = self.fine.dequantise(finer, levels[refined] - 1)
        self._build(found, active, refined, refinements, predicted, out)

    def _build(self, found, active, refined, refinements, predicted, out) -> None:
        """Keys or values of loud components `[N * P, loud]`, active ones and refinements of tokens `refined`."""
        synthesis, loud = self.part.synthesis, self.loud
        torch.addmm(predicted, found.index_add_(0, refined, refinements[:, :loud]), synthesis[:loud], out=out)
        add_active(active, self._scale, self.along, synthesis, loud, out)
        add_rows(refined, refinements, loud, synthesis, out)

    def tokens(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Coefficients `[N, P * c]` to what they stand for, `[N * P, c]`."""
        shape = len(coefficients), len(self.along), coefficients.shape[1] // len(self.along)
        return self._across(self.along.T, coefficients.view(shape)).view(shape[0] * shape[1], shape[2])

    def _across(self, matrix: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
        """A product with each page's tokens `[N, P, c]`, `[N, P * c]`; `@` would go through the transposes of all."""
        return torch.bmm(matrix.expand(len(pages), *matrix.shape), pages).flatten(1)
