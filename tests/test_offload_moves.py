"""What goes where when pages are offloaded, and that nothing reads it before it has come."""

import contextlib
import weakref

import pytest
import torch
from models import prompt, tiny
from pretend import Pretended, pretended, spread
from test_devices import REFERENCE
from test_offload import MODES, assert_offloaded, assert_same, generated, logits

from hf_seqkv import SeqKVCache
from hf_seqkv.integration import offload
from hf_seqkv.integration.handle import Handle


@pytest.fixture
def pages_on_devices(monkeypatch):
    """Says the bytes of everything alive on a device that may be pages: bytes, at least as many as a page has."""
    made, init = [], Pretended.__init__

    def noted(self, inner, place):
        init(self, inner, place)
        if inner.dtype == torch.uint8:
            made.append(weakref.ref(self))

    def size(page: int) -> int:
        made[:] = [x for x in made if x() is not None]
        storages = [x().untyped_storage() for x in made]
        return sum({x.data_ptr(): x.nbytes() for x in storages if x.nbytes() >= page}.values())

    monkeypatch.setattr(Pretended, "__init__", noted)
    return size


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_each_layer_passes_once_a_step_while_the_layer_before_attends(name, pages_on_devices, monkeypatch):
    """What went where, from the devices' own log, and when layers attended."""
    attend, most = Handle.attend, []

    def noted(self, *args):
        most.append(pages_on_devices(self.view_.codec.page_bytes))
        mode.moves.append("attend")
        return attend(self, *args)

    monkeypatch.setattr(Handle, "attend", noted)
    ids = prompt(1, 120)[0]
    with pretended() as mode:
        model = spread(tiny(name), 1)
        cache = SeqKVCache(config=model.config, offload=True, **REFERENCE)
        layers = cache.layers
        logits(model, ids[:, :60], cache)
        logits(model, ids[:, 60:61], cache)
        made = 0
        for at in range(61, 85):
            before = [(layer.pages.untyped_storage().data_ptr(), layer._used()[0]) for layer in layers]
            mode.moves.clear()
            logits(model, ids[:, at : at + 1], cache)
            after = [(layer.pages.untyped_storage().data_ptr(), layer._used()[0]) for layer in layers]
            # The first layer comes again once it has made its page of this step.
            places = {address: index for index, (address, _) in enumerate([after[0], *before[1:]])}
            assert len(places) == len(layers)
            moved, turn = [], 0
            for move in mode.moves:
                turn += move == "attend"
                if move != "attend" and move[3] in places and move[:2] == ("cpu", "cuda:0"):
                    moved.append((places[move[3]], turn, move[2]))
            used = [after[0][1], *(count for _, count in before[1:])]
            following = [*range(1, len(layers)), 0]  # while layer `turn` has not attended yet
            assert moved == [
                (index, turn, used[index] * layers[index].codec.page_bytes) for turn, index in enumerate(following)
            ]
            assert turn == len(layers)
            made += before != after
        assert made >= 3
        assert_offloaded(cache)
    room = max(layer.pages.nbytes for layer in layers)
    assert 0 < max(most) <= 2 * room


def test_memory_says_where():
    with pretended():
        model = spread(tiny("llama"), 2)
        _, plain = generated(model, REFERENCE)
        _, cache = generated(model, REFERENCE | {"offload": True})
        mine, other = cache.memory(), plain.memory()
        assert mine["host"] == sum(layer.pages.nbytes for layer in cache.layers) > 0
        rooms = [slot.room.nbytes for x in {id(x.buffer.staging): x.buffer.staging for x in cache.layers}.values()
                 for slot in x.slots]  # fmt: skip
        assert mine["staging"] == sum(rooms) > 0
        assert (other["host"], other["staging"]) == (0, 0)
        for parts in (mine, other):
            assert parts["total"] == sum(size for name, size in parts.items() if name not in ("total", "host"))
        assert {name for name in mine if mine[name] != other[name]} == {"host", "staging", "total"}
        assert cache.bits_per_value() == plain.bits_per_value()


def test_keys_that_a_model_keeps_stay_what_they_are(pages_on_devices):
    """Models whose layers share keys and values hold on to a layer's while others pass through."""
    with pretended():
        model = spread(tiny("gemma3"), 1)
        _, cache = generated(model, REFERENCE | {"offload": True})
        kept = [layer._handles(None)[0] for layer in cache.layers]
        for handle, layer in zip(kept, cache.layers, strict=True):
            assert torch.equal(handle.materialize().cpu(), layer.keys.cpu())
        room, page = max(layer.pages.nbytes for layer in cache.layers), layer.codec.page_bytes
        assert pages_on_devices(page) > 2 * room
        del kept, handle
        logits(model, torch.tensor([[3], [4]]), cache)
        assert 0 < pages_on_devices(page) <= 2 * room


class LateStream:
    """A stream whose copies are made when something waits for them, and not before: as late as a real one may."""

    def __init__(self):
        self.waiting, self.made = [], 0

    def wait_stream(self, other):
        pass

    def record_event(self):
        return self, self.made + len(self.waiting)

    def run(self, until):
        while self.made < until:
            target, source = self.waiting.pop(0)
            target.copy_(source)
            self.made += 1


@pytest.mark.parametrize("mode", ["greedy", "prompt lookup", "sliding chunks"])
def test_nothing_reads_before_a_copy_has_come(mode, monkeypatch):
    """With copies beside the computation, every reader and writer waits for those that concern it."""
    active, streams, copy_ = [], [], torch.Tensor.copy_

    @contextlib.contextmanager
    def stream(late):
        active.append(late)
        yield
        active.pop()

    def late(self, source, non_blocking=False):
        if not active:
            return copy_(self, source)
        assert non_blocking
        active[-1].waiting.append((self, source))

    class Computation:
        wait_event = staticmethod(lambda event: event[0].run(event[1]))

    init = offload.Staging.__init__

    def with_stream(self, device):
        init(self, device)
        self.stream = LateStream()
        streams.append(self.stream)

    monkeypatch.setattr(offload.Staging, "__init__", with_stream)
    monkeypatch.setattr(Pretended, "copy_", late, raising=False)
    monkeypatch.setattr(Pretended, "record_stream", lambda self, stream: None, raising=False)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Computation)
    name, options, more = MODES[mode]
    with pretended():
        model = spread(tiny(name), 1)
        wanted, _ = generated(model, options, **more)
        found, cache = generated(model, options | {"offload": True}, **more)
        assert_same(found, wanted)
        assert_offloaded(cache)
    assert sum(x.made for x in streams) > 20
    assert any(x.waiting for x in streams)  # the first layer's, for a step that did not come
