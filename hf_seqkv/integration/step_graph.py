"""`StepGraph`: a decoding step of a model, recorded once and then replayed without the Python of a forward.

What changes from step to step lies in tensors that a replay reads: the token, its position, and for every layer what
its kernels must know of the rows (`kernels.numbers`). A recorded step only writes the new token's keys and values and
attends; what Python keeps count of, pages that are due among it, follows every replay. Pages and windows stay where
they lie between growths (`PagedTokens._reserve`): until then one graph serves.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..errors import UnsupportedOperationError
from ..kernels.interface import DenseRun, SideTable
from ..kernels.numbers import table_of
from . import capture
from .compat import CACHE_NAME
from .handle import Handle


@dataclass(frozen=True)
class Step:
    """Arguments of a forward of one token a row: tensors, all else, and the padding mask `[B, T]`, if any."""

    tensors: dict[str, torch.Tensor]
    rest: dict
    mask: torch.Tensor | None

    @classmethod
    def of(cls, cache, arguments: dict) -> Step | None:
        """Of a forward's named arguments; None where it is none that can be replayed."""
        given = {name: x for name, x in arguments.items() if x is not None}
        if given.pop(CACHE_NAME, None) is not cache or not cache.get_seq_length():
            return None
        tensors = {name: x for name, x in given.items() if isinstance(x, torch.Tensor)}
        mask = tensors.pop("attention_mask", None)
        rest = {name: x for name, x in given.items() if not isinstance(x, torch.Tensor)}
        ids = tensors.get("input_ids")
        if ids is None or ids.dim() != 2 or ids.shape[1] != 1:
            return None
        return cls(tensors, rest, mask)

    @property
    def unknown(self) -> str:
        """Names of arguments that are neither tensors nor plain values, which a graph could not follow."""
        return ", ".join(name for name, x in self.rest.items() if not isinstance(x, bool | int | float | str))

    @property
    def kind(self) -> tuple:
        """What one graph cannot serve two of."""
        tensors = tuple((name, x.shape, x.dtype, x.device) for name, x in self.tensors.items())
        return tensors, tuple(self.rest.items()), self.mask is None


class RecordedHandle(Handle):
    """Keys or values of a layer in a step that is recorded: its one token sees all before it that `window` reaches."""

    mask: torch.Tensor | None
    window: int | None

    def attend(self, query, mask, scoring) -> torch.Tensor:
        if mask is not None:
            if mask is not self.mask:
                raise UnsupportedOperationError("its attention changes its mask, or adds a bias")
            scoring = dataclasses.replace(scoring, causal=True, window=self.window)
        return super().attend(query, None, scoring)


class Recording:
    """A layer in a step that is recorded.

    Args:
        numbers: `[11, B]` int32, `place [1]` int64: what `table_of` says, and where the new token goes in the window.
    """

    def __init__(self, layer, numbers: torch.Tensor, place: torch.Tensor):
        self.layer, self.numbers, self.place = layer, numbers, place
        self.noted: capture.Noted | None = None  # None for a layer that does not run
        self.checked = False

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[Handle, Handle]:
        """As `SeqKVLayer.update`, for one token a row.

        Raises:
            UnsupportedOperationError: The layer runs twice, or sees what its mask alone tells.
        """
        layer = self.layer
        if self.noted is not None:
            raise UnsupportedOperationError(f"layer {layer.index} runs more than once")
        self.noted = layer.cache.noted(layer.index)
        self._check(self.noted.mask)
        for window, fresh in ((layer.recent_k, key_states), (layer.recent_v, value_states)):
            window.index_copy_(2, self.place, fresh)
        handles = RecordedHandle.pair(self._view(), layer.config.backend, layer.dtype)
        for handle in handles:
            handle.mask, handle.window = self.noted.mask, layer.sliding_window
        return handles

    def _check(self, mask) -> None:
        """A mask may only say what the layer knows: it has today's length. Looked at once: a recording cannot."""
        if mask is None or self.checked:
            return
        layer = self.layer
        known = isinstance(mask, torch.Tensor) and mask.dim() == 4
        if known:
            offset = layer._seen_from()
            slots = offset + torch.arange(layer.length + 1 - offset, device=mask.device)
            wanted = slots > layer.length - (layer.sliding_window or layer.length + 1)
            seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            known = mask.shape[-1] >= len(slots) and bool((seen[..., -1, : len(slots)] == wanted).all())
        if not known:
            raise UnsupportedOperationError(f"layer {layer.index} sees what only its mask tells")
        self.checked = True

    def _view(self):
        layer, view = self.layer, self.layer.view(new=1)
        batch = len(view.counts)
        center, held = view.center, layer.held
        if center is not None:
            center = dataclasses.replace(center, starts=layer.cache.table(layer.index).starts)
        side = SideTable(held.k, held.v, held.slots) if held is not None and held.slots.shape[1] else None
        window = DenseRun(layer.recent_k, layer.recent_v, [0] * batch, [0] * batch)
        room = [view.pages.shape[1]] * batch
        return dataclasses.replace(view, counts=room, recent=window, center=center, side=side, live=self.numbers)


def places(cache) -> list[tuple[dict, str, object]]:
    """What a step reads or writes where it lies: attributes of an object, name, what it is."""
    found = []
    for layer in cache._coded():
        own = "recent_k", "recent_v", "sink_k", "sink_v", "mean", "buffer", "held"
        for owner, names in ((layer, own), (layer.buffer, ("pages",)), (layer.held, ("k", "v", "slots"))):
            if owner is not None:
                found += [(vars(owner), name, getattr(owner, name)) for name in names]
    for table in cache._distinct_tables():
        found += [(vars(table), name, getattr(table, name)) for name in ("starts", "relative")]
    return found


def _state(layer) -> tuple:
    return layer.length, layer.base, layer.dropped, layer.start, layer.counts


class StepGraph:
    """One step of a model through a cache.

    Args:
        model, forward: The model, and its forward.
        step: The step that is next.
        record: As in `graphed_steps.Steps`.

    Raises:
        SeqKVError, RuntimeError: The step cannot be recorded.
    """

    def __init__(self, model: torch.nn.Module, forward: Callable, cache, step: Step, record: Callable):
        self.model, self.forward, self.cache, self.kind = model, forward, cache, step.kind
        self.tensors = {name: x.clone() for name, x in step.tensors.items()}
        groups: dict[str, list] = {}
        for layer in cache._coded():
            groups.setdefault(repr((layer.sliding_window, _state(layer))), []).append(layer)
        self.groups = list(groups.values())
        device, batch = step.tensors["input_ids"].device, len(step.tensors["input_ids"])
        self.numbers = torch.zeros(len(self.groups), 11, batch, dtype=torch.int32, device=device)
        self.place = torch.zeros(len(self.groups), 1, dtype=torch.int64, device=device)
        self.recordings = [
            Recording(layer, *told)
            for layers, *told in zip(self.groups, self.numbers, self.place, strict=True)
            for layer in layers
        ]
        self.places = places(cache)
        self.rest = step.rest
        self._tell(step)
        self._run()  # kernels are compiled and loaded: a recording cannot
        self.replay = record(self._run)

    @contextlib.contextmanager
    def _recording(self):
        """Layers record, and nothing counts."""
        cache, ids = self.cache, self.cache._ids
        cache._ids, cache.get_seq_length, cache.get_query_offset = [], _refuse_length, self._offset
        for recording in self.recordings:
            recording.noted, recording.layer.recording = None, recording
        try:
            yield
        finally:
            cache._ids = ids
            del cache.get_seq_length, cache.get_query_offset
            cache._noted.clear()
            for recording in self.recordings:
                recording.layer.recording = None

    def _offset(self, layer_idx: int = 0) -> int:
        """For masks, which are not made of it."""
        return self.cache.layers[layer_idx].get_seq_length()

    def _run(self):
        """What the forward returns, and what its head reads."""
        hidden = [None]

        def see(module, args, output):
            hidden.append(getattr(output, "last_hidden_state", None))

        hook = getattr(self.model, "base_model", self.model).register_forward_hook(see)
        try:
            with self._recording():
                return self.forward(**self.tensors, **self.rest, **{CACHE_NAME: self.cache}), hidden[-1]
        finally:
            hook.remove()

    def fits(self, step: Step) -> bool:
        """Whether the graph serves this step: nothing has moved, and there is room for a token."""
        cache = self.cache
        if step.kind != self.kind or (step.mask is not None and step.mask.shape[1] != cache.get_seq_length() + 1):
            return False
        if any(owner.get(name) is not x for owner, name, x in self.places):
            return False
        states = [[_state(layer) for layer in layers] for layers in self.groups]
        full = any(layers[0].length + 1 - layers[0].base > layers[0].recent_k.shape[2] for layers in self.groups)
        return not full and all(state == alike[0] for alike in states for state in alike[1:])

    def _tell(self, step: Step) -> None:
        """Put what is different in this step where the kernels read it."""
        for name, x in step.tensors.items():
            self.tensors[name].copy_(x)
        first = [layers[0] for layers in self.groups]
        numbers = [table_of(_next_view(layer), layer.dropped) for layer in first]
        place = [[layer.length - layer.base] for layer in first]
        pin = self.numbers.device.type == "cuda"
        for told, rows in ((self.numbers, numbers), (self.place, place)):
            told.copy_(torch.tensor(rows, dtype=told.dtype, pin_memory=pin), non_blocking=True)

    def run(self, step: Step):
        """Output of the step, which nothing counts yet, and the last layer's normed output."""
        self._tell(step)
        out, hidden = self.replay()
        found = {name: _copied(x) for name, x in out.items() if name != CACHE_NAME}
        return type(out)(**found, **{CACHE_NAME: self.cache}), hidden

    def step(self, step: Step):
        """The step, as the forward does it: its output."""
        out, hidden = self.run(step)
        self.cache.note_ids(step.tensors["input_ids"])
        for recording in self.recordings:
            if recording.noted is not None:
                recording.layer.advance(recording.noted, 1)
        for owner, name, x in self.places:
            if owner[name] is not x:
                _put_back(owner, name, x)
        self.cache.after_forward(hidden)
        return out


def _next_view(layer):
    return layer.view(offset=layer._seen_from(), new=1)


def _refuse_length(layer_idx: int = 0) -> int:
    raise UnsupportedOperationError("its forward reads how long the cache is")


def _copied(x):
    """Tensors of an output, which the next replay overwrites, as the caller may keep them."""
    if isinstance(x, tuple | list):
        return type(x)(map(_copied, x))
    return x.clone() if isinstance(x, torch.Tensor) else x


def _put_back(owner: dict, name: str, tensor) -> None:
    """Have what an attribute holds now in the tensor that it held, if that has room."""
    now = owner[name]
    if isinstance(tensor, torch.Tensor) and all(a <= b for a, b in zip(now.shape, tensor.shape, strict=True)):
        tensor[tuple(map(slice, now.shape))].copy_(now)
        owner[name] = tensor
