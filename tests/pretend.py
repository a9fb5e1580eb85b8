"""CUDA devices that are not there: tensors that say they are on one, and hold their numbers in memory.

A computation on a pretended device is carried out on the CPU, unless it combines tensors of two devices: that raises,
as it would on real ones. So placement can be tested, with true results, where there is no accelerator.
"""

import contextlib
import copy
import warnings

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_MOVES = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}
# Selections take their index tensors from the CPU, too.
_INDEXED = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default}


class Pretended(torch.Tensor):
    """`inner`, said to be on `place`. To torch's C++ it is a meta tensor, since this torch may know no CUDA."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor, place: torch.device):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device="meta", requires_grad=inner.requires_grad,
        )  # fmt: skip

    def __init__(self, inner: torch.Tensor, place: torch.device):
        self.inner, self.place = inner, place

    @property
    def device(self) -> torch.device:
        return self.place

    @property
    def is_meta(self) -> bool:
        return False

    def to(self, *args, **kwargs):
        """Itself where nothing changes, as any tensor."""
        if args and isinstance(args[0], torch.Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        anew = kwargs.pop("copy", False)
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        if not anew and device in (None, self.place) and dtype in (None, self.dtype):
            return self
        return _Move.apply(self, device or self.place, dtype)

    def cpu(self):
        return self.to("cpu")

    def tolist(self):
        return self.inner.tolist()

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def __getitem__(self, index):
        return super().__getitem__(_listed(index))

    def __setitem__(self, index, value):
        super().__setitem__(_listed(index), value)

    def __repr__(self, **kwargs):
        return f"Pretended({self.inner}, device={self.device})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {}, [])


class _Move(torch.autograd.Function):
    """A copy to a device, whose gradient goes back: C++ knows meta tensors only and would leave it where it is."""

    @staticmethod
    def forward(ctx, x: Pretended, device, dtype):
        ctx.back = x.device, x.dtype
        return torch.ops.aten._to_copy(x, device=device, dtype=dtype)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.to(*ctx.back), None, None


def _listed(index):
    """Lists as tensors: C++ would make meta tensors of them."""
    if isinstance(index, tuple):
        return tuple(map(_listed, index))
    return torch.tensor(index) if isinstance(index, list) else index


class Pretending(TorchDispatchMode):
    """Makes tensors on pretended devices.

    `moves` are devices from and to, bytes, and the address of the storage they were in, of what went to another.
    """

    def __init__(self):
        super().__init__()
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE  # torch does not initialise CUDA under such a mode
        self.moves: list[tuple[str, str, int, int]] = []
        self.last = torch.device("cpu")  # where the last tensor was made

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, torch.Tensor) and t not in (torch.Tensor, torch.nn.Parameter, Pretended) for t in types):
            return NotImplemented  # a wrapper of our own unwraps itself first
        kwargs = kwargs or {}
        if torch.device(kwargs.get("device") or "cpu").type == "meta":
            # C++ asks for more on the device of a tensor that it takes for meta.
            kwargs = kwargs | {"device": self.last}
        found = _run(func, args, kwargs, self.moves)
        if isinstance(found, torch.Tensor):
            self.last = found.device
        return found


def _each(function, x):
    """`x` with what a function makes of everything in it: torch's own `tree_map`, some times faster."""
    if type(x) in (tuple, list):
        return type(x)([_each(function, y) for y in x])
    return {name: _each(function, y) for name, y in x.items()} if type(x) is dict else function(x)


def _run(func, args, kwargs, moves):
    flat = []

    def plain(x):
        if isinstance(x, torch.Tensor):
            flat.append(x)
        return x.inner if isinstance(x, Pretended) else x

    inner_args, inner_kwargs = _each(plain, args), _each(plain, kwargs)
    there = [x for x in flat if isinstance(x, Pretended)]
    device = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    if func in _MOVES:
        source = flat[-1]
        device = device or flat[0].device
        if source.device != device:
            size, address = source.numel() * source.element_size(), source.untyped_storage().data_ptr()
            moves.append((str(source.device), str(device), size, address))
    elif there:
        found = {x.device for x in there}
        strangers = [x for x in flat if not isinstance(x, Pretended) and x.dim() > 0]
        if func in _INDEXED and isinstance(args[0], Pretended):
            strangers = [x for x in strangers if all(x is not y for y in args[1])]
        if len(found) > 1 or strangers:
            raise RuntimeError(f"{func} combines {sorted(map(str, found))} and {[str(x.device) for x in strangers]}")
        device = device or found.pop()
    inner_kwargs.pop("pin_memory", None)
    if "device" in inner_kwargs:
        inner_kwargs["device"] = "cpu"
    result = func(*inner_args, **inner_kwargs)
    known = {id(x.inner): x for x in there}

    def placed(x):
        if not isinstance(x, torch.Tensor) or isinstance(x, Pretended):
            return x
        return known[id(x)] if id(x) in known else Pretended(x, device) if device and device.type == "cuda" else x

    return _each(placed, result)


@contextlib.contextmanager
def pretended():
    """Within it, `cuda:0`, `cuda:1`, ... are devices; without gradients. Yields the `Pretending` mode."""
    lifts = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(..., device=...)` makes its numbers on the CPU
    try:
        with torch.no_grad(), Pretending() as mode, warnings.catch_warnings():
            # The forward of a model that accelerate spread is not its own.
            warnings.filterwarnings("ignore", "steps of .* are not replayed as CUDA graphs")
            yield mode
    finally:
        torch._C._set_only_lift_cpu_tensors(lifts)


def spread(model: torch.nn.Module, devices: int = 2) -> torch.nn.Module:
    """A copy of a model by accelerate: its first layers on `cuda:0`, the last, and what follows, on the last device."""
    from accelerate import dispatch_model

    model = copy.deepcopy(model)
    body = model.base_model
    layers = next(name for name, x in body.named_children() if isinstance(x, torch.nn.ModuleList))
    count, behind, places = len(getattr(body, layers)), False, {}
    for name, child in body.named_children():
        path = f"{model.base_model_prefix}.{name}"
        if name == layers:
            places |= {f"{path}.{i}": f"cuda:{i * devices // count}" for i in range(count)}
            behind = True
        else:
            places[path] = f"cuda:{(devices - 1) * (behind and any(True for _ in child.parameters()))}"
    for name, child in model.named_children():
        if child is not body:
            tied = any(x is y for x in child.parameters() for y in body.get_input_embeddings().parameters())
            places[name] = f"cuda:{(devices - 1) * (not tied)}"
    return dispatch_model(model, device_map=places, main_device="cuda:0", force_hooks=True)
