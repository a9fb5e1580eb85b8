"""`SequenceCache`: a cache whose pages hold what the sequence codec makes of them, with the bytes that takes.

The moment a page leaves the dense window is the one moment its dense keys and values are at hand: there the sequence
codec codes it, all layers of one forward in turn, and the cache attends to the decoded tokens, as one woken from those
bytes would.
"""

from __future__ import annotations

import math

import torch

from ..calibration.artifact import SeqKVCalibration
from ..codec.center import rotate
from ..codec.sequence import SequenceEncoder
from ..errors import UnsupportedOperationError
from .cache import SeqKVCache
from .model_facts import model_facts
from .tap import embed


class SequenceCache(SeqKVCache):
    """A `SeqKVCache` on top of sequence pages.

    Args:
        config: The model's config.
        calibration: With a sequence codec.
        profile, step: See `SeqKVCalibration.sequence_codec`.
        **options: Fields of `SeqKVConfig`: what holds the decoded tokens, dense pages unless said otherwise.

    Raises:
        ConfigError: The calibration has no such codec, or an option is invalid.
        CalibrationMismatchError: It was made for another model.
    """

    def __init__(self, config, calibration: SeqKVCalibration, profile: str = "full", step: int | str = 0, **options):
        super().__init__(config, **{"method": "dense"} | options)
        calibration.check(model_facts(config.get_text_config(decoder=True)))
        self.sequence = calibration.sequence_codec(profile, step)
        self.ids: torch.Tensor | None = None  # [B, slots]
        self.stored: list[bytes] = []
        self._values = 0
        self._encoders: dict[tuple, SequenceEncoder] = {}  # rows that begin alike are coded together

    centers_keys = True  # positions are tracked for keys' constant part, and are what undoing RoPE needs

    def bind(self, model) -> None:
        super().bind(model)
        self.model = model

    def __deepcopy__(self, memo):
        for shared in (getattr(self, "model", None), self.sequence):
            memo[id(shared)] = shared
        return super().__deepcopy__(memo)

    def reset(self) -> None:
        super().reset()
        self.ids, self.stored, self._values = None, [], 0

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.ids = None if self.ids is None else self.ids[:, : self.get_seq_length()]

    def _select(self, index: torch.Tensor) -> None:
        super()._select(index)
        self.ids = None if self.ids is None else self.ids[index]

    def note_ids(self, ids: torch.Tensor | None) -> None:
        if not self.sequence.predicts:
            return
        if ids is None:
            raise UnsupportedOperationError(
                "the sequence codec predicts from token ids, this forward was given embeddings; call the model with "
                "input_ids, or use profile='light' or the plain SeqKVCache"
            )
        self.ids = ids.cpu() if self.ids is None else torch.cat([self.ids, ids.cpu()], 1)

    def before_pages(self, index, rows, first, slot, k, v):
        """Code the pages; all coded layers of a forward make the same ones, in order."""
        count, size = k.shape[1], k.shape[3]
        place = slot + torch.arange(count * size).unflatten(0, (count, size))
        group = (*rows, slot)
        if index == 0:
            embedded = None
            if self.sequence.predicts:
                embedded = embed(self.model, self.ids[rows][:, place]).flatten(0, 1)
            self._encoders[group] = self.sequence.encoder(embedded)
        table = self.table(index)
        angles = torch.stack([table.tokens(row, slot, count * size) for row in rows])
        angles = angles.unflatten(1, (count, size))[:, :, None]  # [rows, N, 1, P, 2 * half]
        plain = rotate(k.float(), angles, table.interleaved, inverse=True)
        begins = torch.tensor([self.layers[index].start[row] for row in rows])
        positions = (place - begins[:, None, None]).flatten(0, 1)
        keys, values = self._encoders[group].add(plain.flatten(0, 1), v.flatten(0, 1), positions)
        keys, values = (x.unflatten(0, k.shape[:2]).to(k.device) for x in (keys, values))
        self._values += k.numel() + v.numel()
        if 2 * index + 2 == len(self.sequence.parts):
            self.stored += self._encoders.pop(group).finish()
        return rotate(keys, angles, table.interleaved).to(k.dtype), values.to(v.dtype)

    def stored_bits_per_value(self) -> float:
        """Bytes of the sequence pages, headers included, x 8 / the key and value components in them."""
        return 8 * sum(map(len, self.stored)) / self._values if self._values else math.nan
