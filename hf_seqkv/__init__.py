"""hf_seqkv: a compressed KV cache for Hugging Face Transformers.

`import hf_seqkv` makes `model.generate(..., cache_implementation="seqkv")` work. It stays light: transformers is not
imported before the program does so itself.
"""

from __future__ import annotations

import importlib

from .register import register

__version__ = "0.1.0"

_PUBLIC = {
    "SeqKVConfig": ".config",
    "SeqKVCache": ".integration.cache",
    "SeqKVCalibration": ".calibration.artifact",
    "PrefixStore": ".store.prefix_store",
    "install": ".integration.generate",
    "uninstall": ".integration.generate",
    "calibrate": ".integration.collect",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted(__all__)


register()
