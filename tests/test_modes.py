"""Modes of generation and ways to call a model beyond `test_generate.py`: our cache gives what DynamicCache gives."""

import copy
import shutil

import pytest
import torch
from models import CONFIGS, LOSSLESS, SMALL, VOCABULARY, prompt, tiny
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast, pipeline
from transformers.generation.streamers import BaseStreamer

from hf_seqkv import SeqKVCache
from hf_seqkv.errors import SeqKVWarning, UnsupportedOperationError
from hf_seqkv.integration import attention
from hf_seqkv.integration.compat import CACHE_NAME
from hf_seqkv.integration.layer import SeqKVLayer

OURS = {"cache_implementation": "seqkv", "cache_config": LOSSLESS}
NEW = {"max_new_tokens": 40, "do_sample": False}


def both(model, *args, **options):
    """What `generate` returns with its own cache and with ours."""
    results = []
    for cache in ({}, OURS):
        torch.manual_seed(3)
        results.append(model.generate(*args, **NEW | options | cache))
    return results


def draft_of(model):
    """A copy with other weights: some of its candidates are right."""
    draft = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.01)
    return draft


def words(names) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "{% for m in messages %}w6 {{ m['content'] }} w7 {% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="w2", chat_template=template)


# -- candidates that are taken back --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_rejected_candidates_are_cut_out_of_pages(name, monkeypatch):
    """Candidates longer than the dense window: what is taken back had been coded."""
    cuts, unpage = [], SeqKVLayer._unpage
    monkeypatch.setattr(SeqKVLayer, "_unpage", lambda self, *args: (cuts.append(self.index), unpage(self, *args)))
    model, (ids, _) = tiny(name), prompt(1, 30)
    ids = torch.cat([ids, ids, ids[:, :15]], 1)
    config = OURS["cache_config"] | {"residual_length": 1}
    plain, ours = (
        model.generate(ids, prompt_lookup_num_tokens=20, **NEW, **options)
        for options in ({}, {"cache_implementation": "seqkv", "cache_config": config})
    )
    assert torch.equal(plain, ours)
    assert set(cuts) == {0, 1, 2}


@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_draft_keeps_its_own_cache(name):
    """Whether the main model's is passed, with or without options, or asked for by name."""
    model, (ids, _) = tiny(name), prompt()
    draft, kinds = draft_of(model), set()
    draft.register_forward_pre_hook(lambda module, _, given: kinds.add(type(given[CACHE_NAME])), with_kwargs=True)
    plain = model.generate(ids, assistant_model=draft, **NEW)
    cache = SeqKVCache(config=model.config, **LOSSLESS)
    options = {"cache_implementation": "seqkv", "cache_config": {**SMALL, "key_bits": 8, "value_bits": 8}}
    assert torch.equal(plain, model.generate(ids, assistant_model=draft, **{CACHE_NAME: cache}, **NEW, **options))
    assert cache.get_seq_length() == plain.shape[1] - 1
    again = SeqKVCache(config=model.config, **LOSSLESS)
    assert torch.equal(plain, model.generate(ids, assistant_model=draft, **{CACHE_NAME: again}, **NEW))
    assert torch.equal(plain, model.generate(ids, assistant_model=draft, **NEW, **OURS))
    assert kinds == {DynamicCache}


def test_draft_with_another_tokenizer():
    """Its vocabulary is smaller and in another order; candidates travel as text."""
    model, (ids, _) = tiny("llama"), prompt()
    config = copy.deepcopy(model.config)
    config.vocab_size = 120
    draft = AutoModelForCausalLM.from_config(config).eval()
    orders = (range(VOCABULARY), [*range(60), *range(119, 59, -1)])
    tokenizers = [words([f"w{i}" for i in order]) for order in orders]
    options = {"tokenizer": tokenizers[0], "assistant_tokenizer": tokenizers[1]}
    plain, ours = both(model, ids, assistant_model=draft, **options)
    assert torch.equal(plain, ours)


def test_early_exit():
    assert torch.equal(*both(tiny("llama"), prompt()[0], assistant_early_exit=2))


# -- a cache that is edited between steps --------------------------------------------------------------------------


@pytest.mark.parametrize("options", [LOSSLESS, SMALL], ids=["lossless", "4 bits"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_edited_in_mid_sequence_equals_fresh(name, options):
    """Rows repeated, selected and copied go on as if they had been the batch from the start."""
    model, rows = tiny(name), [2, 2, 0]
    ids, mask = prompt(3, 70, pads=(0, 13, 5))

    def forward(cache, which, begin, end):
        seen = mask[which, :end]
        at = (seen.cumsum(-1) - 1).clamp_min(0)[:, begin:]
        with torch.no_grad():
            return model(ids[which, begin:end], attention_mask=seen, position_ids=at, **{CACHE_NAME: cache}).logits

    edited, fresh = (SeqKVCache(config=model.config, **options) for _ in range(2))
    for cache, which in ((edited, [0, 1, 2]), (fresh, rows)):
        forward(cache, which, 0, 40)
        forward(cache, which, 40, 50)
    edited.batch_repeat_interleave(2)  # 0 0 1 1 2 2
    edited.batch_select_indices(torch.tensor([4, 5, 1]))
    copied = copy.deepcopy(edited)
    for at in range(50, 70, 2):
        expected = forward(fresh, rows, at, at + 2)
        for cache in (edited, copied):
            torch.testing.assert_close(forward(cache, rows, at, at + 2), expected, atol=2e-3, rtol=2e-3)
    copied.crop(-4)
    assert (copied.get_seq_length(), edited.get_seq_length()) == (66, 70)


def test_custom_loop_that_copies_selects_and_repeats():
    """Contrastive search's use of a cache: candidates side by side, one of them kept."""

    def search(model, input_ids, generation_config, **kwargs):
        cache, logits = kwargs[CACHE_NAME], None
        for _ in range(12):
            new = input_ids[:, cache.get_seq_length() :]
            logits = model(new, **{CACHE_NAME: cache}).logits[:, -1]
            candidates = logits.topk(3, -1).indices
            cache.batch_repeat_interleave(3)
            trial = copy.deepcopy(cache)
            ahead = model(candidates.view(-1, 1), **{CACHE_NAME: trial}).logits[:, -1].amax(-1)
            best = ahead.argmax()
            cache.batch_select_indices(best[None])
            input_ids = torch.cat([input_ids, candidates.view(-1, 1)[best][None]], 1)
        return input_ids

    plain, ours = both(tiny("llama"), prompt()[0], custom_generate=search)
    assert torch.equal(plain, ours)


# -- what generate is given, and what it gives back ----------------------------------------------------------------


def test_streamer():
    class Streamer(BaseStreamer):
        def put(self, value):
            ids.extend(value.flatten().tolist())

        def end(self):
            ids.append("end")

    ids: list = []
    out = tiny("llama").generate(prompt()[0], streamer=Streamer(), **NEW, **OURS)
    assert ids == [*out[0].tolist(), "end"]


def test_returned_cache_goes_on():
    model, (ids, _) = tiny("qwen3"), prompt()
    first = model.generate(ids, return_dict_in_generate=True, **NEW, **OURS)
    assert type(first[CACHE_NAME]) is SeqKVCache
    longer = torch.cat([first.sequences, ids[:, :9]], 1)
    again = model.generate(longer, **{CACHE_NAME: first[CACHE_NAME]}, **NEW)
    assert torch.equal(again, model.generate(longer, **NEW))
    assert first[CACHE_NAME].get_seq_length() == again.shape[1] - 1


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_embeddings_instead_of_ids(name):
    model, (ids, mask) = tiny(name), prompt(2, 45, pads=(0, 6))
    embeddings = model.get_input_embeddings()(ids).detach()
    assert torch.equal(*both(model, inputs_embeds=embeddings, attention_mask=mask))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_positions_that_are_given(name):
    """A prompt that does not begin at position 0, in a forward and in `generate`."""
    model, (ids, mask) = tiny(name), prompt(2, 45, pads=(0, 11))
    positions = (mask.cumsum(-1) - 1).clamp_min(0) + 7
    plain, ours = both(model, ids, attention_mask=mask, position_ids=positions)
    assert torch.equal(plain, ours)
    if name == "gpt2":  # RoPE is of distances only
        assert not torch.equal(plain, model.generate(ids, attention_mask=mask, **NEW))
    with torch.no_grad():
        logits = []
        for cache in (DynamicCache(config=model.config), SeqKVCache(config=model.config, **LOSSLESS)):
            model(ids, attention_mask=mask, position_ids=positions, **{CACHE_NAME: cache})
            grown = torch.cat([mask, mask[:, -3:]], 1)
            at = positions[:, -1:] + torch.tensor([[1, 2, 5]])  # with a gap
            logits.append(model(ids[:, :3], attention_mask=grown, position_ids=at, **{CACHE_NAME: cache}).logits)
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_no_cache_is_no_cache():
    model, (ids, _) = tiny("llama"), prompt()
    out = model.generate(ids, use_cache=False, return_dict_in_generate=True, **NEW, **OURS)
    assert out.get(CACHE_NAME) is None
    assert torch.equal(out.sequences, model.generate(ids, **NEW))


def test_chat_of_several_turns():
    """As `pipeline` and a chat template do it: every turn begins with all turns before."""
    model, tokenizer = copy.deepcopy(tiny("llama")), words([f"w{i}" for i in range(VOCABULARY)])
    chats = []
    for options in ({}, OURS):
        generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
        chat = []
        for turn in ("w10 w11 w12 w13 w14 w15 w16 w17", "w20 w21", "w30 w31 w32"):
            chat.append({"role": "user", "content": turn})
            chat = generate(chat, max_length=None, **NEW | {"max_new_tokens": 12}, **options)[0]["generated_text"]
        chats.append(chat)
    assert chats[0] == chats[1]
    assert [message["role"] for message in chats[0]] == ["user", "assistant"] * 3


# -- attention weights, gradients, compilation ---------------------------------------------------------------------


def test_attention_weights_are_those_of_dynamic_cache(monkeypatch):
    model, (ids, _) = tiny("llama"), prompt()
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    attention._say_why.cache_clear()
    try:
        options = NEW | {"max_new_tokens": 20, "output_attentions": True, "return_dict_in_generate": True}
        plain = model.generate(ids, **options)
        with pytest.warns(SeqKVWarning, match="attention weights") as told:
            ours = model.generate(ids, **options, **OURS)
    finally:
        model.set_attn_implementation(before)
    assert len(told) == 1
    assert torch.equal(plain.sequences, ours.sequences)
    for expected, step in zip(plain.attentions, ours.attentions, strict=True):
        for weights, found in zip(expected, step, strict=True):
            torch.testing.assert_close(found, weights, atol=1e-5, rtol=1e-4)


def test_training_is_refused_or_untouched():
    """No gradient flows through codes; the error names both ways out, and both work."""
    model = copy.deepcopy(tiny("llama")).train()
    ids = prompt()[0]
    for options in (LOSSLESS, SMALL):
        with pytest.raises(UnsupportedOperationError, match=r"no_grad.*use_cache=False"):
            model(ids, **{CACHE_NAME: SeqKVCache(config=model.config, **options)}, labels=ids)
    model(ids, use_cache=False, labels=ids).loss.backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0
    cache = SeqKVCache(config=model.config, **LOSSLESS)
    with torch.no_grad():
        model(ids, **{CACHE_NAME: cache})
    assert cache.get_seq_length() == ids.shape[1]


@pytest.mark.filterwarnings("ignore")  # of torch's compiler
def test_a_compiled_model_generates_the_same():
    """`model.forward` compiled, as many recipes have it; a page fills up meanwhile."""
    config = CONFIGS["llama"]()
    config.num_hidden_layers, config.initializer_range = 1, 0.3
    model, ids = AutoModelForCausalLM.from_config(config).eval(), prompt()[0]
    options = NEW | {"max_new_tokens": 12}
    plain = model.generate(ids, **options)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="inductor" if shutil.which("g++") else "aot_eager")
    try:
        assert torch.equal(plain, model.generate(ids, **options, **OURS))
    finally:
        torch._dynamo.reset()
