"""Packages that only the demo needs."""

from __future__ import annotations

import importlib.util

from ..errors import SeqKVError


def require(*modules: str) -> None:
    """Check that modules of the `demo` extra can be imported.

    Raises:
        SeqKVError: One cannot; the message names it and the command that installs it.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise SeqKVError(f"{', '.join(missing)}: not installed; run: pip install 'hf-seqkv[demo]' {' '.join(missing)}")
