"""How predictable tokens are under the model, by a sample of them: what a prefix store judges pages by.

Source: −log2 P of a sequence as the metric of a trie, Magarshak, arXiv 2604.15356.
"""

from __future__ import annotations

import math

import torch

from .placement import module_device

SAMPLED = 16  # one token in so many: the head runs on those only


def surprise(model, hidden: torch.Tensor | None, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Bits of sampled tokens of a forward: their slots `[n]`, and `[B, n]`; None where the model has no head.

    Args:
        hidden: What the head reads, `[B, Tq, d]`, of the last `Tq` slots.
        ids: `[B, T]`.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None or hidden is None or hidden.shape[1] < SAMPLED:
        return None
    first = ids.shape[1] - hidden.shape[1]
    at = torch.arange(0, hidden.shape[1] - 1, SAMPLED)
    slots = first + at + 1
    with torch.no_grad():
        logits = head(hidden[:, at.to(hidden.device)].to(module_device(head))).float()
        chosen = ids[:, slots].to(logits.device)
        nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), chosen.flatten(), reduction="none")
    return slots, (nats / math.log(2)).view(chosen.shape).cpu()
