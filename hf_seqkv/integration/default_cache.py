"""Make "seqkv" the cache of every `generate` that asks for no other, for programs that do not know of it."""

from __future__ import annotations

import functools
import warnings

from transformers.generation.utils import ALL_CACHE_NAMES

from ..config import SeqKVConfig
from ..errors import SeqKVWarning, UnsupportedModelError
from . import continuous
from .generate import NAME, install, owner_of

METHOD, BATCHES = "_prepare_cache_for_generation", "init_continuous_batching"


def use_by_default(**options) -> None:
    """Let `generate` use this cache unless its caller names or passes another, or `use_cache=False`.

    A model that cannot be coded keeps its own cache, with one `SeqKVWarning` that says why. The last call wins;
    `uninstall()` takes it back.

    Args:
        **options: Fields of `SeqKVConfig`.

    Raises:
        ConfigError: An option is unknown or its value invalid.
    """
    SeqKVConfig.from_dict(options)
    install()
    for name, wrap in ((METHOD, functools.partial(_with_default, options=options)), (BATCHES, continuous.warn)):
        owner = owner_of(name)
        setattr(owner, name, wrap(vars(owner)[name]))


def _with_default(prepare, options):
    said: set[str] = set()

    @functools.wraps(prepare)  # copies `seqkv_original` too, by which `uninstall` finds transformers' own method
    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        if not _is_free(generation_config, model_kwargs):
            return prepare(self, generation_config, model_kwargs, *args, **kwargs)
        before = dict(model_kwargs)
        # generate works on a copy of the caller's config
        generation_config.cache_implementation, generation_config.cache_config = NAME, dict(options)
        try:
            return prepare(self, generation_config, model_kwargs, *args, **kwargs)
        except UnsupportedModelError as error:
            if str(error) not in said:
                said.add(str(error))
                message = f"{type(self).__name__} keeps its own cache: {error}"
                warnings.warn(message, SeqKVWarning, stacklevel=2)
        generation_config.cache_implementation = generation_config.cache_config = None
        model_kwargs.clear()  # of the cache that was made before the model was refused
        model_kwargs.update(before)
        return prepare(self, generation_config, model_kwargs, *args, **kwargs)

    return _prepare_cache_for_generation


def _is_free(generation_config, model_kwargs) -> bool:
    """Whether the caller left the choice of a cache to `generate`."""
    return (
        generation_config.cache_implementation is None
        and generation_config.use_cache is not False
        and all(model_kwargs.get(name) is None for name in ALL_CACHE_NAMES)
    )
