"""The refusal of keys and values that are not finite: a quantiser has no code for them."""

from __future__ import annotations

import torch

from ..errors import NonFiniteError


def refuse_nonfinite(x: torch.Tensor, name: str, layer: int, rows: list[int], slot: int) -> None:
    """Check keys or values `x [R, H, n, D]` of `rows` of a batch, the first token at `slot`.

    Raises:
        NonFiniteError: Naming the first that is not finite.
    """
    if torch.isfinite(x.sum()) or torch.isfinite(x).all():  # the sum is quick and nearly always finite
        return
    row, _, token, _ = (~torch.isfinite(x)).nonzero()[0].tolist()
    raise NonFiniteError(
        f"{name} of layer {layer}, row {rows[row]}, token {token + slot} are not finite and cannot be quantised; run "
        "the model in a wider dtype (bfloat16 or float32) or use method='dense'"
    )
