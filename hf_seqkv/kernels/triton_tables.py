"""A codec's side as the Triton kernels of attention read it: pieces, tables of bytes, tables of levels.

Byte tables hold levels as `step * (u + shift)`. Steps, one a width and head, go into the rotation: queries are rotated
to products with `u`, and what is mixed of `u` is rotated back.
"""

from __future__ import annotations

import itertools

import torch

WIDEST = 32  # components of a piece: of more, a warp's registers would not hold the tile beside everything else


def _split(count: int) -> list[int]:
    """Sizes of pieces that hold `count` components: powers of two, of at least 16."""
    whole, rest = divmod(-(-count // 16) * 16, WIDEST)
    return [WIDEST] * whole + [16] * (rest // 16)


def unlike(dim: int) -> tuple[tuple[int, int, int, int], ...]:
    """Pieces of `dim` components whose levels are gathered: of no width."""
    sizes = _split(dim)
    return tuple((0, sum(sizes[:i]), size, 0) for i, size in enumerate(sizes))


def pieces(widths: torch.Tensor) -> tuple[tuple[int, int, int, int], ...]:
    """Pieces `(bits, first, size, word)` of components `widths [H, D]`, as `triton_tile` has them.

    There are none where heads differ, a width is none of 1 to 5 bits, or a run of one is no multiple of 16 components.
    """
    heads = {tuple(head) for head in widths.tolist()}
    found, first, word = [], 0, 0
    for bits, run in itertools.groupby(heads.pop()):
        count = len(list(run))
        if heads or count % 16 or not 1 <= bits <= 5:
            return ()
        for size in _split(count):
            found.append((bits, first, size, word))
            first, word = first + size, word + 2 * bits * size
    return tuple(found)


def byte_table(levels: torch.Tensor) -> tuple[torch.Tensor, float, float]:
    """Levels `[n]` as `step * (u + shift)`: bytes `u [n]`, step and shift with the least error for Gaussian values.

    `u` is at most 127 at 4 bits, where its top bit must be free (`triton_tile`), and 255 at the others; at 5 bits the
    top bit is the code's, so that the middle of the bytes is that of the codes.
    """
    levels = levels.double()
    n, most = len(levels), 127 if len(levels) == 16 else 255
    gaps = torch.diff(levels, prepend=levels[:1] - 1, append=levels[-1:] + 1)
    weight = torch.exp(-(levels**2) / 2) * (gaps[1:] + gaps[:-1])
    middle = levels[15:17].mean() if n == 32 else (levels[0] + levels[-1]) / 2
    extent = 2 * torch.maximum(levels[-1] - middle, middle - levels[0])
    # All steps that use three quarters of the bytes or more, with the levels' middle at three places.
    step = (extent / torch.arange(most * 0.75, most + 0.01, 0.25)).clamp_min(1e-30)[:, None, None]
    shift = middle / step - torch.tensor([most // 2, most / 2, most // 2 + 1])[:, None]
    low = torch.arange(n) // 16 * 128 if n == 32 else torch.zeros(n)
    u = (levels / step - shift).round().clamp(low, low + 127 if n == 32 else low + most)
    best = (weight * (step * (u + shift) - levels) ** 2).sum(-1).argmin()
    i, j = divmod(int(best), 3)
    return u[i, j].to(torch.uint8), float(step[i]), float(shift[i, j])


class SideTables:
    """Tables of one side of a codec, on its device.

    Args:
        side: A `VectorCodec`.
        expand: Whether byte tables expand its codes, or levels are gathered.

    Attributes:
        pieces: As `pieces` or `unlike` has them.
        uniform: Bits of all components, 0 where they differ.
        matrix: `[H, D, D]`, the rotation back, steps included; `norm [H]`, the largest of its rows.
        mean: `[H, D]`.
        arguments: What `partials` takes: `words [H, 8, 8]` int32, shifts of `triton_tile.load_shifts` in rows 0, 6 and
            7 and byte tables of each width in the others; `middle [H, D]`, of the numbers `1024 + u` the negated zero;
            levels `[H, 9, 256]` fp16; widths and offsets `[H, D]` int32.
    """

    def __init__(self, side, expand: bool):
        flat = set(side.widths.flatten().tolist())
        device, heads = side.levels.device, side.heads
        levels = side.levels.expand(heads, -1, -1).float().cpu().clone()
        self.uniform = next(iter(flat)) if len(flat) == 1 else 0
        self.pieces = pieces(side.widths) if expand else unlike(side.dim)
        words, affine = torch.zeros(heads, 8, 8, dtype=torch.int32), torch.zeros(heads, 9, 2)
        if expand:
            i = torch.arange(8)
            words[:, 0], words[:, 6], words[:, 7] = i // 4 * 2, i // 2, (2 - i // 2) % 32
            for h, bits in itertools.product(range(heads), flat):
                u, *found = byte_table(levels[h, bits, : 1 << bits])
                affine[h, bits] = torch.tensor(found)
                u = u & 127 if bits == 5 else u
                words[h, bits] = torch.nn.functional.pad(u, (0, 32 - len(u))).view(torch.int32)
        else:
            affine[:] = torch.tensor([1.0, 1024.0])
        step, shift = affine.to(device).gather(1, side.widths.long()[..., None].expand(-1, -1, 2)).unbind(-1)
        self.matrix, self.mean = (side.decode_matrix * step[..., None]).contiguous(), side.mean.contiguous()
        self.norm = self.matrix.norm(dim=-1).amax(-1).contiguous()
        levels[:, 0] = 0
        self.arguments = (
            words.to(device), (shift - 1024).contiguous(), levels.to(device, torch.float16),
            *(x.to(device, torch.int32).contiguous() for x in (side.widths, side.offsets)),
        )  # fmt: skip
