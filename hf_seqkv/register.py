"""Install the hook when transformers is imported, or at once where it already is.

Importing transformers' modelling code takes seconds; a program that only touches `SeqKVConfig` should not pay for it.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys

# What to run once a module of transformers has been imported. The first makes `GenerationConfig(...)` accept the name.
_ACTIONS = {
    "transformers.generation.configuration_utils": "allow_name",
    "transformers.modeling_utils": "install",
}


def _allow_name() -> None:
    module = sys.modules["transformers.generation.configuration_utils"]
    names = getattr(module, "ALL_CACHE_IMPLEMENTATIONS", None)  # where there is none, `_install` will say so
    if names is not None and "seqkv" not in names:
        module.ALL_CACHE_IMPLEMENTATIONS = (*names, "seqkv")


def _install() -> None:
    importlib.import_module("hf_seqkv.integration.compat").check()
    importlib.import_module("hf_seqkv.integration.generate").install()


_RUN = {"allow_name": _allow_name, "install": _install}


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finder that lets the others find a module and runs its action after the module's own code."""

    def __init__(self):
        self._busy: set[str] = set()

    def find_spec(self, name, path, target=None):
        if name not in _ACTIONS or name in self._busy:
            return None
        self._busy.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._busy.discard(name)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            _RUN[_ACTIONS[name]]()

        spec.loader.exec_module = exec_module
        return spec


def register() -> None:
    """See the module's docstring; a second call does nothing."""
    for name, action in _ACTIONS.items():
        if name in sys.modules:
            _RUN[action]()
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
