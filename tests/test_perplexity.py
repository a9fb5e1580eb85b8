"""Teacher-forced quality: scores against closed forms, the real caches in lock-step."""

import math

import pytest
import torch
from models import CONFIGS, SMALL, prompt, tiny
from transformers import DynamicCache

from hf_seqkv import SeqKVCache
from hf_seqkv.eval.perplexity import TokenScores, compare, lockstep, pooled, teacher_forced_logits

DENSE, FAR = (0.6, 0.4), (0.25, 0.75)
KL = 0.6 * math.log(0.6 / 0.25) + 0.4 * math.log(0.4 / 0.75)
DIFFERENCE = math.log(0.6 / 0.25)  # of the losses of token 0


def scores(*chosen: bool, each: int = 1) -> TokenScores:
    """A window whose tokens, all 0, are far from dense where `chosen`, else as dense; `each` tokens at a time."""
    made = TokenScores()
    for far in chosen:
        dense, coded = (torch.tensor([p]).log().repeat(each, 1) for p in (DENSE, FAR if far else DENSE))
        made.add(dense, coded, torch.zeros(each, dtype=torch.long))
    return made


def test_closed_forms():
    found = pooled([scores(True, True, True, False)])
    assert found.tokens == 4
    assert found.kl == pytest.approx(0.75 * KL)
    assert found.top1 == 0.25
    assert found.ratio == pytest.approx(math.exp(0.75 * DIFFERENCE))
    assert found.dense_perplexity == pytest.approx(1 / 0.6)
    assert found.perplexity == pytest.approx(found.ratio / 0.6)


def test_errors_are_those_of_block_means():
    """Tokens that agree within blocks of 64 and not between them count as few, not as many."""
    found = pooled([scores(*[i % 2 > 0 for i in range(32)], each=64)])
    assert found.kl_error == pytest.approx(KL / 2 / math.sqrt(31))
    assert found.ratio_error == pytest.approx(found.ratio * DIFFERENCE / 2 / math.sqrt(31))
    assert found.top1_error == pytest.approx(0.5 / math.sqrt(31))


def test_short_texts_have_short_blocks():
    """40 tokens: 8 blocks of 5."""
    assert pooled([scores(*[i % 2 > 0 for i in range(8)], each=5)]).top1_error == pytest.approx(0.5 / math.sqrt(7))
    assert math.isnan(pooled([scores(True)]).kl_error)


def test_blocks_end_with_their_window():
    """246 tokens, cut 30 at a time: 5 blocks of a window of 150, and 4 of one of 96, the last of 6 tokens."""
    first, second = [i % 3 == 0 for i in range(150)], [i % 5 == 0 for i in range(96)]
    found = pooled([scores(*first), scores(*second)])
    agreement = torch.tensor([not far for far in first + second]).double()
    blocks = [*agreement[:150].split(30), *agreement[150:].split(30)]
    sums = torch.stack([(block - agreement.mean()).sum() for block in blocks])
    assert found.top1 == pytest.approx(agreement.mean().item())
    assert found.top1_error == pytest.approx((sums.square().sum() * 9 / 8).sqrt().item() / 246)


def test_compare_is_one_window():
    dense, coded = torch.randn(2, 150, 11).log_softmax(-1)
    targets = torch.randint(11, (150,))
    found = compare(dense, coded, targets)
    whole = TokenScores()
    whole.add(dense, coded, targets)
    assert found == pooled([whole])
    expected = torch.nn.functional.kl_div(coded, dense, log_target=True, reduction="batchmean")
    assert found.kl == pytest.approx(expected.item(), rel=1e-5)
    assert found.perplexity == pytest.approx(coded[torch.arange(150), targets].mean().neg().exp().item(), rel=1e-5)


def caches(config) -> dict:
    coarse = SeqKVCache(config=config, key_bits=2, value_bits=2, **SMALL)
    return {"lossless": SeqKVCache(config=config, method="dense", **SMALL), "coarse": coarse}


@pytest.mark.parametrize("name", CONFIGS)
def test_lockstep_is_each_cache_alone(name):
    """Sharing a model and its forwards with others changes nothing."""
    model, ids = tiny(name), prompt(tokens=101)[0]
    config, counted = model.config, []
    together = lockstep(model, ids, DynamicCache(config=config), caches(config), 30, counted.append)
    assert sum(counted) == 3 * 100
    assert max(counted[3:]) == 16
    dense = teacher_forced_logits(model, ids, DynamicCache(config=config), 30, progress=False)
    assert dense.shape == (71, 131)
    with torch.no_grad():
        torch.testing.assert_close(dense, model(ids).logits[0, 29:100].log_softmax(-1), atol=1e-3, rtol=1e-4)
    for cache, made in caches(config).items():
        alone = compare(dense, teacher_forced_logits(model, ids, made, 30, progress=False), ids[0, 30:])
        assert pooled([together[cache]]).to_dict() == pytest.approx(alone.to_dict(), rel=1e-5, abs=1e-9)
    assert pooled([together["coarse"]]).kl > 1e-3
    assert pooled([together["lossless"]]).kl == pytest.approx(0, abs=1e-6)
