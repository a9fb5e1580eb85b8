"""`SequenceCache`: a cache whose pages hold what the sequence codec makes of them, with the bytes that takes.

The moment a page leaves the dense window is the one moment its dense keys and values are at hand: there the sequence
codec codes it, and the cache attends to the decoded tokens, as one woken from those bytes would.
"""

from __future__ import annotations

import math

from ..calibration.artifact import SeqKVCalibration
from .cache import SeqKVCache
from .codecs import kept
from .model_facts import model_facts
from .sequence_pages import SequencePages, refuse_ranks


class SequenceCache(SeqKVCache):
    """A `SeqKVCache` on top of sequence pages.

    Args:
        config: The model's config.
        calibration: With a sequence codec.
        profile, step: See `SeqKVCalibration.sequence_codec`.
        pages: The coder of pages, a `SequencePages`.
        **options: Fields of `SeqKVConfig`: what holds the decoded tokens, dense pages unless said otherwise.

    Raises:
        ConfigError: The calibration has no such codec, or an option is invalid; when it is bound, that ranks share the
            model.
        CalibrationMismatchError: It was made for another model.
    """

    def __init__(
        self,
        config,
        calibration: SeqKVCalibration,
        profile: str = "full",
        step: int | str = 0,
        pages: type[SequencePages] = SequencePages,
        **options,
    ):
        super().__init__(config, **{"method": "dense"} | options)
        calibration.check(model_facts(config.get_text_config(decoder=True)))
        self.tracks_positions = True
        self.sequence = kept(calibration, (profile, step), lambda: calibration.sequence_codec(profile, step))
        self.coder = pages(self, self.sequence)
        self.stored: list[bytes] = []
        self._values = 0

    def bind(self, model) -> None:
        super().bind(model)
        refuse_ranks(self)

    def reset(self) -> None:
        super().reset()
        self.stored, self._values = [], 0
        self.coder.clear()

    def before_pages(self, index, rows, first, slot, k, v):
        """Code the pages, and hold them as decoded."""
        decoded = self.coder.add(index, rows, first, slot, k, v)
        self._values += k.numel() + v.numel()
        self.stored += [page for pages in self.coder.take().values() for page in pages]
        return decoded

    def stored_bits_per_value(self) -> float:
        """Bytes of the sequence pages, headers included, x 8 / the key and value components in them."""
        return 8 * sum(map(len, self.stored)) / self._values if self._values else math.nan
