"""Tensors of a calibration's file: their names and shapes, checked where a file is read.

Tensors of layer `i`, for `side` in `key`, `value` (all fp32 but `widths`):

    {i}.{side}.rotation   [H, D, D]      rows are the basis, orthogonal within a head
    {i}.{side}.std        [H, D]         standard deviation of each component of a vector of length sqrt(D)
    {i}.{side}.widths     [H, D] uint8   bits of each component
    {i}.{side}.levels     [H, 9, n]      codebook of each width, unit variance
    {i}.held              [F]            weights of `importance.features` that tell tokens to hold dense; may be absent

Tensors of a sequence codec, of profile `full` (with prediction) or `light`, where there is one; `sequence_part.Part`
says what they are:

    sequence.{profile}.tables                             [C, 256] uint16   frequencies
    sequence.{profile}.along                              [P, P]            transform along a page's tokens
    sequence.{profile}.{i}.{side}.{bias, inputs, predictor (fp16), synthesis, sizes, refined, importance, share}

Tensors of the exact codec of these hot pages, where there is a sequence codec that predicts; `exact_part.ExactPart`
says what they are:

    exact.flags                [2] uint8   see `exact_tables.ExactTables`
    exact.{i}.{side}.{field}

And `texts.shingles`, which tells the texts it was made from (`overlap.py`).
"""

from __future__ import annotations

from typing import Any

import torch

from ..codec import importance
from ..codec.importance import LEVELS
from ..codec.sequence import SequenceCodec
from ..codec.sequence_part import CLASSES, INPUTS, LADDER, sources
from ..codec.symbol_tables import ESCAPE
from ..errors import FormatError

SIDES = ("key", "value")
PARTS = ("rotation", "std", "widths", "levels")
SEQUENCE_PARTS = ("bias", "inputs", "predictor", "synthesis", "sizes", "refined", "importance", "share")


def sequence_tensors(codec: SequenceCodec, profile: str) -> dict[str, torch.Tensor]:
    """Tensors of a sequence codec, by name."""
    found = {"tables": codec.tables.frequencies, "along": codec.along}
    for index, part in enumerate(codec.parts):
        prefix = f"{index // 2}.{SIDES[index % 2]}"
        found |= {f"{prefix}.{name}": torch.as_tensor(getattr(part, name)) for name in SEQUENCE_PARTS}
        found[f"{prefix}.predictor"] = part.predictor.half()
    return {f"sequence.{profile}.{name}": x.contiguous() for name, x in found.items()}


def check_shapes(tensors: dict[str, torch.Tensor], config: dict[str, Any], source: str) -> None:
    """Every tensor must be there and fit the others.

    Raises:
        FormatError: One is missing or does not.
    """

    def expect(name: str, *shape: int | None) -> tuple[int, ...]:
        """A tensor's shape, which must be this one; None is any size."""
        if name not in tensors:
            raise FormatError(f"{source}: tensor {name} is missing; download or make the calibration again")
        found = tuple(tensors[name].shape)
        if len(found) != len(shape) or any(b not in (None, a) for a, b in zip(found, shape, strict=True)):
            raise FormatError(
                f"{source}: tensor {name} has shape {found}, must have {shape}; download or make the calibration again"
            )
        return found

    sides = []  # KV heads and head dim of each
    for i in range(config["model"].get("num_hidden_layers", 0)):
        for side in SIDES:
            heads, dim = expect(f"{i}.{side}.std", None, None)
            expect(f"{i}.{side}.rotation", heads, dim, dim)
            expect(f"{i}.{side}.widths", heads, dim)
            expect(f"{i}.{side}.levels", heads, 9, None)
            sides.append((heads, dim))
        if f"{i}.held" in tensors:
            expect(f"{i}.held", importance.count(*sides[2 * i]))
    for profile in config.get("sequence", {}):
        prefix = f"sequence.{profile}"
        expect(f"{prefix}.tables", CLASSES, ESCAPE + 1)
        size, _ = expect(f"{prefix}.along", None, None)
        expect(f"{prefix}.along", size, size)
        embedded = 0  # components of an embedding, once a part is predicted from it
        for i in range(len(sides)):
            part = f"{prefix}.{i // 2}.{SIDES[i % 2]}"
            expect(f"{part}.inputs", INPUTS)
            found = tensors[f"{part}.inputs"].tolist()
            embedded = embedded or found[0]
            allowed = [embedded, *(_width(sides, n) for n in sources(i))]
            if any(count not in (0, whole) for count, whole in zip(found, allowed, strict=True)):
                raise FormatError(
                    f"{source}: {part}.inputs is {found}, must be 0 or the whole of {allowed} for each; download or "
                    "make the calibration again"
                )
            for name, shape in _part_shapes(sides, size, i, sum(found)).items():
                expect(f"{part}.{name}", *shape)


def _width(sides: list[tuple[int, int]], index: int | None) -> int:
    return 0 if index is None else sides[index][0] * sides[index][1]


def _part_shapes(sides: list[tuple[int, int]], size: int, index: int, inputs: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a part of a sequence codec, by name.

    Args:
        size: Tokens of a page.
        inputs: Components that the part is predicted from.
    """
    width = _width(sides, index)
    return {
        "bias": (width,),
        "predictor": (inputs, width),
        "synthesis": (width, width),
        "sizes": (len(LADDER), size, width),
        "refined": (len(LADDER), LEVELS, width),
        "importance": (importance.count(*sides[index - index % 2]),),
        "share": (),
    }
