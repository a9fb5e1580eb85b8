"""Where a model's modules run and where its weights are kept, also while accelerate offloads them.

An offloaded module has its weights on the `meta` device between its uses; the hook that brings them says where from and
where to (`accelerate.hooks.AlignDevicesHook`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ..errors import UnsupportedOperationError


def module_device(module: torch.nn.Module) -> torch.device:
    """Where a module computes: the device of its first weight, or the one that an offloaded weight is brought to."""
    first = next(module.parameters(), None)
    if first is not None and not first.is_meta:
        return first.device
    for part in module.modules():
        for hook in _hooks(part):
            if getattr(hook, "execution_device", None) is not None:
                return torch.device(hook.execution_device)
    return torch.device("cpu")


def weights(
    model: torch.nn.Module, chosen: Callable[[str, torch.Tensor], bool] = lambda name, tensor: True
) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of a model's state dict in the order of their names, offloaded ones from where they are kept.

    Args:
        chosen: Which to give, told from a name and a tensor that may be on the `meta` device; others are not read.

    Raises:
        UnsupportedOperationError: A tensor is on the `meta` device, and no hook knows where it is kept.
    """
    for name, tensor in sorted(model.state_dict().items()):
        if chosen(name, tensor):
            yield name, _kept(model, name) if tensor.is_meta else tensor.detach()


def _kept(model: torch.nn.Module, name: str) -> torch.Tensor:
    path = name.split(".")
    for depth in range(len(path) - 1, -1, -1):  # a hook may stand for all modules below it
        for hook in _hooks(model.get_submodule(".".join(path[:depth]))):
            try:
                return hook.weights_map[".".join(path[depth:])].detach()
            except (AttributeError, KeyError, TypeError):
                continue  # it keeps no weights, or not this one
    raise UnsupportedOperationError(
        f"weight {name} is on the meta device and no hook of accelerate keeps it, so nothing tells this model's "
        "weights from others; load them, or leave out calibration, prefix_store and save()"
    )


def _hooks(module: torch.nn.Module) -> tuple:
    hook = getattr(module, "_hf_hook", None)
    return getattr(hook, "hooks", (hook,))
