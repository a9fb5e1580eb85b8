"""Decoding steps of `generate` as CUDA graphs: which are recorded, when, and how one is found to be right.

A forward may depend on more than its arguments and what the kernels read. So all that could tell it the length of the
cache refuses while a step is recorded, and a graph is used only once its next step had the logits of the forward. What
a graph computes with (a step's activations, the kernels' sums) is memory of its own, until `generate` returns.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable

import torch

from ..errors import SeqKVError, SeqKVWarning
from ..kernels.interface import select_backend
from . import capture
from .offload import OffloadedPages
from .shards import WHOLE
from .step_graph import Step, StepGraph, places

ALIKE = 3  # steps, with everything where it was, that come before one is recorded
WORTH = 16  # steps that are still to be expected then: recording takes the time of about three
SAME = 2e-2  # of the largest logit: how far those of a replay may be off


def recorded(device: torch.device, run: Callable) -> Callable:
    """Replays a CUDA graph of `run`, and returns what it returned."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"):
        out = run()

    def replay():
        with torch.cuda.device(device):
            graph.replay()
        return out

    return replay


class Steps:
    """A model's forward, whose steps of one token through a cache are recorded and replayed where they can be.

    Where they cannot it is the forward, and a `SeqKVWarning` says once why.

    Args:
        record: Makes of a function what replays it and returns what it returned; a CUDA graph, by default.
    """

    def __init__(self, model: torch.nn.Module, cache, record: Callable | None = None):
        self.model, self.forward, self.cache = model, model.forward, cache
        self.record = record or functools.partial(recorded, model.device)
        self.graph: StepGraph | None = None
        self.proven = self.refused = False
        self.alike, self.before = 0, None

    def __call__(self, *args, **arguments):
        step = None if self.refused or args else Step.of(self.cache, arguments)
        if step is not None and step.unknown:
            self._refuse(f"it is given {step.unknown}")
        if step is None or self.refused:
            return self.forward(*args, **arguments)
        if self.graph is not None and not self.graph.fits(step):
            self.graph = None
        if self.graph is None and self._is_due(step):
            self._try(step)
            if not self.proven:
                return self.forward(**arguments)  # it is the next step that proves it
        if self.graph is None:
            return self.forward(**arguments)
        if self.proven:
            return self.graph.step(step)
        return self._prove(step, arguments)

    def _prove(self, step: Step, arguments: dict):
        """What the forward returns; whether a replay has the same logits, if these are numbers."""
        mine, out = self.graph.run(step)[0].logits, self.forward(**arguments)
        error, most = (x.float().abs().max() for x in (mine - out.logits, out.logits))
        self.proven = bool(error <= SAME * most)
        if not self.proven and most.isfinite():
            self._refuse("its second step has other logits than its forward computes")
        return out

    def _is_due(self, step: Step) -> bool:
        """Whether steps have been alike for some time, and more of them are to come."""
        now = step.kind, [x.data_ptr() for *_, x in places(self.cache) if isinstance(x, torch.Tensor)]
        self.alike, self.before = (self.alike + 1 if now == self.before else 0), now
        return self.alike >= ALIKE and self.cache.expected_length - self.cache.get_seq_length() >= WORTH

    def _try(self, step: Step) -> None:
        why = obstacle(self.model, self.cache, step)
        if why is None:
            try:
                self.graph = StepGraph(self.model, self.forward, self.cache, step, self.record)
            except (SeqKVError, RuntimeError) as error:
                why = str(error).partition("\n")[0]
        if why is not None:
            self._refuse(why)

    def _refuse(self, why: str) -> None:
        self.graph, self.refused = None, True
        _say(type(self.model).__name__, why)


_SAID: set[tuple[str, str]] = set()


def _say(name: str, why: str) -> None:
    if (name, why) not in _SAID:
        _SAID.add((name, why))
        warnings.warn(
            f"steps of {name} are not replayed as CUDA graphs: {why}. They are as correct, but take the time that "
            "Python takes (cuda_graphs=False says nothing)",
            SeqKVWarning,
            stacklevel=5,
        )


def obstacle(model: torch.nn.Module, cache, step: Step) -> str | None:
    """Why steps like this one are not recorded, or None.

    A padding mask is looked at here and not again: `generate` lets it grow by ones.
    """
    layers, device = cache._coded(), step.tensors["input_ids"].device
    others = {type(layer).__name__ for layer in cache.layers} - {"SeqKVLayer", "DummyLayer"}
    if others or cache.latent_shapes:  # a step more would change what others hold
        return f"its cache holds {', '.join(sorted(others)) or 'latents'} beside keys and values"
    if any(layer.device != device or isinstance(layer.buffer, OffloadedPages) for layer in layers):
        return "not all of its cache lies on one device"
    if cache.shard != WHOLE:
        return "its heads are spread over ranks"
    if model.training:
        return "it is in training mode; call model.eval()"
    if "position_ids" not in step.tensors:
        return "its forward is not given positions"
    for layer in layers:
        if device.type == "cuda" and select_backend(layer.config.backend, layer.codec, device).name != "triton":
            return "its pages are not read by the Triton kernels"
        if any(start >= layer.length for start in layer.start):
            return "a row has no token yet"
    if any(map(_is_compiled, model.modules())):
        return "parts of it are compiled"
    hooked = capture.foreign_hook(model)
    if hooked is not None:
        return f"its {hooked} has a hook, which would not run"
    start = layers[0].start
    if step.mask is not None:
        if step.mask.dim() != 2:
            return f"it is given a mask of {step.mask.dim()} dimensions"
        slots = torch.arange(step.mask.shape[1], device=step.mask.device)
        if not torch.equal(step.mask != 0, slots >= torch.tensor(start, device=slots.device)[:, None]):
            return "its mask is not just left padding"
    elif any(start):
        return "it is given no mask of its padding"
    return None


def _is_compiled(module: torch.nn.Module) -> bool:
    compiled = hasattr(module.forward, "_torchdynamo_orig_callable")
    return compiled or getattr(module, "_compiled_call_impl", None) is not None


@contextlib.contextmanager
def graphed(model: torch.nn.Module, cache):
    """Let a model's steps through a cache be replayed, on a CUDA device.

    Not so where its forward is another's already, or compiled, or pages are offloaded: copies of their own bring these.
    """
    ours = getattr(cache, "seqkv_config", None)
    if ours is None or not ours.cuda_graphs or ours.offload or model.device.type != "cuda":
        yield
        return
    if "forward" in vars(model) or _is_compiled(model):
        _say(type(model).__name__, "its forward is compiled, or not its own")
        yield
        return
    model.forward = forward_of(Steps(model, cache))
    try:
        yield
    finally:
        del model.forward


def forward_of(steps: Steps) -> Callable:
    """`steps` as a function with the signature of the forward, by which `generate` chooses arguments."""

    @functools.wraps(steps.forward)
    def forward(*args, **arguments):
        return steps(*args, **arguments)

    return forward
