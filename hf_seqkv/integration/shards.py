"""Tensor parallelism: which rank this process is, and what the ranks of one model have to agree on.

transformers splits a model's KV heads over the ranks, evenly and in their order, so that a cache holds its rank's heads
alone; models whose plan gathers the projections hold all heads on every rank. All ranks make the same calls with the
same inputs, and run the same tokens. What one of them finds on disk or measures is its own: before that decides how
many tokens run, they agree on it.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..errors import SeqKVError


@dataclass(frozen=True)
class Shard:
    """One rank of those that share a model. All ranks call a method in the same order, from the thread that runs it.

    Args:
        rank, ranks: Its number, and how many there are.
        group: They talk in it; None for a model that one process holds.
        device: Of what they exchange.
    """

    rank: int = 0
    ranks: int = 1
    group: Any = None
    device: str = "cpu"

    def gather(self, data: bytes) -> list[bytes]:
        """What every rank gave, equally many bytes each, in the order of ranks."""
        if self.group is None:
            return [data]
        mine = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self.device)
        found = [torch.empty_like(mine) for _ in range(self.ranks)]
        dist.all_gather(found, mine, group=self.group)
        return [x.cpu().numpy().tobytes() for x in found]

    def least(self, *numbers: int) -> list[int]:
        """Of each number, the least that a rank gave; equally many each."""
        form = f"<{len(numbers)}q"
        found = [struct.unpack(form, x) for x in self.gather(struct.pack(form, *numbers))]
        return [min(x) for x in zip(*found, strict=True)]

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of what every rank gave, tensors of one shape."""
        if self.group is not None:
            x = x.clone()
            dist.all_reduce(x, group=self.group)
        return x

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What fails on one rank fails on all: where it went well here, with a `SeqKVError`."""
        try:
            yield
        except Exception:
            self.least(0)
            raise
        if not self.least(1)[0]:
            raise SeqKVError(f"rank {self.rank} of {self.ranks} stops because another one failed; see its error")

    def path(self, path: str | Path) -> Path:
        """Where this rank keeps what is asked to be kept at `path`."""
        return Path(path) if self.ranks == 1 else Path(f"{path}.rank{self.rank}-of-{self.ranks}")


WHOLE = Shard()


def shard_of(model: torch.nn.Module) -> Shard:
    """The shard of a model, or of a part of one, that this process holds; `WHOLE` without tensor parallelism."""
    if not (dist.is_available() and dist.is_initialized()):
        return WHOLE
    of_weights = (getattr(weight, "device_mesh", None) for weight in model.parameters())
    for mesh in (getattr(model, "_device_mesh", None), *of_weights):
        if mesh is not None and "tp" in (mesh.mesh_dim_names or ()):
            mesh = mesh["tp"]
            place = (mesh.get_local_rank(), mesh.size(), mesh.get_group(), mesh.device_type)
            return Shard(*place) if mesh.size() > 1 else WHOLE
    return WHOLE


def local(weight: torch.Tensor) -> torch.Tensor:
    """What this process holds of a weight."""
    return weight.to_local() if hasattr(weight, "to_local") else weight


def whole(weight: torch.Tensor) -> torch.Tensor:
    """All of a weight; ranks give each other theirs."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight
