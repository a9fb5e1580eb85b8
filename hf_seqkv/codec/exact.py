"""The exact codec: hot pages of all layers, without loss, in about six tenths of their bytes.

A page's codes are predicted from everything about its tokens that was decoded before, layer by layer, keys then values,
head by head (`exact_predict.py`), and coded by where they lie in the distribution around that (`exact_coder.py`).
Payloads come back byte by byte, on every machine: all that coding depends on is exact (`exact_part.py`).

A stored page, little-endian: magic `SKVX`, version u16, form u16, page size u16, layers u16, bytes of the body u32,
codec fingerprint 16 bytes, CRC-32 of the payloads u32, CRC-32 of all but itself u32; then the body. In form 1 the body
is the payloads of all layers, one after the other: of pages that are not smaller coded. In form 0 it is 8 states u32
and words u16, in the order in which they are read: for each layer, for keys, then values, and each head, 8 tokens at a
time, their scales (of 16 bits as two bytes, high byte first), then their codes, component by component.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from ..errors import FormatError
from .exact_coder import LANES
from .exact_part import embedding_inputs
from .exact_payload import blank, close_payloads, open_payloads
from .exact_predict import Nowhere, Side
from .exact_stream import TOGETHER, Coding
from .exact_tables import SIDES, ExactTables
from .page import QuantizedPageCodec
from .sequence_part import Part
from .surroundings import Surroundings
from .threads import on_threads, spans

MAGIC, VERSION = b"SKVX", 1
_HEADER = struct.Struct("<4sHHHHI16sII")
_CODED, _RAW = 0, 1


class ExactCodec:
    """Codec of the pages of all coded layers.

    Args:
        pages: Of each layer.
        parts: Of a sequence codec that predicts: the embedding's weights are taken from them.
        tables: Fitted to such pages and parts; without both, codes are coded by what their codebooks tell.

    Raises:
        FormatError: Pages, parts and tables do not fit together.
    """

    def __init__(
        self,
        pages: Sequence[QuantizedPageCodec],
        parts: Sequence[Part] | None = None,
        tables: ExactTables | None = None,
    ):
        if len({page.page_size for page in pages}) != 1:
            raise FormatError(f"pages of {sorted({page.page_size for page in pages})} tokens; all must be of one size")
        self.pages, self.tables = [page.to("cpu") for page in pages], tables
        self.page_size = pages[0].page_size
        self.predicts = tables is not None
        self.embeds = self.predicts and tables.embedded
        if self.predicts:
            tables.check(pages)
        if self.embeds and (parts is None or len(parts) != 2 * len(pages) or not any(p.inputs[0] for p in parts)):
            raise FormatError(
                "the exact tables need the parts of a sequence codec of these layers that predicts; give those of "
                "profile 'full', or no tables"
            )
        self.sides: list[tuple[Side, Side]] = []
        for layer, page in enumerate(self.pages):
            pair = []
            for i, codec in enumerate((page.key, page.value)):
                part = tables.parts[2 * layer + i] if self.predicts else None
                rows = parts[2 * layer + i].embedding if self.embeds else None
                pair.append(Side(codec, part, rows, f"{layer}.{SIDES[i]}"))
            self.sides.append(tuple(pair))
        self.fingerprint = self._fingerprint()

    def _fingerprint(self) -> bytes:
        """16 bytes of a SHA-256 of everything that decoding depends on."""
        digest = hashlib.sha256(b"exact" + b"".join(page.fingerprint for page in self.pages))
        if self.predicts:
            for pair in self.sides:
                for side in pair:
                    for matrix, scales in side.transform.matrices:
                        digest.update(matrix.tobytes() + scales.tobytes())
                    digest.update(side.weights.tobytes())
            for name, x in sorted(self.tables.tensors().items()):
                digest.update(name.encode() + x.numpy().tobytes())
        return digest.digest()[:16]

    # -- pages ---------------------------------------------------------------------------------------------------

    def encode(self, pages: Sequence[torch.Tensor], around: Surroundings) -> list[bytes]:
        """Stored forms of `N` pages, each of all layers.

        Args:
            pages: Payloads of each layer, `[N, page_bytes]` uint8.
        """

        def sealed(span: slice) -> list[bytes]:
            few, numbers, coding = self._encoded(pages, around, span)
            stored = []
            # Beside codes and scales there are zeros; a page where there are others is kept as it is.
            plain = [close_payloads(page, x) for page, x in zip(self.pages, numbers, strict=True)]
            for n, coded in enumerate(coding.streams()):
                payload = b"".join(x[n].numpy().tobytes() for x in few)
                whole = all(torch.equal(a[n], b[n]) for a, b in zip(few, plain, strict=True))
                stored.append(self._seal(coded if whole else payload, payload))
            return stored

        return [page for stored in on_threads(sealed, spans(len(pages[0]), TOGETHER)) for page in stored]

    def lengths(self, pages: Sequence[torch.Tensor], around: Surroundings) -> np.ndarray:
        """Bits that keys and values of each layer take in `N` pages, headers aside: `[layers, 2]` float64."""
        counts = [self._count(side) for pair in self.sides for side in pair]

        def taken(span: slice) -> list[float]:
            bits = self._encoded(pages, around, span)[2].bits().sum(0)
            return [x.sum() for x in np.split(bits, np.cumsum(counts)[:-1])]

        return np.sum(on_threads(taken, spans(len(pages[0]), TOGETHER)), 0).reshape(-1, 2)

    def _encoded(self, pages: Sequence[torch.Tensor], around: Surroundings, span: slice) -> tuple:
        """Some of the pages: their payloads, what is in them, and their streams."""
        few = [x[span].cpu() for x in pages]
        numbers = [open_payloads(page, x) for page, x in zip(self.pages, few, strict=True)]
        coding = Coding.encoder(len(few[0]), sum(self._count(side) for pair in self.sides for side in pair))
        self._run(numbers, around.part(span), coding)
        return few, numbers, coding

    def _count(self, side: Side) -> int:
        """Symbols of a side of a page."""
        return (side.dim + 1 + side.wide) * side.heads * self.page_size

    def decode(self, data: Sequence[bytes], around: Surroundings) -> list[torch.Tensor]:
        """Inverse of `encode`: payloads of each layer, `[N, page_bytes]` uint8.

        Raises:
            FormatError: A page is truncated, damaged, of another version, of another codec, or of other surroundings.
        """
        opened = [self._unseal(page) for page in data]
        found = [torch.zeros(len(data), page.page_bytes, dtype=torch.uint8) for page in self.pages]
        coded = [n for n, (form, *_) in enumerate(opened) if form == _CODED]

        def fill(span: slice) -> None:
            at = torch.tensor(coded[span])
            numbers = [blank(page, len(at)) for page in self.pages]
            coding = Coding.decoder([opened[n][1] for n in coded[span]])
            self._run(numbers, around.part(at), coding)
            coding.finish()
            for page, x, out in zip(self.pages, numbers, found, strict=True):
                out[at] = close_payloads(page, x)

        on_threads(fill, spans(len(coded), TOGETHER))
        for n, (form, body, crc) in enumerate(opened):
            if form == _RAW:
                rest = torch.frombuffer(bytearray(body), dtype=torch.uint8)
                for x, out in zip(rest.split([page.page_bytes for page in self.pages]), found, strict=True):
                    out[n] = x
            if _checksum(x[n] for x in found) != crc:
                raise FormatError(
                    "exact page decodes to something else than was encoded: it is of other tokens, positions or key "
                    "means than were given; drop it and prefill again"
                )
        return found

    def _run(self, numbers: list[tuple], around: Surroundings, coding: Coding) -> None:
        """Code all layers' codes and scales; see `open_payloads`."""
        pages = len(numbers[0][0])
        tokens = pages * self.page_size
        embedded = None
        if self.embeds:
            if around.embedded is None:
                raise ValueError("this codec predicts from the tokens' embeddings, Surroundings.embedded is None")
            embedded = embedding_inputs(around.embedded.float().cpu().flatten(0, 1).numpy())
        energy = np.ones((pages, self.page_size))
        below: list[np.ndarray] = []  # inputs of the two layers below, latest first
        for layer, pair in enumerate(self.sides):
            place, own = around.place(layer) if self.predicts else None, []
            for i, side in enumerate(pair):
                codes, scales = numbers[layer][2 * i : 2 * i + 2]
                energy = 0.5 * (energy + 1.0)
                if self.predicts:
                    predicted = side.predict(embedded, [*below, *own], tokens)
                    where = Nowhere() if i else place
                    own.append(side.learn(self._heads(side, codes, scales, predicted, where, energy, coding)))
                    continue
                means, expected = np.zeros((pages, self.page_size, side.dim)), np.full(energy.shape, side.usual)
                for head in range(side.heads):
                    coding.head(side, head, codes[:, head], scales[:, head], means, expected, energy, True)
            below = [*own, *below][:4]

    def _heads(self, side: Side, codes, scales, predicted: np.ndarray, where, energy, coding: Coding) -> np.ndarray:
        """Code a side's heads in turn; returns its components as decoded, keys before RoPE, `[N * P, W]`."""
        raw = np.empty_like(predicted)
        missed = np.zeros(predicted.shape, np.float32)
        shape = codes.shape[0], self.page_size
        for head in range(side.heads):
            span = slice(head * side.dim, (head + 1) * side.dim)
            side.sharpen(predicted, head, missed)
            means, expected = side.expect(side.transform.encode(head, where.to_cache(predicted[:, span], head)), head)
            coding.head(
                side,
                head,
                codes[:, head],
                scales[:, head],
                means.reshape(*shape, -1),
                expected.reshape(shape),
                energy,
                self.tables.adapts,
            )
            values = side.values[scales[:, head]]
            decoded = where.to_plain(side.transform.decode(head, codes[:, head], values), head)
            # A token held elsewhere counts as predicted.
            raw[:, span] = np.where(values.reshape(-1, 1) > 0, decoded, predicted[:, span])
            missed[:, span] = side.miss(raw[:, span], predicted[:, span], head)
        return raw

    # -- bytes ---------------------------------------------------------------------------------------------------

    def _seal(self, coded: bytes, payload: bytes) -> bytes:
        form, body = (_CODED, coded) if len(coded) < len(payload) else (_RAW, payload)
        shape = (form, self.page_size, len(self.pages), len(body))
        head = _HEADER.pack(MAGIC, VERSION, *shape, self.fingerprint, zlib.crc32(payload), 0)[:-4]
        return head + struct.pack("<I", zlib.crc32(body, zlib.crc32(head))) + body

    def _unseal(self, page: bytes) -> tuple[int, bytes, int]:
        """Form, body, and the payloads' checksum."""
        if len(page) < _HEADER.size:
            raise FormatError(f"page of {len(page)} bytes is shorter than its {_HEADER.size}-byte header: truncated")
        magic, version, form, size, layers, length, fingerprint, inner, crc = _HEADER.unpack_from(page)
        if magic != MAGIC:
            raise FormatError(f"not an exact page: magic is {magic!r}, must be {MAGIC!r}")
        if version != VERSION:
            raise FormatError(f"exact page version {version}; this hf_seqkv reads version {VERSION}: upgrade it")
        body = page[_HEADER.size :]
        if len(body) != length:
            raise FormatError(f"exact page has {len(body)} bytes, its header promises {length}: truncated")
        if zlib.crc32(body, zlib.crc32(page[: _HEADER.size - 4])) != crc:
            raise FormatError("exact page's checksum does not match: it is damaged; drop it and prefill again")
        mine = (self.page_size, len(self.pages), self.fingerprint)
        least = 4 * LANES if form == _CODED else sum(page.page_bytes for page in self.pages)
        if (size, layers, fingerprint) != mine or form not in (_CODED, _RAW) or length < least:
            raise FormatError(
                f"exact page was written by another codec (form, page size, layers {(form, size, layers)}, fingerprint "
                f"{fingerprint.hex()}); this one is {mine[:2]}, {self.fingerprint.hex()}"
            )
        return form, body, inner


def _checksum(payloads: Iterable[torch.Tensor]) -> int:
    """CRC-32 of payloads one after the other."""
    crc = 0
    for payload in payloads:
        crc = zlib.crc32(payload.numpy(), crc)
    return crc
