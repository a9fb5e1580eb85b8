"""Recorded steps: they are counted like others. Here a recording is run again; on a GPU it is a graph (`test_cuda`)."""

import contextlib
import copy
import inspect
from unittest import mock

import pytest
import torch
from architecture_models import build
from models import CONFIGS, SMALL, Unmeasured, prompt, tiny
from test_held import by_content, holding

from hf_seqkv import SeqKVCache
from hf_seqkv.errors import NonFiniteError, SeqKVWarning
from hf_seqkv.integration import graphed_steps
from hf_seqkv.integration.compat import CACHE_NAME
from hf_seqkv.integration.graphed_steps import Steps, forward_of
from hf_seqkv.integration.state import state_of

OPTIONS = SMALL | {"backend": "reference"}
NEW = 90


class Again:
    """Records a function as itself; counts recordings and replays."""

    def __init__(self):
        self.recorded = self.replayed = 0

    def __call__(self, run):
        self.recorded += 1

        def replay():
            self.replayed += 1
            return run()

        return replay


@contextlib.contextmanager
def stepped(model, cache, record):
    model.forward = forward_of(Steps(model, cache, record))
    try:
        yield
    finally:
        del model.forward


def generated(model, options, record=None, rows=1, pads=(), tokens=45, **more):
    ids, mask = prompt(rows, tokens, pads)
    cache = SeqKVCache(config=model.config, **options)
    asked = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True} | more
    with stepped(model, cache, record) if record else contextlib.nullcontext():
        out = model.generate(ids, attention_mask=mask, **{CACHE_NAME: cache}, **asked)
    return out, cache


def assert_same(mine, other):
    assert torch.equal(mine[0].sequences, other[0].sequences)
    for x, y in zip(mine[0].logits, other[0].logits, strict=True):
        assert torch.allclose(x, y, atol=1e-4, rtol=1e-4)
    (tensors, facts), (others, other_facts) = state_of(mine[1]), state_of(other[1])
    assert facts == other_facts
    assert tensors.keys() == others.keys()
    for name, x in tensors.items():
        assert torch.allclose(x.float(), others[name].float(), atol=1e-4, rtol=1e-4), name


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("pads", [(0,), (0, 5, 13)], ids=str)
def test_steps_are_those_of_the_forward(name, pads):
    model, record = copy.deepcopy(tiny(name)), Again()
    mine = generated(model, OPTIONS, record, len(pads), pads)
    assert record.replayed > NEW // 2
    assert_same(mine, generated(model, OPTIONS, None, len(pads), pads))


def test_held_tokens_are_seen():
    model, record = copy.deepcopy(tiny("llama")), Again()
    options = {"calibration": holding("llama", by_content), "backend": "reference", "residual_length": 8}
    mine = generated(model, options, record, 2, (0, 30), 150)
    assert max(mine[1].layers[0].held.counts) > 3
    assert record.replayed > NEW // 2
    assert_same(mine, generated(model, options, None, 2, (0, 30), 150))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_graphs_are_recorded_again_when_memory_grows(name):
    """Where the length to come is not known, room for pages is doubled, and what moves is recorded again."""
    model, record = copy.deepcopy(tiny(name)), Again()
    unknown = property(lambda self: 10**6, lambda self, length: None)
    with mock.patch.object(SeqKVCache, "expected_length", unknown, create=True):
        mine = generated(model, OPTIONS, record)
    assert 2 <= record.recorded < 9
    assert record.replayed > NEW // 2
    assert_same(mine, generated(model, OPTIONS))


def test_eager_attention_is_recorded_too():
    """It is given masks, which say no more than the layer knows."""
    model, record = copy.deepcopy(tiny("gemma3")), Again()
    model.set_attn_implementation("eager")
    mine = generated(model, OPTIONS, record)
    assert record.replayed > NEW // 2
    assert_same(mine, generated(model, OPTIONS))


def test_hidden_states_are_the_callers():
    """Of every step their own, which no later replay overwrites."""
    model, more = copy.deepcopy(tiny("llama")), {"output_hidden_states": True}
    record = Again()
    mine, other = (generated(model, OPTIONS, given, **more)[0].hidden_states for given in (record, None))
    assert record.replayed > NEW // 2
    for step, wanted in zip(mine, other, strict=True):
        assert all(torch.allclose(x, y, atol=1e-4) for x, y in zip(step, wanted, strict=True))


def test_a_session_goes_on():
    """Of one cache: a second `generate`, of which the first tokens are known, after a crop inside a page."""
    model, found = copy.deepcopy(tiny("llama")), []
    for record in (Again(), None):
        out, cache = generated(model, OPTIONS, record)
        cache.crop(-13)
        ids = out.sequences[:, : cache.get_seq_length() + 5]
        with stepped(model, cache, record) if record else contextlib.nullcontext():
            out = model.generate(ids, **{CACHE_NAME: cache}, max_new_tokens=NEW, do_sample=False,
                                 return_dict_in_generate=True, output_logits=True)  # fmt: skip
        found.append((out, cache))
    assert_same(*found)


def test_prefixes_are_stored(tmp_path):
    model, stored = copy.deepcopy(tiny("llama")), []
    for record in (Again(), None):
        with Unmeasured(tmp_path / str(record is None)) as store:
            generated(model, OPTIONS | {"prefix_store": store}, record)
            store.flush()
            stored.append(store.stat()["tokens"])
    assert stored[0] == stored[1] > 80


def test_modes_that_move_rows_are_not_recorded():
    model, record = copy.deepcopy(tiny("llama")), Again()
    mine = generated(model, OPTIONS, record, num_beams=2, output_logits=False)
    assert record.recorded == 0
    assert torch.equal(mine[0].sequences, generated(model, OPTIONS, num_beams=2, output_logits=False)[0].sequences)


def test_few_steps_are_not_recorded():
    record = Again()
    generated(copy.deepcopy(tiny("llama")), OPTIONS, record, max_new_tokens=graphed_steps.WORTH)
    assert record.recorded == 0


@pytest.fixture
def refused():
    """A context in which one warning says why, and tokens are those of the forward."""

    @contextlib.contextmanager
    def why(match):
        with mock.patch.object(graphed_steps, "_SAID", set()), pytest.warns(SeqKVWarning, match=match):
            yield

    return why


def check_refused(model, **more):
    record = Again()
    assert_same(generated(model, OPTIONS, record, **more), generated(model, OPTIONS, **more))
    assert record.replayed <= 1


def test_a_hook_is_seen(refused):
    model, seen = copy.deepcopy(tiny("llama")), []
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, out: seen.append(1))
    with refused("its LlamaMLP has a hook, which would not run"):
        check_refused(model)
    assert len(seen) == 2 * NEW


@pytest.mark.filterwarnings("ignore")  # of torch's compiler
def test_compiled_layers_are_left_alone(refused):
    model = copy.deepcopy(tiny("llama"))
    model.model.layers[1].forward = torch.compile(model.model.layers[1].forward, backend="eager")
    with refused("parts of it are compiled"):
        generated(model, OPTIONS, Again(), max_new_tokens=30)


@pytest.mark.filterwarnings("ignore::hf_seqkv.errors.SeqKVWarning", "ignore:.*is falling back to its reference")
@pytest.mark.parametrize("name", ["falcon_h1", "bamba", "deepseek_v3"])
def test_layers_of_other_kinds_are_not_run_twice(name):
    """States that a step changes would be those of a step more."""
    model, record = build(name), Again()
    mine, other = (generated(model, OPTIONS, given, max_new_tokens=30)[0] for given in (record, None))
    assert record.recorded == 0
    assert torch.equal(mine.sequences, other.sequences)


@contextlib.contextmanager
def altered(model, change):
    """A model whose decoder adds `change(cache)` to what it returns."""
    forward = model.model.forward

    def more(*args, **arguments):
        out = forward(*args, **arguments)
        out.last_hidden_state = out.last_hidden_state + change(arguments[CACHE_NAME])
        return out

    with mock.patch.object(model.model, "forward", more):
        yield


def test_a_forward_that_reads_the_length_is_refused(refused):
    model = copy.deepcopy(tiny("llama"))
    with altered(model, lambda cache: cache.get_seq_length() / 100), refused("its forward reads how long the cache is"):
        check_refused(model)


def test_a_forward_that_counts_is_found_out(refused):
    """What changes behind the back of a recording: the second step has other logits."""
    model, count = copy.deepcopy(tiny("llama")), iter(range(10**6))
    record = Again()
    with altered(model, lambda cache: next(count) / 10), refused("its second step has other logits"):
        generated(model, OPTIONS, record)
    assert (record.recorded, record.replayed) == (1, 1)


def test_what_fails_in_a_recording_is_told(refused):
    def record(run):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    with refused("not replayed as CUDA graphs: operation not permitted when stream is capturing. They"):
        generated(copy.deepcopy(tiny("llama")), OPTIONS, record)


def test_nothing_is_lost_where_tokens_are_not_finite():
    """A page that is due is refused, as it is without recordings."""
    found = []
    for record in (Again(), None):
        model = copy.deepcopy(tiny("llama"))
        cache = SeqKVCache(config=model.config, **OPTIONS)
        with torch.no_grad():
            model(prompt()[0], **{CACHE_NAME: cache})
        cache.expected_length = 1000
        steps = Steps(model, cache, record) if record else model
        take(steps, cache, 10)
        model.model.layers[0].self_attn.v_proj.weight.data[0, 0] = torch.nan
        with pytest.raises(NonFiniteError):
            take(steps, cache, 20)
        found.append((cache.layers[0].length, cache.layers[0].counts))
    assert found[0] == found[1]


@torch.no_grad()
def take(steps, cache, count, **more):
    for _ in range(count):
        positions = torch.tensor([[cache.get_seq_length()]])
        steps(input_ids=torch.tensor([[7]]), position_ids=positions, **{CACHE_NAME: cache}, **more)


def test_arguments_that_are_not_understood_are_told(refused):
    model, record = copy.deepcopy(tiny("llama")), Again()
    cache = SeqKVCache(config=model.config, **OPTIONS)
    with torch.no_grad():
        model(prompt()[0], **{CACHE_NAME: cache})
    cache.expected_length = 1000
    with refused("it is given adapters"):
        take(Steps(model, cache, record), cache, 10, adapters={})
    assert (record.recorded, cache.get_seq_length()) == (0, 55)


def test_where_forwards_are_replaced(refused):
    """On a CUDA device, while tokens are generated, by a function with the same arguments."""
    model = copy.deepcopy(tiny("llama"))
    caches = [SeqKVCache(config=model.config, **more) for more in ({}, {"cuda_graphs": False}, {"offload": True})]

    def is_replaced(cache):
        with graphed_steps.graphed(model, cache):
            return "forward" in vars(model)

    assert not is_replaced(caches[0])  # on a CPU
    with mock.patch.object(type(model), "device", torch.device("cuda")):
        assert [is_replaced(cache) for cache in (*caches, None)] == [True, False, False, False]
        with graphed_steps.graphed(model, caches[0]):
            assert inspect.signature(model.forward) == inspect.signature(type(model).forward.__get__(model))
        assert "forward" not in vars(model)
        model.forward = torch.compile(model.forward, backend="eager")
        compiled = model.forward
        with refused("its forward is compiled, or not its own"), graphed_steps.graphed(model, caches[0]):
            assert model.forward is compiled
