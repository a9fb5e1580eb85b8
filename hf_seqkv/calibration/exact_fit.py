"""From hot pages to the tables of the exact codec, for pages of their kind.

Layers are fitted in the order in which they are coded, each on what the codec has of those before: their pages, as
decoded. The embedding's weights are those of a sequence codec; what it predicts from is coarser, so all other weights
are fitted again, to what the embedding leaves.

Source: ridge regression (`regression.py`); the Cholesky factor of what is left of a head, which is the regression of
every component on those before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from tqdm.auto import tqdm

from ..codec.center import relative_table, rotate
from ..codec.exact_part import BLOCK, HEAVIEST, PER_DEVIATION, ExactPart, Transform, embedding_inputs
from ..codec.exact_payload import open_payloads
from ..codec.exact_predict import Nowhere, Side, expected_size, scale_steps, scale_values
from ..codec.exact_tables import ExactTables
from ..codec.page import QuantizedPageCodec
from ..codec.sequence_part import Part, sources
from ..codec.surroundings import Surroundings
from ..errors import ConfigError
from .regression import Regression
from .sequence_fit import Sample

RIDGE = 1e-3  # of earlier heads, of their mean energy
JITTER = 1e-4  # of what is left of a head, of its mean energy
LEAST = 1e-3  # of a component's deviation, in typical sizes


@dataclass(frozen=True)
class Predictors:
    """What codes are predicted from; what is left out shows what it is worth.

    Args:
        layers: The keys and values of the two layers below.
        keys: A layer's keys, for its values.
        embedding: The token's embedding.
        heads: What was missed of earlier heads.
        components: What was missed of earlier components of the head.
        adapts: Deviations and means follow what was coded.
    """

    layers: bool = True
    keys: bool = True
    embedding: bool = True
    heads: bool = True
    components: bool = True
    adapts: bool = True


def fit_exact(
    pages: Sequence[QuantizedPageCodec],
    payloads: Sequence[torch.Tensor],
    around: Surroundings,
    parts: Sequence[Part] | None,
    using: Predictors = Predictors(),
    progress: bool = True,
) -> ExactTables:
    """Fit tables.

    Args:
        pages: Codec of each layer.
        payloads: Pages of each layer, `[N, page_bytes]` uint8.
        around: What they are predicted from; as `ExactCodec.encode` has it.
        parts: Of a sequence codec that predicts; None only without `using.embedding`.

    Raises:
        ConfigError: The embedding is to be used, and there are no parts.
    """
    if using.embedding and parts is None:
        raise ConfigError("the exact codec predicts from embeddings by a sequence codec's weights; give one of 'full'")
    embeds = using.embedding and any(part.inputs[0] for part in parts)
    embedded = embedding_inputs(around.embedded.float().flatten(0, 1).cpu().numpy()) if embeds else None
    regression = Regression(len(payloads[0]), pages[0].page_size)
    made: list[ExactPart] = []
    given: dict[int, np.ndarray] = {}  # inputs of earlier parts
    layers = tqdm(list(enumerate(pages)), desc="fit: exact codec", unit="layer", disable=not progress)
    for layer, page in layers:
        numbers, place = open_payloads(page, payloads[layer].cpu()), around.place(layer)
        for i, codec in enumerate((page.key.to("cpu"), page.value.to("cpu"))):
            index = 2 * layer + i
            names = [n for n in sources(index) if n is not None]
            used = [n for n in names if (using.keys if n // 2 == layer else using.layers)]
            weights = parts[index].embedding if embeds and parts[index].inputs[0] else None
            fit = _PartFit(codec, *numbers[2 * i : 2 * i + 2], place if i == 0 else Nowhere(), weights, embedded)
            fit.predict(regression, names, used, [given[n] for n in names])
            fit.sharpen(using.heads, using.components)
            made.append(fit.part)
            given[index] = fit.side.learn(fit.raw)
            regression.add(index, torch.from_numpy(given[index] / PER_DEVIATION))
            kept = [n for n in range(index - 4 + i, index + 1) if n >= 0]
            regression.keep(kept)
            given = {n: given[n] for n in kept}
    return ExactTables(made, embeds, using.adapts)


def sampled_pages(
    pages: Sequence[QuantizedPageCodec],
    sample: Sample,
    rows: Sequence[torch.Tensor],
    interleaved: Sequence[bool],
) -> tuple[list[torch.Tensor], Surroundings]:
    """What `fit_exact` takes, as a cache makes it of the windows of a sample.

    Args:
        rows: Of each layer, cosines and sines of the pages of a window, `[n, P, 2 * half]`; the sample is of windows
            that stand in the same places.
        interleaved: How RoPE pairs components, by layer.
    """
    count, window = len(sample.positions), len(rows[0])
    firsts = torch.arange(count) // window * window
    payloads, starts, means = [], [], []
    for layer, page in enumerate(pages):
        plain, turned = sample.keys[layer].float(), rows[layer].float().repeat(count // window, 1, 1)
        means.append(plain.mean(2)[firsts])
        starts.append(turned[:, 0])
        keys = rotate(plain - means[-1][:, :, None], turned[:, None], interleaved[layer])
        payloads.append(page.encode(keys, sample.values[layer].float()))
    relative = [relative_table(x[0].float()) for x in rows]
    return payloads, Surroundings(sample.embedded, starts, relative, list(interleaved), means)


class _PartFit:
    """The tables of one part, as far as they are known."""

    def __init__(self, codec, codes: np.ndarray, scales: np.ndarray, where, embedding: torch.Tensor | None, embedded):
        self.codec, self.codes, self.where = codec, codes, where
        self.embedding, self.embedded = embedding, embedded
        self.scales = scale_values(codec.scale_bits == 16)[scales]  # [N, H, P]
        heads, dim = codec.heads, codec.dim
        width = heads * dim
        x = codec.decode(torch.from_numpy(codes), torch.from_numpy(self.scales))
        sizes = [torch.from_numpy(self.scales).square().mean((0, 2)), x.square().mean((0, 2, 3))]
        units = torch.stack([size.float() for size in sizes]).sqrt().clamp_min(1e-6)
        transform = Transform(codec, units)
        self.raw = np.concatenate(
            [where.to_plain(transform.decode(h, codes[:, h], self.scales[:, h]), h) for h in range(heads)], 1
        )
        blank, ones = torch.zeros(width), torch.ones(width)
        self.part = ExactPart(
            center=torch.from_numpy(self.raw.mean(0)).float(),
            step=_steps(self.raw),
            weights=torch.zeros(0, width, dtype=torch.int16),
            gain=ones,
            bias=blank,
            spread=ones,
            cross=torch.zeros(width, width, dtype=torch.int16),
            cross_gain=ones,
            chain=torch.zeros(heads, dim, dim, dtype=torch.int16),
            deviation=torch.ones(heads, dim),
            units=units,
            scale=torch.ones(heads, 3),
        )

    def predict(self, regression: Regression, names: list[int], used: list[int], given: list[np.ndarray]) -> None:
        """Weights of the inputs `names`, zeros for those not `used`."""
        left = torch.from_numpy(self.raw).float()
        base = np.zeros((0, left.shape[1]))
        if self.embedding is not None:
            base = self.embedding.double().numpy() / PER_DEVIATION
            left = left - torch.from_numpy(self.embedded) @ torch.from_numpy(base).float()
        found, bias, _ = regression.solve(used, left)
        blocks = iter(found.split([given[names.index(n)].shape[1] for n in used]))
        rest = [
            next(blocks) if n in used else torch.zeros(x.shape[1], left.shape[1])
            for n, x in zip(names, given, strict=True)
        ]
        rest = torch.cat([torch.zeros(0, left.shape[1]), *rest]).double().numpy() / PER_DEVIATION
        gain = _gain(np.concatenate([base, rest]))
        self._set(weights=_whole(rest / gain), gain=torch.from_numpy(gain).float(), bias=bias.float())
        self.predicted = self.side.predict(self.embedded, given, len(self.raw))

    def sharpen(self, heads: bool, components: bool) -> None:
        """What earlier heads and components tell, and what is left then."""
        dim, left = self.codec.dim, self.raw - self.predicted
        spread = _steps(left)
        cross = np.zeros((left.shape[1],) * 2)
        if heads:
            scaled = left / spread.numpy()
            for head in range(1, self.codec.heads):
                span, before = slice(head * dim, (head + 1) * dim), slice(head * dim)
                gram = scaled[:, before].T @ scaled[:, before]
                gram += RIDGE * gram.diagonal().mean() * np.eye(len(gram))
                cross[before, span] = np.linalg.solve(gram, scaled[:, before].T @ left[:, span])
        gain = _gain(cross)
        self._set(spread=spread, cross=_whole(cross / gain), cross_gain=torch.from_numpy(gain).float())
        missed = np.zeros(left.shape, np.float32)
        chains, deviations, scales = [], [], []
        for head in range(self.codec.heads):
            span = slice(head * dim, (head + 1) * dim)
            self.side.sharpen(self.predicted, head, missed)
            missed[:, span] = self.side.miss(self.raw[:, span], self.predicted[:, span], head)
            found = self._head(head, self.predicted[:, span], components)
            for group, x in zip((chains, deviations, scales), found, strict=True):
                group.append(x)
        self._set(chain=torch.stack(chains), deviation=torch.stack(deviations), scale=torch.stack(scales))

    def _head(self, head: int, predicted: np.ndarray, components: bool) -> tuple[torch.Tensor, ...]:
        """Chain, deviations and scale of a head."""
        unit = float(self.part.units[0, head])
        values = self.scales[:, head].reshape(-1)
        expected = self.side.transform.encode(head, self.where.to_cache(predicted, head))
        levels = self.side.transform.levels
        table = levels[head if len(levels) > 1 else 0][self.side.widths[head]]
        coded = table[np.arange(self.codec.dim)[:, None], self.codes[:, head].astype(np.int64)]
        y = coded.transpose(0, 2, 1).reshape(len(values), -1) * values[:, None]
        left = (y - expected)[values > 0]
        second = left.T @ left / max(1, len(left))
        second += (JITTER * second.diagonal().mean() + 1e-12) * np.eye(len(second))
        factor = np.linalg.cholesky(second)
        chain = np.eye(len(second)) - factor.diagonal()[:, None] * np.linalg.inv(factor)  # [later, earlier]
        chain = np.tril(chain, -1) * components
        deviation = np.maximum((left - left @ chain.T).std(0), LEAST * unit)
        moved = 4096 * chain.T * deviation[:, None] / deviation
        energy = (left * left).mean()
        steps = scale_steps(values[values > 0], self.side.wide)
        over = (steps - scale_steps(expected_size(expected, unit, energy), self.side.wide)[values > 0]) / 16
        scale = torch.tensor([energy, over.mean(), max(over.std(), 0.5)], dtype=torch.float32)
        return _whole(moved), torch.from_numpy(deviation).float(), scale

    def _set(self, **fields) -> None:
        self.part = replace(self.part, **fields)
        self.side = Side(self.codec, self.part, self.embedding, "sample")


def _steps(x: np.ndarray) -> torch.Tensor:
    deviation = x.std(0)
    return torch.from_numpy(np.maximum(deviation, 1e-3 * deviation.mean() + 1e-12) / PER_DEVIATION).float()


def _gain(weights: np.ndarray) -> np.ndarray:
    """The least gain of each column of `[F, W]` with which blocks of whole weights are not too heavy, as fp32."""
    sums = [abs(weights[at : at + BLOCK]).sum(0) for at in range(0, len(weights), BLOCK)]
    heaviest = np.max([np.zeros(weights.shape[1]), *sums], axis=0)
    return np.maximum(heaviest / (HEAVIEST - BLOCK), 1e-12).astype(np.float32).astype(np.float64)


def _whole(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.clip(np.rint(x), -32767, 32767).astype(np.int16))
