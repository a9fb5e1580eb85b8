"""`ExactTables`: what was fitted for the exact codec, of all layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import FormatError
from .exact_part import ExactPart
from .page import QuantizedPageCodec

SIDES = ("key", "value")


@dataclass(frozen=True, eq=False)
class ExactTables:
    """Keys' and values' tables of every layer, in the order in which layers run.

    Args:
        parts: Two a layer.
        embedded: Whether parts are predicted from the tokens' embeddings, too.
        adapts: Whether deviations and means follow what was coded.
    """

    parts: Sequence[ExactPart]
    embedded: bool = True
    adapts: bool = True

    def tensors(self) -> dict[str, torch.Tensor]:
        """By name, `{layer}.{side}.{field}` and `flags`."""
        found = {"flags": torch.tensor([self.embedded, self.adapts], dtype=torch.uint8)}
        for i, part in enumerate(self.parts):
            found |= {f"{i // 2}.{SIDES[i % 2]}.{name}": x.contiguous() for name, x in part.tensors().items()}
        return found

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> ExactTables:
        """Inverse of `tensors`.

        Raises:
            FormatError: One is missing, or not one of these.
        """
        fields = [field.name for field in dataclasses.fields(ExactPart)]
        layers = len({name.partition(".")[0] for name in tensors} - {"flags"})
        names = [[f"{i // 2}.{SIDES[i % 2]}.{field}" for field in fields] for i in range(2 * layers)]
        expected = {"flags", *(name for part in names for name in part)}
        if differ := sorted(expected ^ set(tensors)):
            raise FormatError(f"exact tables: {differ[0]} is missing or unknown; fit them again")
        parts = [ExactPart(*(tensors[name] for name in part)) for part in names]
        return cls(parts, *(bool(x) for x in tensors["flags"]))

    def check(self, pages: Sequence[QuantizedPageCodec]) -> None:
        """Whether these are tables of such pages.

        Raises:
            FormatError: They are not.
        """
        if len(self.parts) != 2 * len(pages):
            raise FormatError(f"exact tables of {len(self.parts) // 2} layers, the pages have {len(pages)}; fit again")
        sides = [side for page in pages for side in (page.key, page.value)]
        widths = [side.heads * side.dim for side in sides]
        for i, (part, side) in enumerate(zip(self.parts, sides, strict=True)):
            first = i - i % 2
            part.check(f"{i // 2}.{SIDES[i % 2]}", side.heads, side.dim, sum(widths[max(0, first - 4) : i]))
