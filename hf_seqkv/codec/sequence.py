"""The sequence codec: pages of all layers, predicted, transformed and entropy-coded.

Coding goes layer by layer, keys then values, over the `P` tokens of a page at once. One *part* is one side of a layer:

1. prediction: linear in the token's embedding, in the decoded keys and values of the two layers before and, for values,
   in the decoded keys of their own layer. Keys are taken before RoPE.
2. transform: the residual times a matrix that whitens what the model's output feels and removes correlation across
   heads and components; then a DCT along the page's tokens, after which errors do not add up over tokens.
3. quantisation: `deadzone.py`, one step for everything; classes tell the expected size of each coefficient in it, and
   a page moves all those of a part by a shift of its own.
4. refinement: tokens on which much depends (`importance.py`) get their error coded again with a step of `2**-level`.
5. entropy coding: `entropy.py`, with static tables. Symbols depend on integers alone; predictions only shift what they
   are added to, so that arithmetic that differs between machines moves a result by rounding and never loses a stream.

Steps are counted in quarter octaves from the calibration's own (`step` of -4 is half of it). The expected sizes were
measured at three steps (`LADDER`) and lie on the line between them elsewhere.

A stored page, little-endian: magic `SKVS`, version u16, step i16, page size u16, parts u16, bytes of three streams u32
each, codec fingerprint 16 bytes, CRC-32 of all but itself u32; then the streams. The first holds the levels of all
parts and their shifts, the second their coefficients, the third the refined tokens' symbols, part by part, token by
token.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import struct
import zlib
from collections.abc import Iterator, Sequence

import torch

from ..errors import FormatError
from . import entropy, importance
from .deadzone import DeadZone
from .importance import LEVELS
from .sequence_part import LEVEL_CLASSES, SHIFT_CLASS, SHIFTS, Context, Part, PartCoder, best_shifts
from .symbol_tables import SymbolTables
from .threads import on_threads, spans

MAGIC, VERSION = b"SKVS", 1
_HEADER = struct.Struct("<4sHhHHIII16sI")


class SequenceCodec:
    """Codec of the pages of all coded layers at one step.

    Args:
        parts: Keys and values of every layer, in the order in which layers run.
        along: Orthogonal transform of a page's tokens, `[P, P]`, rows are the basis.
        tables: Of `sequence_part.CLASSES` classes.
        offsets: Reconstruction points, `[CLASSES, 3]`; see `deadzone.py`.
        base: Step 0, in units of the coefficients.
        step: Quarter octaves from it.

    Layers may differ in heads and head dims; pages are of `P` tokens each.
    """

    def __init__(
        self, parts: Sequence[Part], along, tables: SymbolTables, offsets: torch.Tensor, base: float, step: int
    ):
        self.parts, self.along, self.tables, self.offsets = list(parts), along, tables, offsets
        self.base, self.step, self.page_size = base, step, len(along)
        self._bits = tables.bits()
        self.coders = [PartCoder(part, along, step, base, self._bits, offsets) for part in parts]
        self._zone = DeadZone.joined([coder.coarse for coder in self.coders], self._bits, offsets)
        self._sizes = [part.sizes[0].numel() for part in parts]
        shares = torch.tensor([part.share + LEVEL_CLASSES for part in parts], dtype=torch.uint8)
        shifts = torch.full((len(parts),), SHIFT_CLASS, dtype=torch.uint8)
        self._head = torch.cat([shares.repeat_interleave(self.page_size), shifts])

    def __deepcopy__(self, memo) -> SequenceCodec:
        return self  # immutable

    @property
    def predicts(self) -> bool:
        """Whether coding needs the tokens' embeddings."""
        return self.parts[0].predictor is not None

    def at(self, step: int) -> SequenceCodec:
        """The same codec at another step."""
        return SequenceCodec(self.parts, self.along, self.tables, self.offsets, self.base, step)

    @functools.cached_property
    def fingerprint(self) -> bytes:
        """16 bytes of a SHA-256 of everything that decoding depends on, but the step."""
        digest = hashlib.sha256(repr((self.page_size, self.base)).encode())
        for part in self.parts:
            tables = [part.bias, part.predictor, part.synthesis, part.sizes, part.refined, torch.tensor(part.share)]
            for table in tables:
                digest.update(b"" if table is None else table.contiguous().numpy().tobytes())
        for table in (self.along, self.tables.frequencies, self.offsets):
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
            embedded: `[N, P, E]`, of the same tokens as at encoding; None for a codec that does not predict.
            heads: KV heads of each layer.

        Raises:
            FormatError: A page is truncated, damaged, of another version or of another codec.
        """
        coefficients = torch.empty(len(pages), sum(self._sizes))

        def read(n: int):
            levels, coarse, fine = self._read(pages[n])
            self._zone.dequantise(coarse[None], torch.zeros(1, dtype=torch.int64), coefficients[n : n + 1])
            return levels, fine

        # All that is done page by page first: damage is found before anything is handed out, and torch's threads rest
        # meanwhile, whose products are faster for all pages together.
        levels, fine = zip(*on_threads(read, range(len(pages))), strict=True)
        levels, fine = torch.stack(levels, 1), [torch.cat(x) for x in zip(*fine, strict=True)]
        context = Context(embedded)
        for index, (coder, rebuilt) in enumerate(zip(self.coders, coefficients.split(self._sizes, 1), strict=True)):
            predicted = context.predict(coder.part)
            context.add(coder.decode(rebuilt, fine[index], levels[index].flatten(), predicted))
            if index % 2:
                yield tuple(self._heads(x, heads[index // 2]) for x in context.layers[0])

    def _heads(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        return x.unflatten(0, (-1, self.page_size)).unflatten(-1, (heads, -1)).transpose(1, 2)

    # -- bytes ---------------------------------------------------------------------------------------------------

    def write(self, levels: torch.Tensor, coarse: Sequence[torch.Tensor], fine: Sequence[torch.Tensor]) -> list[bytes]:
        """Stored pages.

        Args:
            levels: `[N, parts, P]` int64.
            coarse, fine: Symbols of each part, `[N, P * W]` and `[n, W]` int32, tokens in order.
        """
        pages = len(levels)
        classes = [coder.coarse.classes[0] for coder in self.coders]
        shifts = torch.stack([best_shifts(*x, self._bits) for x in zip(coarse, classes, strict=True)], 1)
        counts = [(levels[:, i] > 0).sum(-1).tolist() for i in range(len(self.parts))]
        finer = [x.split(count) for x, count in zip(fine, counts, strict=True)]
        symbols = [torch.cat([levels[n].flatten(), shifts[n]]).to(torch.int32) for n in range(pages)]
        symbols += [torch.cat([x[n] for x in coarse]) for n in range(pages)]
        symbols += [torch.cat([x[n].flatten() for x in finer]) for n in range(pages)]
        kinds = [self._head] * pages + [self._coarse_classes(x) for x in shifts.tolist()]
        kinds += [self._fine_classes(x) for x in levels]
        streams = [entropy.encode(*pair, self.tables) for pair in zip(symbols, kinds, strict=True)]
        return [self._seal(streams[n::pages]) for n in range(pages)]

    def _coarse_classes(self, shifts: list[int]) -> torch.Tensor:
        """Classes of the second stream of a page whose parts have these shifts."""
        return torch.cat([coder.kinds[shift + SHIFTS] for coder, shift in zip(self.coders, shifts, strict=True)])

    def _fine_classes(self, levels: torch.Tensor) -> torch.Tensor:
        """Classes of the third stream of a page with levels `[parts, P]`."""
        found = [coder.fine.classes[row[row > 0] - 1].flatten() for coder, row in zip(self.coders, levels, strict=True)]
        return torch.cat(found)

    def _header(self, sizes: Sequence[int]) -> bytes:
        shape = (self.page_size, len(self.parts))
        return _HEADER.pack(MAGIC, VERSION, self.step, *shape, *sizes, self.fingerprint, 0)[:-4]

    def _seal(self, streams: Sequence[bytes]) -> bytes:
        body, blank = b"".join(streams), self._header([len(stream) for stream in streams])
        return blank + struct.pack("<I", zlib.crc32(body, zlib.crc32(blank))) + body

    def _read(self, page: bytes) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Levels `[parts, P]` int64, coefficients' symbols of all parts `[M]`, refinements' of every part `[n, W]`."""
        first, second, third = self._open(page)
        levels, shifts = self._read_head(first)
        coarse = entropy.decode(second, self._coarse_classes(shifts), self.tables)
        found = entropy.decode(third, self._fine_classes(levels), self.tables)
        widths = [part.sizes.shape[2] for part in self.parts]
        counts = (levels > 0).sum(-1).tolist()
        runs = found.split([count * width for count, width in zip(counts, widths, strict=True)])
        return levels, coarse, [run.unflatten(0, (-1, width)) for run, width in zip(runs, widths, strict=True)]

    def _read_head(self, stream: bytes) -> tuple[torch.Tensor, list[int]]:
        """Levels `[parts, P]` int64 of a page and shifts of its parts."""
        found = entropy.decode(stream, self._head, self.tables).long()
        levels, shifts = found.split([len(self.parts) * self.page_size, len(self.parts)])
        if levels.min() < 0 or levels.max() > LEVELS or shifts.abs().max() > SHIFTS:
            raise FormatError(
                f"a level is not one of 0 to {LEVELS}, or a shift beyond {SHIFTS}: the page is damaged; drop it and "
                "prefill again"
            )
        return levels.unflatten(0, (len(self.parts), -1)), shifts.tolist()

    def _open(self, page: bytes) -> list[bytes]:
        if len(page) < _HEADER.size:
            raise FormatError(f"page of {len(page)} bytes is shorter than its {_HEADER.size}-byte header: truncated")
        magic, version, step, size, parts, *sizes, fingerprint, crc = _HEADER.unpack_from(page)
        if magic != MAGIC:
            raise FormatError(f"not a sequence page: magic is {magic!r}, must be {MAGIC!r}")
        if version != VERSION:
            raise FormatError(f"sequence page version {version}; this hf_seqkv reads version {VERSION}: upgrade it")
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


def _of(embedded: torch.Tensor | None, span: slice) -> torch.Tensor | None:
    return None if embedded is None else embedded[span]


class SequenceEncoder:
    """Pages being encoded, layer by layer; see `SequenceCodec.encoder`."""

    def __init__(self, codec: SequenceCodec, embedded: torch.Tensor | None):
        self.codec, self._embedded = codec, embedded
        self._spans: list[_Span] = []

    def add(self, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Code the next layer.

        Args:
            k, v: Keys before RoPE `[N, H, P, Dk]` and values `[N, H, P, Dv]`.
            positions: Of the tokens in their sequence, `[N, P]`.

        Returns:
            Both as decoded, fp32.
        """
        self._spans = self._spans or [_Span(self.codec, self._embedded, span) for span in spans(len(k))]
        # Written where it belongs by each thread: joining it here would wake torch's threads, which then spin.
        decoded = torch.empty(k.shape), torch.empty(v.shape)
        on_threads(lambda span: span.add(k, v, positions, decoded), self._spans)
        return decoded

    def coded(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What a part was coded to: levels `[N, P]`, coefficients' symbols `[N, P * W]`, refinements' `[n, W]`."""
        return tuple(map(torch.cat, zip(*(span.coded[index] for span in self._spans), strict=True)))

    def finish(self) -> list[bytes]:
        """The stored pages, once all layers were added."""
        return [page for pages in on_threads(_Span.finish, self._spans) for page in pages]


class _Span:
    """Pages that one thread encodes."""

    def __init__(self, codec: SequenceCodec, embedded: torch.Tensor | None, span: slice):
        self.codec, self.span = codec, span
        self.context = Context(_of(embedded, span))
        self.coded: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def add(self, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, decoded: Sequence[torch.Tensor]) -> None:
        """As `SequenceEncoder.add`, of the span's pages among all; what they decode to goes into `decoded`."""
        k, v = (x[self.span].float().cpu().transpose(1, 2).flatten(0, 1) for x in (k, v))  # [N * P, H, D]
        found = importance.features(k, v, positions[self.span].flatten())
        for x, out in zip((k, v), decoded, strict=True):
            coder = self.codec.coders[len(self.coded)]
            levels = importance.levels(found, coder.part.importance)
            coarse, fine, held = coder.encode(x.flatten(1), self.context.predict(coder.part), levels)
            out[self.span] = self.codec._heads(held, x.shape[1])
            self.context.add(held)
            self.coded.append((levels.unflatten(0, (-1, self.codec.page_size)), coarse, fine))

    def finish(self) -> list[bytes]:
        levels, coarse, fine = zip(*self.coded, strict=True)
        return self.codec.write(torch.stack(levels, 1), coarse, fine)
