"""Teacher-forced quality of a cache: the real one, pages flushed as in generation, against the dense cache."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from tqdm.auto import tqdm

STEP = 16  # tokens a forward after the context: the most a fused attention call takes


@dataclass(frozen=True)
class Quality:
    """Quality of a cache against dense over the same tokens.

    Args:
        tokens: Scored tokens.
        perplexity, dense_perplexity: `exp` of the mean negative log-likelihood.
        ratio: Their quotient.
        ratio_error: Standard error of `ratio`, from paired token losses.
        kl: Mean Kullback–Leibler divergence of the next-token distribution from dense, nats a token.
        top1: Share of tokens whose most likely continuation is dense's.
    """

    tokens: int
    perplexity: float
    dense_perplexity: float
    ratio: float
    ratio_error: float
    kl: float
    top1: float

    def to_dict(self) -> dict:
        return asdict(self)


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
    out = [model(ids[:, :context], past_key_values=cache, logits_to_keep=1).logits[0]]
    steps = range(context, ids.shape[1] - 1, STEP)
    for at in tqdm(steps, desc=label, unit_scale=STEP, unit="token", disable=not progress, leave=False):
        out.append(model(ids[:, at : min(at + STEP, ids.shape[1] - 1)], past_key_values=cache).logits[0])
    return torch.cat(out).float().log_softmax(-1)


def compare(dense: torch.Tensor, coded: torch.Tensor, targets: torch.Tensor) -> Quality:
    """Quality from two sets of log-probabilities `[N, vocabulary]` and the true tokens `[N]`."""
    ours, theirs = (-x.gather(1, targets[:, None])[:, 0].double() for x in (coded, dense))
    difference = ours - theirs
    ratio = difference.mean().exp().item()
    return Quality(
        tokens=len(targets),
        perplexity=ours.mean().exp().item(),
        dense_perplexity=theirs.mean().exp().item(),
        ratio=ratio,
        ratio_error=ratio * (difference.std() / math.sqrt(len(targets))).item(),
        # in blocks of rows: a vocabulary is wide
        kl=torch.cat([(d.exp() * (d - c)).sum(-1) for d, c in zip(dense.split(64), coded.split(64), strict=True)])
        .mean()
        .item(),
        top1=(dense.argmax(-1) == coded.argmax(-1)).double().mean().item(),
    )
