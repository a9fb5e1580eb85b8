"""`VectorCodec`: the keys (or the values) of one layer's page to codes and scales, and back.

    x  --  - mean  --  @ encode_matrix  --  / scale  --  nearest level  --  pack along tokens
    x^ --  + mean  --  @ decode_matrix  --  * scale  --  level          --  unpack

Both matrices are block-diagonal over KV heads. For an orthogonal rotation they are transposes of each other; a
calibration also folds each component's standard deviation into them, so that one codebook per width serves all
components of a head. Components have their own widths, 0 to 8 bits; a component of 0 bits is not stored.
"""

from __future__ import annotations

import functools
import hashlib

import torch

from . import packing
from .quantize import CODEBOOKS, nearest
from .rotation import random_rotation
from .scales import nearest as nearest_scale


class VectorCodec:
    """Codec of one side, keys or values, of one layer.

    Args:
        encode_matrix, decode_matrix: `[H, D, D]` fp32.
        mean: Static part removed before coding, `[H, D]` fp32.
        widths: Bits of each component, `[H, D]` uint8.
        levels: Codebook of each width, `levels[h, w, :2**w]`, fp32 `[H or 1, 9, 256]`.
        scale: `"fit"` (least-squares gain) or `"norm"` (RMS of the vector).
        page_size: Tokens a page `P`.
        scale_bits: Of a stored scale, 16 (bf16) or 8 (`scales.py`).
    """

    def __init__(self, encode_matrix, decode_matrix, mean, widths, levels, scale, page_size, scale_bits=16):
        self.encode_matrix, self.decode_matrix = encode_matrix, decode_matrix
        self.mean, self.widths, self.levels = mean, widths, levels
        self.scale, self.page_size, self.scale_bits = scale, page_size, scale_bits
        self.heads, self.dim = widths.shape
        # Energy of each component in the units of x: the metric of the gain.
        self.weights = decode_matrix.square().sum(-1)
        flat = widths.flatten().tolist()
        sizes = [page_size * w // 8 for w in flat]
        starts = torch.tensor([0, *sizes]).cumsum(0)
        self.offsets = starts[:-1].reshape(self.heads, self.dim)
        self.code_bytes = int(starts[-1])
        self.mixed = len(set(flat)) > 1
        self._groups = []
        for width in sorted(set(flat) - {0}):
            rows = torch.tensor([i for i, w in enumerate(flat) if w == width])
            span = torch.arange(page_size * width // 8)
            self._groups.append((width, rows, starts[rows][:, None] + span))

    @classmethod
    def data_free(
        cls, heads: int, dim: int, page_size: int, *, bits, rotation, codebook, scale, seed, scale_bits=16
    ) -> VectorCodec:
        """TurboQuant's codec: one random rotation and one codebook for every vector (arXiv 2504.19874)."""
        basis = random_rotation(dim, rotation, seed).expand(heads, dim, dim).contiguous()
        levels = torch.zeros(1, 9, 256)
        levels[0, bits, : 2**bits] = CODEBOOKS[codebook](bits, dim)
        widths = torch.full((heads, dim), bits, dtype=torch.uint8)
        mean = torch.zeros(heads, dim)
        return cls(basis.transpose(1, 2).contiguous(), basis, mean, widths, levels, scale, page_size, scale_bits)

    def to(self, device) -> VectorCodec:
        """Copy with its tables on `device`."""
        tables = (self.encode_matrix, self.decode_matrix, self.mean, self.widths, self.levels)
        return VectorCodec(*(t.to(device) for t in tables), self.scale, self.page_size, self.scale_bits)

    @property
    def tables(self) -> list[torch.Tensor]:
        return [self.encode_matrix, self.decode_matrix, self.mean, self.widths, self.levels, self.weights]

    @functools.cached_property
    def fingerprint(self) -> bytes:
        """SHA-256 of everything that decoding depends on."""
        narrow = (self.scale_bits,) if self.scale_bits != 16 else ()
        digest = hashlib.sha256(repr((self.heads, self.dim, self.page_size, *narrow)).encode())
        for table in (self.decode_matrix, self.mean, self.widths, self.levels):
            digest.update(table.detach().cpu().contiguous().numpy().tobytes())
        return digest.digest()

    def _table(self, rows, width):
        """Levels of `width` for each of the flattened `(head, component)` rows, `[len(rows) or 1, 2**width]`."""
        table = self.levels[:, width, : 1 << width]
        return table if table.shape[0] == 1 else table[rows.to(table.device) // self.dim]

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantise `x [..., H, P, D]` to codes `[..., H, D, P]` uint8 and scales `[..., H, P]` bf16."""
        y = (x.float() - self.mean[:, None]) @ self.encode_matrix
        # To magnitudes around 1 by powers of two, which change no code: squares neither overflow nor vanish.
        exponent = torch.frexp(y.abs().amax(-1)).exponent
        y = torch.ldexp(y, -exponent[..., None])
        weights = self.weights[:, None]
        gain = ((y.square() * weights).sum(-1) / weights.sum(-1)).sqrt()
        z = y.transpose(-1, -2)  # [..., H, D, P]
        codes, fitted, error = self._quantize(z, gain)
        if self.scale == "norm":
            fitted = gain
        elif self.mixed:
            # A vector unlike those the widths were made for overshoots its narrow components: try larger gains.
            for factor in (1.4, 2.0, 2.8, 4.0):
                again, gained, rest = self._quantize(z, gain * factor)
                better = rest < error
                codes = torch.where(better[..., None, :], again, codes)
                fitted, error = torch.where(better, gained, fitted), torch.where(better, rest, error)
        scales = torch.ldexp(fitted, exponent)
        if self.scale_bits == 8:  # coarse: codes are chosen again, for the scale that is stored
            scales = nearest_scale(scales)
            codes, _, _ = self._quantize(z, torch.ldexp(scales, -exponent))
        return codes, scales.to(torch.bfloat16)

    def _quantize(self, y: torch.Tensor, gain: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes of `y [..., H, D, P]` under a gain `[..., H, P]`, the least-squares gain and the error it leaves."""
        flat = (y / gain.clamp_min(1e-30)[..., None, :]).flatten(-3, -2).movedim(-2, 0).contiguous()  # [H * D, ..., P]
        codes = torch.zeros(flat.shape, dtype=torch.uint8, device=y.device)
        chosen = torch.zeros_like(flat)
        for width, rows, _ in self._groups:
            at = slice(None) if len(rows) == len(flat) else rows.to(y.device)
            table = self._table(rows, width)
            codes[at] = nearest(flat[at], table)
            chosen[at] = _levels(table, codes[at])
        codes, chosen = (t.movedim(0, -2).unflatten(-2, (self.heads, self.dim)) for t in (codes, chosen))
        weights = self.weights[..., None]
        dot, power = ((a * chosen * weights).sum(-2) for a in (y, chosen))
        fitted = torch.where(power > 0, dot / power.clamp_min(1e-30), gain)
        return codes, fitted, (y.square() * weights).sum(-2) - dot * fitted

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes `[..., H, D, P]` to bytes `[..., code_bytes]`."""
        flat = codes.flatten(-3, -2)
        if len(self._groups) == 1 and len(self._groups[0][1]) == flat.shape[-2]:
            return packing.pack(flat, self._groups[0][0]).flatten(-2)
        out = torch.empty(*codes.shape[:-3], self.code_bytes, dtype=torch.uint8, device=codes.device)
        for width, rows, where in self._groups:
            out[..., where.to(out.device)] = packing.pack(flat[..., rows.to(out.device), :], width)
        return out

    def unpack(self, data: torch.Tensor) -> torch.Tensor:
        """Inverse of `pack`; components of 0 bits get code 0."""
        codes = torch.zeros(
            *data.shape[:-1], self.heads * self.dim, self.page_size, dtype=torch.uint8, device=data.device
        )
        for width, rows, where in self._groups:
            codes[..., rows.to(data.device), :] = packing.unpack(data[..., where.to(data.device)], width)
        return codes.unflatten(-2, (self.heads, self.dim))

    def decode(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Codes `[..., H, D, P]` and scales `[..., H, P]` to fp32 `[..., H, P, D]`; infinite scales count as 0."""
        return self.restore(self.coordinates(codes, scales))

    def restore(self, y: torch.Tensor) -> torch.Tensor:
        """Vectors from their `coordinates [..., H, P, D]`."""
        return y @ self.decode_matrix + self.mean[:, None]

    def coordinates(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Levels times scales of codes and scales as `decode` has them, `[..., H, P, D]` fp32."""
        if len(self._groups) == 1 and len(self.levels) == 1:
            y = _levels(self._table(None, self._groups[0][0]), codes)
        else:
            flat = codes.flatten(-3, -2).movedim(-2, 0)
            y = torch.zeros(flat.shape, dtype=torch.float32, device=codes.device)
            for width, rows, _ in self._groups:
                rows = rows.to(codes.device)
                y[rows] = _levels(self._table(rows, width), flat[rows])
            y = y.movedim(0, -2).reshape(codes.shape)
        y = y.transpose(-1, -2)
        scales = scales.float().masked_fill(torch.isinf(scales), 0)
        return y * scales[..., None]


def _levels(table: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Levels of codes `[R, ...]` from one table for all, `[1, n]`, or one a row, `[R, n]`."""
    if table.shape[0] == 1:
        return table[0].index_select(0, codes.flatten().int()).view(codes.shape)
    return table.gather(1, codes.flatten(1).long()).reshape(codes.shape)
