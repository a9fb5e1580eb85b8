"""A codec's side as the Triton kernels of attention read it: pieces, tables of bytes, tables of levels.

Byte tables hold levels as `step * (u + shift)`, signed bytes `u`. Steps, one a width and head, go into the rotation:
queries are rotated to products with `u`, and what is mixed of `u` is rotated back.
"""

from __future__ import annotations

import itertools

import torch

WIDEST = 32  # components of a piece: of more, a warp's registers would not hold the tile beside everything else


def _split(count: int) -> list[int]:
    """Sizes of pieces that hold `count` components: powers of two, of at least 16."""
    whole, rest = divmod(-(-count // 16) * 16, WIDEST)
    return [WIDEST] * whole + [16] * (rest // 16)


def unlike(dim: int) -> tuple[tuple, ...]:
    """Pieces of `dim` components whose levels are gathered: of no width, and so few that addresses fit registers."""
    return tuple((0, first, 16, 0, False) for first in range(0, dim, 16))


def pieces(widths: torch.Tensor, free: bool = True) -> tuple[tuple, ...]:
    """Pieces `(bits, first, size, word, free)` of components `widths [H, D]`, as `triton_tile` has them.

    There are none where heads differ, a width is none of 1 to 5 bits, or a run of one is no multiple of 16 components.
    """
    heads = {tuple(head) for head in widths.tolist()}
    found, first, word = [], 0, 0
    for bits, run in itertools.groupby(heads.pop()):
        count = len(list(run))
        if heads or count % 16 or not 1 <= bits <= 5:
            return ()
        for size in _split(count):
            found.append((bits, first, size, word, free and bits == 5))
            first, word = first + size, word + 2 * bits * size
    return tuple(found)


def byte_table(levels: torch.Tensor, free: bool = True) -> tuple[torch.Tensor, float, float]:
    """Levels `[n]` as `step * (u + shift)`: `u [n]` int8, step and shift with the least error for Gaussian values.

    `u` is at least 0 at 4 bits, where its top bit must be free (`triton_tile`), and -128 at the others. At 5 bits it is
    negative for codes below 16; if levels are not `free` but symmetric, code `31 - c` has `-1 - u`.
    """
    levels = levels.double()
    n, least, most = len(levels), 0 if len(levels) == 16 else -128, 127
    gaps = torch.diff(levels, prepend=levels[:1] - 1, append=levels[-1:] + 1)
    weight = torch.exp(-(levels**2) / 2) * (gaps[1:] + gaps[:-1])
    middle = levels[15:17].mean() if n == 32 else (levels[0] + levels[-1]) / 2
    extent = 2 * torch.maximum(levels[-1] - middle, middle - levels[0])
    # All steps that use three quarters of the bytes or more, with the levels' middle at three places, or in between.
    step = extent / torch.arange((most - least) * 0.75, most - least + 0.01, 0.25)
    step = step.clamp_min(1e-30)[:, None, None]
    places = [(most + least) // 2, (most + least) / 2, (most + least) // 2 + 1] if free or n != 32 else [-0.5]
    shift = middle / step - torch.tensor(places)[:, None]
    low = torch.arange(n) // 16 * 128 - 128 if n == 32 else torch.full((n,), least)
    u = (levels / step - shift).round().clamp(low, low + 127 if n == 32 else low + most - least)
    if not free and n == 32:
        u = torch.cat([-1 - u[..., 16:].flip(-1), u[..., 16:]], -1)
    best = (weight * (step * (u + shift) - levels) ** 2).sum(-1).argmin()
    i, j = divmod(int(best), len(places))
    return u[i, j].to(torch.int8), float(step[i]), float(shift[i, j])


def is_free(side) -> bool:
    """Whether 5-bit levels of a side are anything but symmetric."""
    levels = side.levels[:, 5, :32]
    return bool(((levels + levels.flip(-1)).abs().amax(-1) > 1e-5 * levels.abs().amax(-1)).any())


class SideTables:
    """Tables of one side of a codec, on its device.

    Args:
        side: A `VectorCodec`.
        expand: Whether byte tables expand its codes, or levels are gathered.

    Attributes:
        pieces: As `pieces` or `unlike` has them.
        uniform: Bits of all components, 0 where they differ.
        matrix: `[H, D, D]`, the rotation back, steps included; `norm [H]`, the largest of its rows.
        mean, middle: `[H, D]`; the second of `u` the negated zero.
        arguments: What `partials` takes: `words [H, 8, 8]` int32, numbers of `triton_tile.load_shifts` in rows 0, 6 and
            7 and at the end of row 1, byte tables of each width in the others; levels `[H, 9, 256]` fp16; widths and
            offsets `[H, D]` int32.
    """

    def __init__(self, side, expand: bool):
        flat = set(side.widths.flatten().tolist())
        device, heads = side.levels.device, side.heads
        levels = side.levels.expand(heads, -1, -1).float().cpu().clone()
        self.uniform = next(iter(flat)) if len(flat) == 1 else 0
        free = is_free(side)
        self.pieces = pieces(side.widths, free) if expand else unlike(side.dim)
        words, affine = torch.zeros(heads, 8, 8, dtype=torch.int32), torch.zeros(heads, 9, 2)
        if expand:
            i = torch.arange(8)
            words[:, 0], words[:, 6], words[:, 7] = i // 4 * 2, i // 2, (2 - i // 2) % 32
            for h, bits in itertools.product(range(heads), flat):
                u, *found = byte_table(levels[h, bits, : 1 << bits], free)
                affine[h, bits] = torch.tensor(found)
                if bits == 5:  # without the code's bit, or magnitudes
                    u = u & 127 if free else u[16:]
                words[h, bits] = torch.nn.functional.pad(u, (0, 32 - len(u))).view(torch.int32)
            words[:, 1, 7] = 1
        else:
            affine[:] = torch.tensor([1.0, 0.0])
        step, shift = affine.to(device).gather(1, side.widths.long()[..., None].expand(-1, -1, 2)).unbind(-1)
        self.matrix, self.mean = (side.decode_matrix * step[..., None]).contiguous(), side.mean.contiguous()
        self.norm = self.matrix.norm(dim=-1).amax(-1).contiguous()
        self.middle = shift.contiguous()
        levels[:, 0] = 0
        self.arguments = (
            words.to(device), levels.to(device, torch.float16),
            *(x.to(device, torch.int32).contiguous() for x in (side.widths, side.offsets)),
        )  # fmt: skip
