"""What the exact codec knows of one side, keys or values, of one layer, and the arithmetic of its predictions.

The arithmetic gives the same numbers on every machine: operations on single numbers are IEEE's, correctly rounded;
sums are of products of integers only, below `2**24` in float32 or `2**53` in float64, where no order of summation and
no fused instruction rounds. NumPy's products are used because no setting makes them less exact.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import FormatError
from .vector import VectorCodec

LARGEST = 1023.0  # of an input, an integer
PER_DEVIATION = 32  # steps of an input in its standard deviation
BLOCK = 512  # inputs that are summed in float32
HEAVIEST = 1 << 14  # sum of the sizes of a block's weights: LARGEST * HEAVIEST < 2**24
LEAST = 0.125  # of a scale's deviation
_PRECISION, _WIDE = 4096.0, float(1 << 22)  # of what a transform is applied to: parts of its unit, and the largest


@dataclass(frozen=True)
class ExactPart:
    """Tables of one side of one layer of `H` heads, `W = H * D`, fp32 where nothing else is said.

    Args:
        center, step: As an input, a component `x` is the integer nearest to `(x - center) / step`; `[W]`.
        weights: Of the inputs but the embedding, in the order of `Context.inputs`, `[F, W]` int16.
        gain, bias: What a unit of the weighted sum adds to a prediction, and what it starts from; `[W]`.
        spread: Step of what is left of a component as an input of later heads, `[W]`.
        cross, cross_gain: Weights of the earlier heads' inputs, `[W, W]` int16, and their gain, `[W]`.
        chain: By how much, in 4096ths, a component moves a later one of its head, `[H, D, D]` int16.
        deviation: Of the components in the domain of codes, times their scale, once all is predicted; `[H, D]`.
        units: Typical sizes of components there, and in the cache, `[2, H]`.
        scale: Of each head, the energy in the domain of codes that is not predicted, by how many steps scales exceed
            what is expected from the energy, and their deviation from that; `[H, 3]`.
    """

    center: torch.Tensor
    step: torch.Tensor
    weights: torch.Tensor
    gain: torch.Tensor
    bias: torch.Tensor
    spread: torch.Tensor
    cross: torch.Tensor
    cross_gain: torch.Tensor
    chain: torch.Tensor
    deviation: torch.Tensor
    units: torch.Tensor
    scale: torch.Tensor

    def check(self, name: str, heads: int, dim: int, inputs: int) -> None:
        """Refuse what would not fit the codec's arithmetic.

        Args:
            name: For messages.
            inputs: Components of `Context.inputs` but the embedding.

        Raises:
            FormatError: A tensor's shape, dtype or range is not as documented.
        """
        width = heads * dim
        shapes = dict.fromkeys(("center", "step", "gain", "bias", "spread", "cross_gain"), (width,))
        shapes |= {"weights": (inputs, width), "cross": (width, width), "chain": (heads, dim, dim)}
        shapes |= {"deviation": (heads, dim), "units": (2, heads), "scale": (heads, 3)}
        for field, shape in shapes.items():
            tensor = getattr(self, field)
            dtype = torch.int16 if field in ("weights", "cross", "chain") else torch.float32
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise FormatError(f"exact tables: {name}.{field} is {tensor.dtype} {list(tensor.shape)}, must be "
                                  f"{dtype} {list(shape)}; fit them again")  # fmt: skip
        for field in ("step", "gain", "spread", "cross_gain", "deviation", "units"):
            if not (getattr(self, field) > 0).all() or not torch.isfinite(getattr(self, field)).all():
                raise FormatError(f"exact tables: {name}.{field} is not positive throughout; fit them again")
        if not all(torch.isfinite(x).all() for x in (self.center, self.bias, self.scale)):
            raise FormatError(f"exact tables: {name} has a center, bias or scale that is not finite; fit them again")
        energy, _, deviation = self.scale.unbind(1)
        if (energy < 0).any() or (deviation < LEAST).any():
            raise FormatError(
                f"exact tables: {name}.scale has energies from {energy.min():g} and deviations from "
                f"{deviation.min():g}, must be from 0 and {LEAST}; fit them again"
            )
        check_weights(self.cross, f"{name}.cross")

    def tensors(self) -> dict[str, torch.Tensor]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def check_weights(weights, name: str) -> None:
    """Refuse weights `[F, W]`, integers, of which a block could sum to more than float32 holds.

    Raises:
        FormatError: They are so large.
    """
    blocks = [abs(np.asarray(x, np.int64)).sum(0).max(initial=0) for x in _blocks(np.asarray(weights))]
    if blocks and max(blocks) > HEAVIEST:
        raise FormatError(
            f"exact tables: weights of {name} sum to {max(blocks)}, must be {HEAVIEST} at most; fit again"
        )


def _blocks(x: np.ndarray) -> list[np.ndarray]:
    return [x[at : at + BLOCK] for at in range(0, len(x), BLOCK)]


def product(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Exact `x @ weights` of inputs `[n, F]` and weights `[F, W]`, integers in float32, as float64."""
    found = np.zeros((len(x), weights.shape[1]))
    for at, block in enumerate(_blocks(weights)):
        found += matmul(x[:, at * BLOCK : at * BLOCK + len(block)], block)
    return found


def matmul(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """`x @ y` in their dtype at least, by torch: with as many threads as torch has where it is called."""
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    if x.dtype == torch.float32 and not _whole_float32():
        x, y = x.double(), y.double()
    return (x @ y).numpy()


def _whole_float32() -> bool:
    """Whether products of float32 are not allowed to be made of narrower ones."""
    rule = getattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision", None)
    return torch.get_float32_matmul_precision() == "highest" if rule is None else rule in ("none", "ieee")


def inputs(x: np.ndarray, center, step) -> np.ndarray:
    """Components `[n, W]` float64 as inputs, integers in float32."""
    found = x - center
    found /= step
    np.rint(found, out=found)
    return np.clip(found, -LARGEST, LARGEST, out=found).astype(np.float32)


def embedding_inputs(rows: np.ndarray) -> np.ndarray:
    """Embeddings `[n, E]` fp32 as inputs: of length `sqrt(E)`, in steps of `1 / PER_DEVIATION`."""
    _, exponents = np.frexp(abs(rows).max(1, initial=0, keepdims=True))
    whole = np.rint(np.ldexp(rows.astype(np.float64), 15 - exponents))
    power = (whole * whole).sum(1, keepdims=True) / rows.shape[1]  # a sum of integers
    return inputs(whole, 0.0, np.sqrt(np.maximum(power, 1.0)) / PER_DEVIATION)


def turn(x: np.ndarray, rows: tuple[np.ndarray, np.ndarray], interleaved: bool, inverse: bool) -> np.ndarray:
    """`center.rotate` of `x [n, D]` float64 by cosines and sines `[n, half]`."""
    cos, sin = rows
    half = cos.shape[1]
    if not half:
        return x
    if inverse:
        power = np.maximum(cos * cos + sin * sin, 1e-30)
        cos, sin = cos / power, -sin / power
    first, second = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(half), slice(half, 2 * half))
    )
    a, b = x[:, first], x[:, second]
    found = x.copy()
    found[:, first], found[:, second] = a * cos - b * sin, b * cos + a * sin
    return found


def turns(starts: torch.Tensor, relative: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of tokens, `[N * P, half]` float64, as `center.expand_rows` has them."""
    half = relative.shape[-1] // 2
    start, step = starts.double().cpu().numpy()[:, None], relative.double().cpu().numpy()
    cos, sin, rc, rs = start[..., :half], start[..., half:], step[:, :half], step[:, half:]
    shape = (len(start) * len(step), half)
    return (cos * rc - sin * rs).reshape(shape), (sin * rc + cos * rs).reshape(shape)


class Transform:
    """The matrices of a `VectorCodec`, in integers.

    Args:
        units: As in `ExactPart`.
    """

    def __init__(self, codec: VectorCodec, units: torch.Tensor):
        self.units = units.double().numpy()
        self.matrices = [_integers(x.cpu().numpy()) for x in (codec.decode_matrix, codec.encode_matrix)]
        self.levels = codec.levels.double().cpu().numpy()
        self.widths = codec.widths.cpu().numpy().astype(np.int64)

    def _apply(self, x: np.ndarray, which: int, head: int) -> np.ndarray:
        unit = self.units[which, head] / _PRECISION
        matrix, scales = (t[head] for t in self.matrices[which])
        return matmul(np.clip(np.rint(x / unit), -_WIDE, _WIDE), matrix) * (scales * unit)

    def decode(self, head: int, codes: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Codes `[N, D, P]`, with what their scales stand for, `[N, P]`, to components `[N * P, D]` float64."""
        levels = self.levels[head if len(self.levels) > 1 else 0][self.widths[head]]  # [D, 256]
        found = levels[np.arange(codes.shape[1])[:, None], codes.astype(np.int64)] * values[:, None]
        return self._apply(found.transpose(0, 2, 1).reshape(-1, codes.shape[1]), 0, head)

    def encode(self, head: int, x: np.ndarray) -> np.ndarray:
        """Components `[n, D]` to the domain of codes."""
        return self._apply(x, 1, head)


def _integers(matrices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Matrices `[H, D, D]` in integers of 20 bits, and powers of two that scale their columns, `[H, D]`."""
    _, exponents = np.frexp(abs(matrices).max(1))
    whole = np.rint(np.ldexp(matrices.astype(np.float64), 20 - exponents[:, None]))
    return whole, np.ldexp(1.0, exponents - 20)
