"""Sequences as token ids: what comes back is what went in, the cache goes on alike, and anything else is refused."""

import copy
import itertools
import math
import struct
import zlib

import numpy as np
import pytest
import torch
from models import CONFIGS, prompt, tiny
from transformers import DynamicCache

from hf_seqkv import SeqKVCache
from hf_seqkv.codec.token_coder import encode, frequencies
from hf_seqkv.errors import ConfigError, FormatError, NonFiniteError, SeqKVWarning
from hf_seqkv.eval import passages, smollm2
from hf_seqkv.integration.compat import CACHE_NAME
from hf_seqkv.integration.replay import MODEL, MODEL_HEADER_BYTES, STATIC, pack, restore, unpack

HEADER = struct.Struct("<4sHHIII")


def coder(data):
    return HEADER.unpack_from(data)[2]


def ids(tokens=45):
    return prompt(tokens=tokens)[0][0]


def resealed(data, **changes):
    """The same with other fields and the checksum that fits."""
    names = ("magic", "version", "coder", "tokens", "check")
    facts = dict(zip(names, HEADER.unpack_from(data)[:-1], strict=True)) | changes
    body = data[HEADER.size :]
    return HEADER.pack(*facts.values(), zlib.crc32(body, zlib.crc32(HEADER.pack(*facts.values(), 0)))) + body


class Drifting(torch.nn.Module):
    """A model whose logits are never the same twice."""

    def __init__(self, model):
        super().__init__()
        self.inner, self.config, self.device, self.calls = model, model.config, model.device, 0

    def forward(self, *args, **options):
        found = self.inner(*args, **options)
        self.calls += 1
        found.logits = found.logits + 0.1 * torch.sin(torch.arange(found.logits.shape[-1]) * self.calls)
        return found


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("with_model", [False, True], ids=["static", "model"])
def test_generation_goes_on_alike(name, with_model):
    model, tokens = tiny(name), ids()
    data = pack(tokens, model if with_model else None)
    assert coder(data) == (MODEL if with_model else STATIC)
    back, cache = restore(data, model)
    assert back.dtype == torch.int64
    assert torch.equal(back, tokens)
    assert torch.equal(unpack(data, model), tokens)
    assert cache.get_seq_length() == len(tokens) - 1
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones(1, len(tokens)).long()}
    expected = model.generate(tokens[None], **options)
    assert torch.equal(model.generate(back[None], **{CACHE_NAME: cache}, **options), expected)


@pytest.mark.parametrize("with_model", [False, True], ids=["static", "model"])
def test_restores_into_a_given_cache(with_model):
    model, tokens = tiny("llama"), ids()
    caches = [
        SeqKVCache(config=model.config, page_size=8, residual_length=8),
        DynamicCache(config=model.config),
    ]
    for cache in caches:
        expected = copy.deepcopy(cache)
        back, found = restore(pack(tokens, model if with_model else None), model, cache)
        assert found is cache
        assert torch.equal(back, tokens)
        with torch.no_grad():
            model(tokens[None, :-1], **{CACHE_NAME: expected})
            ours, theirs = (model(tokens[None, -1:], **{CACHE_NAME: c}).logits for c in (cache, expected))
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(ConfigError, match="already holds 45 tokens"):
        restore(pack(tokens), model, caches[0])


@pytest.mark.parametrize("count", [0, 1, 2])
def test_short_sequences(count):
    model, tokens = tiny("llama"), ids()[:count]
    for given in (None, model):
        back, cache = restore(pack(tokens, given), model)
        assert torch.equal(back, tokens)
        assert cache.get_seq_length() == max(count - 1, 0)


def test_a_token_takes_what_the_model_is_surprised_by():
    model, tokens = tiny("llama"), ids(200)
    cache, bits = DynamicCache(config=model.config), math.log2(131)
    with torch.no_grad():
        for token, following in itertools.pairwise(tokens):
            logits = model(token.view(1, 1), **{CACHE_NAME: cache}).logits[0, -1]
            bits -= logits.log_softmax(-1)[following].item() / math.log(2)
    stream = 8 * (len(pack(tokens, model, verify=False)) - MODEL_HEADER_BYTES)
    assert bits - 1 < stream < bits + 64


def test_drifting_logits_fall_back_once():
    with pytest.warns(SeqKVWarning, match="not the same when it runs again") as said:
        data = pack(ids(), Drifting(tiny("llama")))
    assert len(said) == 1
    assert said[0].filename == __file__
    assert coder(data) == STATIC
    assert torch.equal(unpack(data), ids())


def test_drift_after_writing_is_never_wrong_tokens():
    model = Drifting(tiny("llama"))
    for count in (2, 3, 5, 9, 17, 33):
        with pytest.raises(FormatError, match=r"damaged|logits"):
            unpack(pack(ids(count), model, verify=False), model)


def test_every_damaged_byte_is_refused():
    model, tokens = tiny("llama"), ids(20)
    for data in (pack(tokens), pack(tokens, model)):
        for at in range(len(data)):
            for flip in (1, 0x80, 0xFF):
                damaged = bytearray(data)
                damaged[at] ^= flip
                with pytest.raises(FormatError):
                    unpack(bytes(damaged), model)
            with pytest.raises(FormatError):
                unpack(data[:at], model)
        with pytest.raises(FormatError):
            unpack(data + b"\0", model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version 2"),
        ({"coder": 2}, "coder 2"),
        ({"tokens": 44}, "does not end|too early"),
        ({"tokens": 46}, "does not end|too early|no token"),
        ({"check": 0}, "token ids does not match"),
        ({"magic": b"SKVP"}, "SKVP"),
    ],
    ids=["version", "coder", "fewer", "more", "check", "magic"],
)
def test_other_headers_are_refused_by_name(changes, message):
    model = tiny("llama")
    for data in (pack(ids()), pack(ids(), model)):
        with pytest.raises(FormatError, match=message):
            unpack(resealed(data, **changes), model)


def test_another_model_is_refused():
    model, tokens = tiny("llama"), ids()
    data = pack(tokens, model)
    other = copy.deepcopy(model)
    other.model.layers[0].self_attn.q_proj.weight.data.add_(1)
    cache = DynamicCache(config=model.config)
    with pytest.raises(FormatError, match="load the model they were coded under"):
        restore(data, other, cache)
    assert cache.get_seq_length() == 0
    other = copy.deepcopy(model)
    other.lm_head.weight.data.mul_(1.5)  # of the same fingerprint
    with pytest.raises(FormatError, match=r"probabilities|logits"):
        restore(data, other, cache)
    assert cache.get_seq_length() == 0
    with pytest.raises(ConfigError, match="pass it as model="):
        unpack(data)


@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(1, 3, dtype=torch.int64), torch.zeros(3), torch.tensor([-1]), torch.tensor([2**32])],
    ids=["2-d", "float", "negative", "too large"],
)
def test_what_are_no_ids(wrong):
    with pytest.raises(ConfigError, match="ids are"):
        pack(wrong)


def test_ids_beyond_the_vocabulary():
    with pytest.raises(ConfigError, match="not in the model's vocabulary of 131"):
        pack(torch.tensor([3, 131]), tiny("llama"))
    assert unpack(pack(torch.tensor([3, 131]))).tolist() == [3, 131]


def test_nan_is_refused():
    model = copy.deepcopy(tiny("llama"))
    model.lm_head.weight.data[7] = torch.nan
    with pytest.raises(NonFiniteError, match="nan"):
        pack(ids(), model)


def test_smollm2_takes_its_cross_entropy():
    model, tokenizer, _ = smollm2.load(torch.float32)
    tokens, logits = passages.held_out(tokenizer, 48)[0], []
    with model.register_forward_hook(lambda *call: logits.append(call[-1].logits[0, -1])):
        data = pack(tokens, model, verify=False)
    assert len(logits) == 47
    # The stream by the docstring's rules: what is stored is these steps and nothing else.
    rows = [frequencies(torch.zeros(model.config.vocab_size)), *map(frequencies, logits)]
    starts = np.array([int(row[:token].sum()) for row, token in zip(rows, tokens, strict=True)])
    lengths = np.array([int(row[token]) for row, token in zip(rows, tokens, strict=True)])
    assert data[MODEL_HEADER_BYTES:] == encode(starts, lengths)
    loss = torch.nn.functional.cross_entropy(torch.stack(logits), tokens[1:], reduction="sum").item() / math.log(2)
    assert sum(30 - np.log2(lengths[1:])) == pytest.approx(loss, rel=1e-4)
    bits = 8 * (len(data) - MODEL_HEADER_BYTES - 4)  # of the state's 8 bytes 4 hold tokens
    least = loss + math.log2(model.config.vocab_size)
    assert 0.99 * least < bits < 1.01 * least + 32  # whole words
    assert torch.equal(unpack(data, model), tokens)
