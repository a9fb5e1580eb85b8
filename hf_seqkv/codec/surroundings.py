"""What pages are predicted from when they are coded exactly, besides their codes: embeddings, positions, key means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .exact_part import turns
from .exact_predict import Place


@dataclass(frozen=True)
class Surroundings:
    """What `N` pages are predicted from, besides their codes; encoding and decoding need the same, to the bit.

    Args:
        embedded: Rows of the model's input embedding, as the weights have them, `[N, P, E]` fp32; None for a codec that
            does not predict.
        starts: Of each layer, cosines and sines of each page's first token, `[N, 2 * half]` fp32; `half` is 0 without
            RoPE.
        relative: Of each layer, `center.relative_table`, `[P, 2 * half]` fp32.
        interleaved: Of each layer, how RoPE pairs components.
        means: Of each layer, the constant part of the keys before RoPE, `[N, H, Dk]` fp32, zeros where none is removed.
    """

    embedded: torch.Tensor | None
    starts: list[torch.Tensor]
    relative: list[torch.Tensor]
    interleaved: list[bool]
    means: list[torch.Tensor]

    def part(self, span: slice | torch.Tensor) -> Surroundings:
        """Of some of the pages; what is empty stays so."""
        embedded = None if self.embedded is None else self.embedded[span]
        starts, means = ([x[span] if len(x) else x for x in group] for group in (self.starts, self.means))
        return Surroundings(embedded, starts, self.relative, self.interleaved, means)

    @staticmethod
    def joined(runs: Sequence[Surroundings]) -> Surroundings:
        """Of the pages of several runs, whose tables `relative` are the same."""
        embedded = None if runs[0].embedded is None else torch.cat([run.embedded for run in runs])
        starts, means = (
            [torch.cat(x) for x in zip(*(getattr(run, name) for run in runs), strict=True)]
            for name in ("starts", "means")
        )
        return replace(runs[0], embedded=embedded, starts=starts, means=means)

    def place(self, layer: int) -> Place:
        rows = turns(self.starts[layer], self.relative[layer])
        tokens = len(self.relative[layer])
        means = self.means[layer].double().cpu().numpy().repeat(tokens, axis=0)
        return Place(rows, self.interleaved[layer], means)
