"""Teacher-forced quality of caches: the real ones, pages flushed as in generation, against the dense cache.

Caches go through a window in lock-step: every forward, the prefill and then steps of `STEP` tokens, runs on the dense
cache and on each of the others in turn, and what they predict is compared at once. So that no more than two forwards'
logits are held, and every method sees the same tokens in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from tqdm.auto import tqdm

from ..integration.compat import CACHE_NAME

STEP = 16  # tokens a forward after the context: the most a fused attention call takes
BLOCK = 64  # tokens of a block, see `Quality`
LEAST_BLOCKS = 8


@dataclass(frozen=True)
class Quality:
    """Quality of a cache against dense over the same tokens.

    Neighbouring tokens err together, which makes standard errors from single tokens too small. Here they are those of
    the means of blocks of `BLOCK` consecutive tokens of a window, taken as independent (shorter blocks where there
    would be fewer than `LEAST_BLOCKS`); NaN for a single token. They say how far another sample of the same texts would
    be, not another text.

    Args:
        tokens: Scored tokens.
        perplexity, dense_perplexity: `exp` of the mean negative log-likelihood.
        ratio: Their quotient.
        ratio_error: Standard error of `ratio`, from paired token losses.
        kl: Mean Kullback–Leibler divergence of the next-token distribution from dense, nats a token.
        kl_error: Standard error of `kl`.
        top1: Share of tokens whose most likely continuation is dense's.
        top1_error: Standard error of `top1`.
    """

    tokens: int
    perplexity: float
    dense_perplexity: float
    ratio: float
    ratio_error: float
    kl: float
    kl_error: float
    top1: float
    top1_error: float

    def to_dict(self) -> dict:
        return asdict(self)


class TokenScores:
    """What a cache predicts for the tokens of one window, beside dense: losses, divergence and agreement a token."""

    def __init__(self):
        self._parts: list[torch.Tensor] = []

    def add(self, dense: torch.Tensor, coded: torch.Tensor, targets: torch.Tensor) -> None:
        """Score the next tokens of the window.

        Args:
            dense, coded: Log-probabilities, `[n, vocabulary]` fp32.
            targets: The true tokens, `[n]` int64.
        """
        ours, theirs = (-x.gather(1, targets[:, None])[:, 0].double() for x in (coded, dense))
        kl = (dense.exp() * (dense - coded)).sum(-1, dtype=torch.float64)
        same = (dense.argmax(-1) == coded.argmax(-1)).double()
        self._parts.append(torch.stack([ours, theirs, ours - theirs, kl, same]).cpu())

    def table(self) -> torch.Tensor:
        """`[5, tokens]` float64: loss, dense loss, their difference, divergence, agreement (0 or 1)."""
        return torch.cat(self._parts, 1)


def pooled(windows: list[TokenScores]) -> Quality:
    """Quality over the tokens of several windows."""
    tables = [window.table() for window in windows]
    tokens = sum(table.shape[1] for table in tables)
    mean = torch.cat(tables, 1).mean(1)
    size = max(1, min(BLOCK, tokens // LEAST_BLOCKS))
    sums = torch.stack([(part - mean[:, None]).sum(1) for table in tables for part in table.split(size, 1)])
    # of a ratio of sums, since the last block of a window may be shorter
    blocks = len(sums)
    spread = sums.square().sum(0) * blocks / (blocks - 1) if blocks > 1 else torch.full_like(mean, math.nan)
    (ours, theirs, difference, kl, same), errors = mean.tolist(), (spread.sqrt() / tokens).tolist()
    ratio = math.exp(difference)
    return Quality(
        tokens=tokens,
        perplexity=math.exp(ours),
        dense_perplexity=math.exp(theirs),
        ratio=ratio,
        ratio_error=ratio * errors[2],
        kl=kl,
        kl_error=errors[3],
        top1=same,
        top1_error=errors[4],
    )


def _spans(context: int, length: int) -> list[slice]:
    """Tokens of each forward: the prefill, then steps; the last token is predicted and never read."""
    steps = range(context, length - 1, STEP)
    return [slice(0, context), *(slice(at, min(at + STEP, length - 1)) for at in steps)]


def _log_probabilities(model, ids: torch.Tensor, span: slice, cache) -> torch.Tensor:
    """Of the tokens that a forward is scored on, `[n, vocabulary]` fp32: one after the prefill, all after a step."""
    keep = {"logits_to_keep": 1} if span.start == 0 else {}
    return model(ids[:, span], **{CACHE_NAME: cache}, **keep).logits[0].float().log_softmax(-1)


@torch.no_grad()
def lockstep(
    model, ids: torch.Tensor, dense, caches: dict, context: int, advance: Callable[[int], object] = lambda tokens: None
) -> dict[str, TokenScores]:
    """Scores of every cache over one window.

    Args:
        ids: `[1, T]` token ids; tokens from `context` on are scored.
        dense: The reference, any transformers cache, empty.
        caches: By name, empty. All are full at the end, with `T - 1` tokens.
        context: Tokens of the prefill, at least 1.
        advance: Called with the tokens of each forward, for a progress bar.
    """
    scores = {name: TokenScores() for name in caches}
    for span in _spans(context, ids.shape[1]):
        expected = _log_probabilities(model, ids, span, dense)
        advance(span.stop - span.start)
        targets = ids[0, span.stop - len(expected) + 1 : span.stop + 1]
        for name, cache in caches.items():
            scores[name].add(expected, _log_probabilities(model, ids, span, cache), targets)
            advance(span.stop - span.start)
    return scores


@torch.no_grad()
def teacher_forced_logits(model, ids: torch.Tensor, cache, context: int, label: str = "", progress: bool = True):
    """Log-probabilities of every token after `context`, through `cache`.

    Args:
        ids: `[1, T]` token ids.
        cache: Any transformers cache, empty.
        context: Tokens of the first prefill.

    Returns:
        `[T - context, vocabulary]` fp32; row `i` predicts token `context + i`.
    """
    spans = tqdm(_spans(context, ids.shape[1]), desc=label, unit="forward", disable=not progress, leave=False)
    return torch.cat([_log_probabilities(model, ids, span, cache) for span in spans])


def compare(dense: torch.Tensor, coded: torch.Tensor, targets: torch.Tensor) -> Quality:
    """Quality from two sets of log-probabilities `[N, vocabulary]` and the true tokens `[N]`, one window."""
    scores = TokenScores()
    for part in zip(*(x.split(BLOCK) for x in (dense, coded, targets)), strict=True):  # a vocabulary is wide
        scores.add(*part)
    return pooled([scores])
