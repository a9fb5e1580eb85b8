"""Streams of the exact codec while heads are coded one after the other; see `exact.py`."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..errors import FormatError
from .exact_cells import TOTAL_BITS, interval_tables
from .exact_coder import LANES, code_head, write
from .exact_predict import Side

TOGETHER = 8  # pages coded at once: bounds the memory that takes


class Coding:
    """The streams of `N` pages while heads are coded one after the other."""

    def __init__(self, decoding: bool, states: np.ndarray, words: np.ndarray, places: np.ndarray, entries: np.ndarray):
        self.decoding, self.states, self.words, self.places, self.entries = decoding, states, words, places, entries
        self.at = 0

    @classmethod
    def encoder(cls, pages: int, symbols: int) -> Coding:
        blank = np.zeros((pages, LANES), np.uint64), np.zeros(1, np.uint16), np.zeros((pages, 2), np.uint64)
        return cls(False, *blank, np.empty((pages, symbols), np.uint32))

    @classmethod
    def decoder(cls, bodies: list[bytes]) -> Coding:
        """Raises FormatError for a body that cannot be a stream."""
        if any(len(body) % 2 for body in bodies):
            raise FormatError("exact page of an odd number of bytes: it is damaged; drop it and prefill again")
        states = np.stack([np.frombuffer(body, "<u4", LANES) for body in bodies]).astype(np.uint64)
        streams = [np.frombuffer(body, "<u2", offset=4 * LANES) for body in bodies]
        ends = np.cumsum([len(x) for x in streams])
        places = np.stack([ends - [len(x) for x in streams], ends], 1).astype(np.uint64)
        words = np.concatenate([*streams, np.zeros(LANES, np.uint16)]).astype(np.uint16)
        return cls(True, states, words, places, np.zeros((len(bodies), 1), np.uint32))

    def head(self, side: Side, head: int, codes, scales, means, expected, energy, adapts: bool) -> None:
        """Code a head of all pages; arguments as `code_head` has them.

        Raises:
            FormatError: Words are missing.
        """

        enough = code_head(
            self.decoding,
            codes,
            scales,
            side.wide,
            means,
            expected,
            side.narrowness[head],
            side.values,
            side.inverse[head],
            side.chain[head],
            side.rows[head],
            side.widths[head],
            side.edges,
            side.levels,
            side.scale_edges,
            interval_tables(),
            adapts,
            energy,
            self.states,
            self.words,
            self.places,
            self.entries,
            self.at,
        )
        if not enough:
            raise FormatError(
                "exact page's words are fewer than its codes take: it is of other surroundings or damaged"
            )
        self.at += (side.dim + 1 + side.wide) * codes.shape[2]

    def bits(self) -> np.ndarray:
        """What every symbol that was encoded takes, `[N, M]` float64."""
        return TOTAL_BITS - np.log2((self.entries >> 16).astype(np.float64))

    def streams(self) -> Iterator[bytes]:
        """What was encoded, page by page."""
        words, states = np.empty(self.entries.shape[1], np.uint16), np.empty(LANES, np.uint32)
        for page in self.entries:
            first = write(page, states, words)
            yield states.astype("<u4").tobytes() + words[first:].astype("<u2").tobytes()

    def finish(self) -> None:
        """Raises FormatError where what was decoded is not where encoding began."""
        if (self.places[:, 0] != self.places[:, 1]).any() or (self.states != 1 << 16).any():
            raise FormatError(
                "exact page does not end where it began: it is of other tokens, positions or key means than were "
                "given, or damaged; drop it and prefill again"
            )
