"""`generate(cache_implementation="seqkv")`: patches of transformers' methods, and their removal."""

from __future__ import annotations

import functools

import torch
from transformers.cache_utils import DynamicCache
from transformers.generation import configuration_utils
from transformers.generation.utils import GenerationMixin

from ..errors import ConfigError, UnsupportedModelError
from . import capture, continuous
from .attention import unwrap_attention, wrap_attention
from .cache import SeqKVCache
from .compat import CACHE_NAME
from .continuous import NAME
from .graphed_steps import graphed
from .latent import unwrap_expansions


def allow_name() -> None:
    """Let `GenerationConfig.validate` accept the name."""
    if NAME not in configuration_utils.ALL_CACHE_IMPLEMENTATIONS:
        configuration_utils.ALL_CACHE_IMPLEMENTATIONS = (*configuration_utils.ALL_CACHE_IMPLEMENTATIONS, NAME)


def install() -> None:
    """Make `"seqkv"` a cache implementation of `generate` and let attention read codes. Done by `import hf_seqkv`."""
    allow_name()
    wrap_attention()
    for name, wrap in _PATCHES.items():
        owner = owner_of(name)
        original = vars(owner)[name]
        if not hasattr(original, "seqkv_original"):
            setattr(owner, name, wrap(original))


def owner_of(name: str) -> type:
    """The class that defines a method of `GenerationMixin`."""
    return next(base for base in GenerationMixin.__mro__ if name in vars(base))


def uninstall() -> None:
    """Take everything back: patches, attention wrappers, hooks on models."""
    names = configuration_utils.ALL_CACHE_IMPLEMENTATIONS
    configuration_utils.ALL_CACHE_IMPLEMENTATIONS = tuple(name for name in names if name != NAME)
    unwrap_attention()
    unwrap_expansions()
    capture.detach_all()
    for name in _PATCHES:
        owner = owner_of(name)
        if hasattr(vars(owner)[name], "seqkv_original"):
            setattr(owner, name, vars(owner)[name].seqkv_original)


def _prepare(original):
    @functools.wraps(original)
    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        given = model_kwargs.get(CACHE_NAME)
        if isinstance(given, SeqKVCache):
            wrap_attention()
            given.expected_length = generation_config.max_length or 0
            given.bind(self)
        if generation_config.is_assistant and generation_config.cache_implementation == NAME:
            generation_config.cache_implementation = None  # a draft keeps its own cache: 5.24 has it so for all names
        if generation_config.cache_implementation != NAME:
            return original(self, generation_config, model_kwargs, *args, **kwargs)
        if given is not None and not isinstance(given, SeqKVCache):
            return original(self, generation_config, model_kwargs, *args, **kwargs)  # upstream's own conflict error
        # generate works on a copy of the config: as "dynamic", upstream checks everything and builds its cache
        generation_config.cache_implementation = None
        try:
            result = original(self, generation_config, model_kwargs, *args, **kwargs)
        finally:
            generation_config.cache_implementation = NAME
        if given is None and generation_config.use_cache is not False:
            _swap(self, generation_config, model_kwargs)
        return result

    _prepare_cache_for_generation.seqkv_original = original
    return _prepare_cache_for_generation


def _swap(model, generation_config, model_kwargs) -> None:
    built = model_kwargs.get(CACHE_NAME)
    if type(built) is not DynamicCache:
        kind = "no cache" if built is None else f"a {type(built).__name__}"
        raise UnsupportedModelError(
            f"cache_implementation='seqkv': {type(model).__name__} generates with {kind}, not with keys and values "
            "of a decoder; leave cache_implementation out for this model"
        )
    options = generation_config.cache_config
    if options is None:
        options = getattr(generation_config, NAME, None) or {}
    if not isinstance(options, dict):
        raise ConfigError(f"cache_config must be a dict of SeqKVConfig fields, not a {type(options).__name__}")
    cache = SeqKVCache(config=model.config.get_text_config(decoder=True), **options)
    cache.expected_length = generation_config.max_length or 0
    wrap_attention()  # another library may have registered its own since
    cache.bind(model)
    model_kwargs[CACHE_NAME] = cache


def _prefill(original):
    @functools.wraps(original)
    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        prefixes = getattr(model_kwargs.get(CACHE_NAME), "prefixes", None)
        if prefixes is None:
            return original(self, input_ids, generation_config, model_kwargs, *args, **kwargs)
        if _ids_alone(generation_config, input_ids, model_kwargs):
            # `original` runs the tokens that are not in the cache
            prefixes.load(input_ids, model_kwargs.get("attention_mask"))
        with prefixes.timed(input_ids.shape[1]):
            return original(self, input_ids, generation_config, model_kwargs, *args, **kwargs)

    _prefill.seqkv_original = original
    return _prefill


def _sample(original):
    @functools.wraps(original)
    def _sample(self, *args, **kwargs):
        with graphed(self, kwargs.get(CACHE_NAME)):
            return original(self, *args, **kwargs)

    _sample.seqkv_original = original
    return _sample


def _ids_alone(generation_config, input_ids, model_kwargs) -> bool:
    """Whether what a prompt leaves in the cache depends on its token ids alone, and all of them are given."""
    others = ("inputs_embeds", "token_type_ids", "pixel_values", "pixel_values_videos", "input_features")
    if any(model_kwargs.get(name) is not None for name in others):
        return False
    mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    if mask is None:
        if getattr(generation_config, "_mask_length", -1) != input_ids.shape[1]:
            return False
        mask = torch.ones_like(input_ids)
    return positions is None or bool(((positions == mask.cumsum(-1) - 1) | (mask == 0)).all())


_PATCHES = {
    "_prepare_cache_for_generation": _prepare,
    "_prefill": _prefill,
    "_sample": _sample,
    **continuous.PATCHES,
}
