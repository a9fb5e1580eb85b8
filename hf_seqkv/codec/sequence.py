"""The sequence codec: pages of all layers, predicted, transformed and entropy-coded.

Coding goes layer by layer, keys then values, over the `P` tokens of a page at once. One *part* is one side of a layer:

1. prediction: linear in some of these: the token's embedding, the decoded keys and values of the two layers before and,
   for values, the decoded keys of their own layer. Keys are taken before RoPE.
2. transform: the residual times a matrix that whitens what the model's output feels and removes correlation across
   heads and components; then a DCT along the page's tokens, after which errors do not add up over tokens.
3. quantisation: `uniform.py`, one step for everything; classes tell the expected size of each coefficient in it, and a
   page moves a part's by a shift of its own. Of components that are mostly zero it has few (`sequence_quiet.py`).
4. refinement: tokens on which much depends (`importance.py`) get their error coded again with a step of `2**-level`.
5. entropy coding: `entropy.py`, with static tables. Symbols depend on integers alone; predictions only shift what they
   are added to, so that arithmetic that differs between machines moves a result by rounding and never loses a stream.

Steps are counted in quarter octaves from the calibration's own (`step` of -4 is half of it). The expected sizes were
measured at three steps (`LADDER`) and lie on the line between them elsewhere.

A stored page, little-endian: magic `SKVS`, version u16, step i16, page size u16, parts u16, bytes of three streams u32
each, codec fingerprint 16 bytes, CRC-32 of all but itself u32; then the streams. The first holds all parts' levels,
shifts and flags, the second their coefficients, those of active quiet components last, the third the refined tokens'.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence

import torch

from ..errors import FormatError
from . import entropy
from .importance import LEVELS
from .sequence_part import CLASSES, LEVEL_CLASSES, SHIFT_CLASS, SHIFTS, Part, PartCoder, best_shifts
from .sequence_quiet import QuietComponents, are_active, with_flags
from .sequence_span import Decoding, Encoding, Span
from .symbol_tables import SymbolTables
from .threads import on_threads, spans

MAGIC, VERSION = b"SKVS", 3
_HEADER = struct.Struct("<4sHhHHIII16sI")


class SequenceCodec:
    """Codec of the pages of all coded layers at one step.

    Args:
        parts: Keys and values of every layer, in the order in which layers run.
        along: Orthogonal transform of a page's tokens, `[P, P]`, rows are the basis.
        tables: Of `sequence_part.CLASSES` classes.
        base: Step 0, in units of the coefficients.
        step: Quarter octaves from it.

    Layers may differ in heads and head dims.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        along: torch.Tensor,
        tables: SymbolTables,
        base: float,
        step: int,
    ):
        self.parts, self.along, self.tables = list(parts), along, tables
        self.base, self.step, self.page_size = base, step, len(along)
        self._bits = tables.bits()
        self.coders = [PartCoder(part, along, step, base, self._bits) for part in parts]
        self.quiet = QuietComponents(*zip(*((x.flags, x.quiet_kinds) for x in self.coders), strict=True))
        self.sizes = [coder.kinds.shape[1] for coder in self.coders]  # coefficients of loud components
        self._widths = torch.tensor([part.bias.numel() for part in parts])
        self._finer = [torch.empty(0, dtype=torch.uint8), *(row for coder in self.coders for row in coder.fine.classes)]
        shares = torch.tensor([part.share + LEVEL_CLASSES for part in parts], dtype=torch.uint8)
        shifts = torch.full((len(parts),), SHIFT_CLASS, dtype=torch.uint8)
        flags = (self.quiet.flags + CLASSES).to(torch.uint8)
        self._head = torch.cat([shares.repeat_interleave(self.page_size), shifts, flags])
        self._head_tables = with_flags(tables)

    def __deepcopy__(self, memo) -> SequenceCodec:
        return self  # immutable

    @property
    def predicts(self) -> bool:
        """Whether coding needs the tokens' embeddings."""
        return any(part.inputs[0] for part in self.parts)

    def at(self, step: int) -> SequenceCodec:
        """The same codec at another step."""
        return SequenceCodec(self.parts, self.along, self.tables, self.base, step)

    @functools.cached_property
    def fingerprint(self) -> bytes:
        """16 bytes of a SHA-256 of everything that decoding depends on, but the step."""
        digest = hashlib.sha256(repr((self.page_size, self.base)).encode())
        for part in self.parts:
            counts = torch.tensor([*part.inputs, part.share])
            for table in (counts, part.bias, part.predictor, part.synthesis, part.sizes, part.refined):
                digest.update(table.contiguous().numpy().tobytes())
        for table in (self.along, self.tables.frequencies):
            digest.update(table.contiguous().numpy().tobytes())
        return digest.digest()[:16]

    def encoder(self, embedded: torch.Tensor | None) -> SequenceEncoder:
        """An encoder of `N` pages with embeddings `[N, P, E]`, to which layers are added in order."""
        return SequenceEncoder(self, embedded)

    def decode(
        self, pages: Sequence[bytes], embedded: torch.Tensor | None, heads: Sequence[int]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Keys before RoPE and values of every layer in turn, `[N, H, P, D]` fp32.

        Args:
            embedded: `[N, P, E]`, of the same tokens as at encoding; None for a codec that needs none.
            heads: KV heads of each layer.

        Raises:
            FormatError: A page is truncated, damaged, of another version or of another codec.
        """
        # All that is stored is read first: damage is found before anything is handed out.
        read = on_threads(self._read, pages)
        decoding = [Decoding(self, embedded, span, read[span]) for span in spans(len(pages))]
        del read
        for count in heads:
            yield self.layer(decoding, count, Decoding.next)

    def layer(self, coding: Sequence[Span], heads: int, step: Callable) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[N, H, P, D]` fp32 of the next layer, once `step` has written each span's rows of them.

        Args:
            step: Takes a span and where its layer goes: two tensors `[N * P, W]`, all spans' rows.
        """
        at, tokens = coding[0].parts, coding[-1].rows.stop
        decoded = [torch.empty(tokens, width) for width in self._widths[at : at + 2].tolist()]
        on_threads(lambda span: step(span, decoded), coding)
        return tuple(x.unflatten(0, (-1, self.page_size)).unflatten(-1, (heads, -1)).transpose(1, 2) for x in decoded)

    # -- bytes ---------------------------------------------------------------------------------------------------

    def write(self, levels: torch.Tensor, loud: Sequence[torch.Tensor], quiet: torch.Tensor, fine) -> list[bytes]:
        """Stored pages of levels `[N, parts, P]` and symbols, int32.

        Args:
            loud, fine: Of each part's loud components `[N, P * c]`, and of its refinements `[n, W]`, tokens in order.
            quiet: Of all parts' quiet components, `[N, d, P]`.
        """
        kinds = [coder.kinds[SHIFTS] for coder in self.coders]
        shifts = torch.stack([best_shifts(*x, self._bits) for x in zip(loud, kinds, strict=True)], 1)
        counts = (levels > 0).sum(-1).T * self._widths[:, None]
        finer = [x.flatten().split(count) for x, count in zip(fine, counts.tolist(), strict=True)]
        active, pages = are_active(quiet), []
        for n in range(len(levels)):
            head, chosen = torch.cat([levels[n].flatten(), shifts[n], active[n]]), active[n].nonzero()[:, 0]
            coefficients = torch.cat([*(x[n] for x in loud), quiet[n, chosen].flatten()])
            streams = (
                (head.to(torch.int32), self._head, self._head_tables),
                (coefficients, self._coarse_classes(shifts[n], chosen), self.tables),
                (torch.cat([x[n] for x in finer]), self._fine_classes(levels[n]), self.tables),
            )
            pages.append(self._seal([entropy.encode(*stream) for stream in streams]))
        return pages

    def _coarse_classes(self, shifts: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        """Classes of the second stream of a page whose parts have these shifts, and which has these components."""
        loud = [coder.kinds[shift + SHIFTS] for coder, shift in zip(self.coders, shifts.tolist(), strict=True)]
        return torch.cat([*loud, self.quiet.classes(active, shifts)])

    def _fine_classes(self, levels: torch.Tensor) -> torch.Tensor:
        """Classes of the third stream of a page with levels `[parts, P]`."""
        places = (levels + LEVELS * torch.arange(len(levels))[:, None])[levels > 0]
        return torch.cat([self._finer[at] for at in [0, *places.tolist()]])

    def _header(self, sizes: Sequence[int]) -> bytes:
        shape = (self.page_size, len(self.parts))
        return _HEADER.pack(MAGIC, VERSION, self.step, *shape, *sizes, self.fingerprint, 0)[:-4]

    def _seal(self, streams: Sequence[bytes]) -> bytes:
        body, blank = b"".join(streams), self._header([len(stream) for stream in streams])
        return blank + struct.pack("<I", zlib.crc32(body, zlib.crc32(blank))) + body

    def _read(self, page: bytes) -> tuple[torch.Tensor, list[torch.Tensor], tuple, list[torch.Tensor]]:
        """Levels `[parts, P]` int64; symbols of parts' loud components `[P * c]`; numbers of active ones `[m]` among
        all parts' quiet ones, and their symbols `[m, P]`; those of parts' refinements `[n, W]`."""
        first, second, third = self._open(page)
        levels, shifts, active = self._read_head(first)
        found = entropy.decode(second, self._coarse_classes(shifts, active), self.tables)
        *loud, others = found.split([*self.sizes, len(active) * self.page_size])
        found = entropy.decode(third, self._fine_classes(levels), self.tables)
        counts = (levels > 0).sum(-1) * self._widths
        runs = zip(found.split(counts.tolist()), self._widths.tolist(), strict=True)
        return levels, loud, (active, others.view(-1, self.page_size)), [run.view(-1, width) for run, width in runs]

    def _read_head(self, stream: bytes) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Levels `[parts, P]` int64 of a page, shifts of its parts, and its active components."""
        found = entropy.decode(stream, self._head, self._head_tables).long()
        parts = len(self.parts)
        levels, shifts, flags = found.split([parts * self.page_size, parts, len(self.quiet.flags)])
        bad = ((flags < 0) | (flags > 1)).any()
        if bad or levels.min() < 0 or levels.max() > LEVELS or shifts.abs().max() > SHIFTS:
            raise FormatError(
                f"a level is not one of 0 to {LEVELS}, a shift beyond {SHIFTS} or a flag neither 0 nor 1: the page is "
                "damaged; drop it and prefill again"
            )
        return levels.unflatten(0, (parts, -1)), shifts, flags.nonzero()[:, 0]

    def _open(self, page: bytes) -> list[bytes]:
        if len(page) < _HEADER.size:
            raise FormatError(f"page of {len(page)} bytes is shorter than its {_HEADER.size}-byte header: truncated")
        magic, version, step, size, parts, *sizes, fingerprint, crc = _HEADER.unpack_from(page)
        if magic != MAGIC:
            raise FormatError(f"not a sequence page: magic is {magic!r}, must be {MAGIC!r}")
        if version != VERSION:
            raise FormatError(
                f"sequence page version {version}; this hf_seqkv reads version {VERSION}: use the hf_seqkv that wrote "
                "it, or drop it and prefill again"
            )
        body = page[_HEADER.size :]
        if len(body) != sum(sizes):
            raise FormatError(f"sequence page has {len(body)} bytes, its header promises {sum(sizes)}: truncated")
        if zlib.crc32(body, zlib.crc32(page[: _HEADER.size - 4])) != crc:
            raise FormatError("sequence page's checksum does not match: it is damaged; drop it and prefill again")
        mine = (self.step, self.page_size, len(self.parts), self.fingerprint)
        if (step, size, parts, fingerprint) != mine:
            raise FormatError(
                f"sequence page was written by another codec (step, page size, parts {(step, size, parts)}, "
                f"fingerprint {fingerprint.hex()}); this one is {mine[:3]}, {self.fingerprint.hex()}"
            )
        ends = list(itertools.accumulate(sizes))
        return [body[end - size : end] for size, end in zip(sizes, ends, strict=True)]


class SequenceEncoder:
    """Pages being encoded, layer by layer; see `SequenceCodec.encoder`."""

    def __init__(self, codec: SequenceCodec, embedded: torch.Tensor | None):
        self.codec, self._embedded = codec, embedded
        self._spans: list[Encoding] = []

    def add(self, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Code the next layer.

        Args:
            k, v: Keys before RoPE `[N, H, P, Dk]` and values `[N, H, P, Dv]`.
            positions: Of the tokens in their sequence, `[N, P]`.

        Returns:
            Both as decoded, fp32; later layers are predicted from them, so they must stay as they are.
        """
        self._spans = self._spans or [Encoding(self.codec, self._embedded, span) for span in spans(len(k))]
        return self.codec.layer(self._spans, k.shape[1], lambda span, out: span.add(k, v, positions, out))

    def coded(self, index: int) -> tuple[torch.Tensor, ...]:
        """What a part was coded to: levels `[N, P]`, and symbols as `PartCoder.encode` has them."""
        return tuple(map(torch.cat, zip(*(span.coded[index] for span in self._spans), strict=True)))

    def finish(self) -> list[bytes]:
        """The stored pages, once all layers were added."""
        return [page for pages in on_threads(Encoding.finish, self._spans) for page in pages]
