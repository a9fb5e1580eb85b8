"""The constant part of the keys: removed before RoPE, added back to the scores as a function of position alone.

Most of a key's energy is the same for every token before RoPE (a projection's bias, or a mean the model learned).
With `mean` before RoPE and `R_n` the rotation at position `n`, a key is `k_n = r_n + R_n mean`; only `r_n` is coded,
and the score is `q . k_n = q . r_n + q . R_n mean`. The identity holds for any `mean` and any `R_n` as long as both
sides use the same ones, so a poor estimate costs rate, never correctness.

RoPE turns pairs of components `(a, b)` by an angle. A row of cosines and sines is `[cos | sin]`, `2 * half` numbers,
`half` the number of pairs; components beyond `2 * half` are not turned. Positions inside a page step by one, so the
rows of a page are its first row (`start`) turned by a table that all pages share (`relative`):
`cos(n0 + j) = cos n0 cos j - sin n0 sin j`. A page whose rows do not fit that (frequencies that changed in
mid-sequence, positions with gaps) gets a start of zeros: its turned components are then coded as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


def relative_table(rows: torch.Tensor) -> torch.Tensor:
    """Turn of every token of a page relative to its first: rows `[P, 2 * half]` to a table of the same shape.

    Rounded to numbers of fp16, which matrix units multiply exactly: a constant part that is turned by other numbers
    than the model's is as good, as long as all turn it by the same.
    """
    half = rows.shape[-1] // 2
    cos, sin = rows[:, :half].double(), rows[:, half:].double()
    power = (cos[0] ** 2 + sin[0] ** 2).clamp_min(1e-30)
    turned = [(cos * cos[0] + sin * sin[0]) / power, (sin * cos[0] - cos * sin[0]) / power]
    return torch.cat(turned, -1).half().float()


def expand_rows(starts: torch.Tensor, relative: torch.Tensor) -> torch.Tensor:
    """Rows of pages from their starts: `[..., 2 * half]` and `[P, 2 * half]` to `[..., P, 2 * half]`."""
    half = relative.shape[-1] // 2
    cos, sin = starts[..., None, :half], starts[..., None, half:]
    rc, rs = relative[:, :half], relative[:, half:]
    return torch.cat([cos * rc - sin * rs, sin * rc + cos * rs], -1)


def page_starts(rows: torch.Tensor, relative: torch.Tensor, tolerance: float = 1e-3) -> torch.Tensor:
    """Start of each page, zeros where its rows are not the start turned by `relative`.

    Args:
        rows: `[..., P, 2 * half]` fp32.
    Returns:
        `[..., 2 * half]` fp32.
    """
    starts = rows[..., 0, :]
    if not starts.shape[-1]:
        return starts
    error = (expand_rows(starts, relative) - rows).abs().amax((-1, -2))
    size = starts.abs().amax(-1)
    return torch.where((error <= tolerance * size)[..., None], starts, torch.zeros_like(starts))


def _pairs(x: torch.Tensor, half: int, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if interleaved:
        return x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
    return x[..., :half], x[..., half : 2 * half]


def _unpairs(a: torch.Tensor, b: torch.Tensor, rest: torch.Tensor, interleaved: bool) -> torch.Tensor:
    turned = torch.stack([a, b], -1).flatten(-2) if interleaved else torch.cat([a, b], -1)
    return torch.cat([turned, rest.expand(*turned.shape[:-1], rest.shape[-1])], -1)


def rotate(x: torch.Tensor, rows: torch.Tensor, interleaved: bool, inverse: bool = False) -> torch.Tensor:
    """Apply (or undo) RoPE: `x [..., D]` with `rows [..., 2 * half]`, broadcast against each other.

    Rows may carry a scale (YaRN's, LongRoPE's); the inverse divides by its square. Rows of zeros give zeros.
    """
    half = rows.shape[-1] // 2
    cos, sin = rows[..., :half], rows[..., half:]
    a, b = _pairs(x, half, interleaved)
    if inverse:
        power = (cos**2 + sin**2).clamp_min(1e-30)
        cos, sin = cos / power, -sin / power
    return _unpairs(a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :], interleaved)


@dataclass(eq=False)
class Center:
    """What a kernel needs to add the constant part back.

    Args:
        mean: Constant key before RoPE, `[B, H, D]` fp32.
        starts: Row of each page's first token, `[B, N, 2 * half]` fp32.
        relative: `[P, 2 * half]` fp32, of numbers that fp16 has too.
        interleaved: Whether RoPE pairs neighbours (`2i, 2i + 1`) or halves (`i, i + half`).
    """

    mean: torch.Tensor
    starts: torch.Tensor
    relative: torch.Tensor
    interleaved: bool

    def keys(self, first: int, last: int) -> torch.Tensor:
        """Constant part of the keys of pages `first` to `last`, `[B, last - first, H, P, D]` fp32."""
        rows = expand_rows(self.starts[:, first:last], self.relative)
        return rotate(self.mean[:, None, :, None], rows[:, :, None], self.interleaved)

    def coefficients(self, query: torch.Tensor) -> torch.Tensor:
        """`[A | B | c]` with score `A . cos + B . sin + c` for a query, `[B, H, R, D]` to `[B, H, R, 2 * half + 1]`."""
        half = self.relative.shape[-1] // 2
        mean = self.mean[:, :, None]
        qa, qb = _pairs(query, half, self.interleaved)
        ma, mb = _pairs(mean, half, self.interleaved)
        rest = (query[..., 2 * half :] * mean[..., 2 * half :]).sum(-1, keepdim=True)
        return torch.cat([qa * ma + qb * mb, qb * ma - qa * mb, rest], -1)
