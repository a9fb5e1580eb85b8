"""The specification of `attend_codes`, in plain torch, fp32, on any device.

Reads like the definition: decode a run of pages, score, mask, softmax, mix. Only the online softmax over runs is not
part of the definition; it keeps memory at one run of decoded tokens instead of the whole history.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ..codec.center import Center
from ..codec.page import PageCodec
from .interface import LayerView, Scoring
from .numbers import settled

RUN = 1024  # tokens decoded at once


def attend_codes(query: torch.Tensor, view: LayerView, mask: torch.Tensor | None, scoring: Scoring) -> torch.Tensor:
    """Attention of new queries over a layer's cache.

    Args:
        query: `[B, Hq, Tq, Dk]`, rotated as the model rotates it, any float dtype.
        view: The layer's cache, new tokens included.
        mask: `[B or 1, Hq or 1, Tq, >= length - offset]`, bool (True is seen) or added to the scores; None for none.
        scoring: Scale, window, softcap, sink logits.

    Returns:
        `[B, Tq, Hq, Dv]`, contiguous, in the query's dtype. A query that sees nothing gets zeros.
    """
    view = settled(view)

    def decode(first: int, last: int):
        k, v = (x.float() for x in view.codec.decode(view.pages[:, first:last]))
        return k if view.center is None else k + view.center.keys(first, last), v

    softmax = OnlineSoftmax(query, view, mask, scoring, view.codec.value_dim)
    for row, k, v, slots, absent in runs(view, decode):
        softmax.add(row, k, v, slots, absent)
    return softmax.result().to(query.dtype)


def runs(view: LayerView, decode: Callable, dense: Callable = lambda row, k, v: (k, v)) -> Iterator[tuple]:
    """Tokens of a view in turn: `(row, k [H, T, D], v [H, T, D], slots [T], absent [H, T] or None)`, fp32.

    Args:
        decode: Numbers of a first and a last page to keys and values `[B, N, H, P, D]` of the pages between.
        dense: Row, keys and values of dense tokens to what stands for them.
    """
    for run in (view.sinks, view.recent):
        token = torch.arange(run.k.shape[2])
        for row, begin in enumerate(run.begin):
            k, v = (x[row, :, begin:].float() for x in (run.k, run.v))
            yield row, *dense(row, k, v), run.slots[row] + token[begin:], None
    if view.side is not None:
        for row in range(len(view.counts)):
            held = view.side.slots[row] >= 0
            k, v = (x[row, :, held].float() for x in (view.side.k, view.side.v))
            yield row, *dense(row, k, v), view.side.slots[row][held], None

    codec, step = view.codec, max(1, RUN // view.codec.page_size)
    for first in range(0, max(view.counts, default=0), step):
        last = min(first + step, max(view.counts))
        k, v = decode(first, last)
        for row, count in enumerate(view.counts):
            valid = max(0, min(last, count) - first)
            slots = view.page_slots[row] + first * codec.page_size + torch.arange(valid * codec.page_size)
            pages = (x[row, :valid].transpose(0, 1).flatten(1, 2) for x in (k, v))
            absent = codec.absent(view.pages[row, first : first + valid]).transpose(0, 1).flatten(1)
            yield row, *pages, slots, absent


def encode_pages(codec: PageCodec, k: torch.Tensor, v: torch.Tensor, center: Center | None) -> torch.Tensor:
    """Pages of dense tokens, the constant part taken from the keys.

    Args:
        k, v: Finite keys `[B, N, H, P, Dk]` and values `[B, N, H, P, Dv]` of `N` pages a row.
        center: Constant part of the keys, with the starts of these pages; None where keys have none.

    Returns:
        `[B, N, page_bytes]` uint8.
    """
    if center is not None:
        k = k.float() - center.keys(0, k.shape[1])
    return codec.encode(k, v)


def unpack_pages(codec: PageCodec, pages: torch.Tensor, side: int) -> torch.Tensor:
    """What the codes of `pages [..., page_bytes]` say: `codec.restore` makes keys (`side=0`) or values of it.

    Returns:
        `[..., H, P, D]`; keys are without their constant part.
    """
    return codec.coordinates(pages, side)


class OnlineSoftmax:
    """Running maximum, denominator and output of every query. Source: Milakov and Gimelshein, arXiv 1805.02867.

    Args:
        constant: Added to a query's products with all keys, `[B, Hq, Tq]`.
    """

    def __init__(self, query, view, mask, scoring, value_dim: int, constant: torch.Tensor | None = None):
        batch, heads, steps, dim = query.shape
        self.view, self.mask, self.scoring, self.steps = view, mask, scoring, steps
        groups = heads // view.codec.heads
        self.query = query.float().reshape(batch, view.codec.heads, groups, steps, dim) * scoring.scaling
        self.constant = None if constant is None else constant.unflatten(1, (-1, groups)) * scoring.scaling
        self.top = self.query.new_full(self.query.shape[:-1], -torch.inf)
        self.total = torch.zeros_like(self.top)
        self.mixed = self.query.new_zeros(*self.top.shape, value_dim)
        if scoring.sink_logits is not None:
            logits = scoring.sink_logits.float().reshape(1, view.codec.heads, groups, 1)
            self.top = logits.expand_as(self.top).clone()
            self.total = torch.ones_like(self.top)

    def add(self, row: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, absent=None) -> None:
        """Let row `row` see tokens `k, v [H, T, D]` at `slots [T]`, but those `absent [H, T]`."""
        if not len(slots):
            return
        view, scoring = self.view, self.scoring
        scores = self.query[row] @ k[:, None].transpose(-1, -2)  # [H, G, Tq, T]
        if self.constant is not None:
            scores = scores + self.constant[row, ..., None]
        if scoring.softcap is not None:
            scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
        here = torch.arange(view.length - self.steps, view.length)[:, None]
        keep = (slots >= view.offset).expand(self.steps, -1)
        if scoring.causal and self.mask is None:
            keep = keep & (slots <= here)
        if scoring.window is not None:
            keep = keep & (slots > here - scoring.window)
        keep = keep.to(scores.device)
        if self.mask is not None:
            columns = (slots - view.offset).clamp_min(0).to(self.mask.device)
            mask = self.mask[min(row, self.mask.shape[0] - 1)][..., columns]
            mask = mask.reshape(self.query.shape[1:3] + mask.shape[1:]) if mask.shape[0] > 1 else mask[None]
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
        scores = scores.masked_fill(~keep, -torch.inf)
        if absent is not None:
            scores = scores.masked_fill(absent[:, None, None], -torch.inf)
        top = torch.maximum(self.top[row], scores.amax(-1))
        finite = top.masked_fill(top == -torch.inf, 0)
        probs = (scores - finite[..., None]).exp()
        shrink = (self.top[row] - finite).exp()
        self.total[row] = self.total[row] * shrink + probs.sum(-1)
        self.mixed[row] = self.mixed[row] * shrink[..., None] + probs @ v[:, None]
        self.top[row] = top

    def seen(self) -> torch.Tensor:
        """What the weights of the tokens add up to, `[B, Tq, Hq, 1]`: less than 1 where sink logits take a part."""
        tokens = self.total
        if (logits := self.scoring.sink_logits) is not None:
            tokens = tokens - (logits.float().reshape(1, *self.top.shape[1:3], 1) - self.top).exp()
        return (tokens / self.total.clamp_min(1e-30)).flatten(1, 2).transpose(1, 2)[..., None]

    def result(self) -> torch.Tensor:
        out = self.mixed / self.total.clamp_min(1e-30)[..., None]
        return out.flatten(1, 2).transpose(1, 2).contiguous()
