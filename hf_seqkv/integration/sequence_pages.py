"""Pages of a cache, coded by the sequence codec as they leave the dense window: all layers of one forward in turn."""

from __future__ import annotations

import torch

from ..codec.center import rotate
from ..codec.sequence import SequenceCodec, SequenceEncoder
from ..errors import ConfigError, UnsupportedOperationError
from .tap import embed


def refuse_ranks(cache) -> None:
    """Raise `ConfigError` where ranks share the model of a bound cache."""
    if cache.shard.ranks > 1:
        raise ConfigError(
            "the sequence codec codes all KV heads of a layer together, of which each rank of a tensor-parallel model "
            "has its own; store pages with form='hot' or 'exact', or load the model in one process"
        )


class SequencePages:
    """Coder of a cache's pages.

    Args:
        cache: It tracks positions and, for a codec that predicts, token ids.
        codec: All its parts are coded layers of the cache, in order.
    """

    def __init__(self, cache, codec: SequenceCodec):
        self.cache, self.codec = cache, codec
        self._encoders: dict[tuple, SequenceEncoder] = {}  # rows that begin alike are coded together
        self._done: list[tuple[list[int], int, list[bytes]]] = []

    def clear(self) -> None:
        """Forget what is not finished, of a forward that failed midway."""
        self._encoders.clear()
        self._done.clear()

    def add(self, index: int, rows: list[int], first: int, slot: int, k: torch.Tensor, v: torch.Tensor):
        """Code pages of a layer; arguments as `SeqKVCache.before_pages` has them.

        Returns:
            Keys and values as decoded, like `k` and `v`.

        Raises:
            UnsupportedOperationError: The codec predicts from token ids, and some were not seen.
        """
        count, size = k.shape[1], k.shape[3]
        place = slot + torch.arange(count * size).unflatten(0, (count, size))
        group = (*rows, first)
        if index == 0:
            self._encoders[group] = self.codec.encoder(self._embedded(rows, place))
        angles = self.angles(index, rows, slot, count * size).unflatten(1, (count, size))[:, :, None]
        interleaved = self.cache.table(index).interleaved
        plain = rotate(k.float(), angles, interleaved, inverse=True)
        begins = torch.tensor([self.cache.layers[index].start[row] for row in rows])
        positions = (place - begins[:, None, None]).flatten(0, 1)
        keys, values = self._encoders[group].add(plain.flatten(0, 1), v.flatten(0, 1), positions)
        keys, values = (x.unflatten(0, k.shape[:2]).to(k.device) for x in (keys, values))
        if 2 * index + 2 == len(self.codec.parts):
            self._done.append((rows, first, self._encoders.pop(group).finish()))
        return rotate(keys, angles, interleaved).to(k.dtype), values.to(v.dtype)

    def angles(self, index: int, rows: list[int], slot: int, count: int) -> torch.Tensor:
        """By which the codec's keys of `count` tokens differ from a layer's, `[rows, count, 2 * half]`."""
        table = self.cache.table(index)
        return torch.stack([table.tokens(row, slot, count) for row in rows])

    def _embedded(self, rows: list[int], place: torch.Tensor) -> torch.Tensor | None:
        if not self.codec.predicts:
            return None
        ids = self.cache.ids
        if ids is None:
            raise UnsupportedOperationError(
                "the sequence codec predicts from token ids, which the cache did not see; call the model with "
                "input_ids, and the cache's bind(model) before the first forward, or use profile='light'"
            )
        return embed(self.cache.model, ids[rows][:, place]).flatten(0, 1)

    def take(self) -> dict[tuple[int, int], list[bytes]]:
        """What was finished since the last call: pages by row and number of the first."""
        found = {}
        for rows, first, pages in self._done:
            each = len(pages) // len(rows)
            found |= {(row, first): pages[i * each : (i + 1) * each] for i, row in enumerate(rows)}
        self._done.clear()
        return found
