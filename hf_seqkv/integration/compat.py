"""Which transformers this works with, what it needs of it, and what it works around.

Tested with 5.21 to 5.24. From 5.15 on every seam is there, but upstream fails: before 5.21 a chunked prefill runs the
whole prompt again after a prefix that was loaded, before 5.18 its own sliding cache breaks in assisted decoding. 5.14
and older have another cache interface (`crop` to a length).

What the modules beside this one do only because transformers leaves no other way:

- `generate`, `register`: their name among `ALL_CACHE_IMPLEMENTATIONS`, else `GenerationConfig` refuses it; a
  `DynamicCache` that upstream builds and `generate` swaps. Drop when caches can be registered.
- `generate`: a wrapped `_prefill`, to load stored prefixes before it. Drop when a cache is shown the prompt.
- `generate`: `_mask_length` is read, because a mask of ones is dropped. Drop when it is kept.
- `generate`: options as a key `"seqkv"` of their own, because a saved `cache_implementation` breaks loading without
  this package. Drop when unknown names are refused in `generate` and no earlier.
- `generate`: a wrapped `_sample`, in which a model's forward is another, that replays steps. Drop when a cache can say
  how it wants its steps run, as compiled ones of static caches are.
- `register`: an import hook that installs. Drop when transformers has an entry point for plug-ins.
- `capture`: hooks on modules for mask, cosines, sines and ids. Drop when `Cache.update` is given them.
- `capture`: one global hook until a cache has met its model, told by its config. Drop when a cache is given its model.
- `attention`, `handle`: wrappers of registered functions, and tensors without storage. Drop when a cache may attend.
- `attention`: "eager" is looked up in the model's file and probed. Drop when it is registered like the others.
- `layer`: `keys` and `values` are rebuilt for models that read them. Drop when these call a method.
- `cache`: is a `DynamicCache`, because upstream asks for that class. Drop when it asks what a cache can do.
- `shards`: a model's `_device_mesh` is read, or that of its weights. Drop when a cache is told its rank.
- `continuous`: refuses. Drop when an allocator is given positions and whole blocks.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import warnings

import transformers
from transformers.generation import utils

from ..errors import SeqKVWarning, UnsupportedVersionError

LOWEST, NEWEST = "5.21", "5.24"  # minor versions the tests have passed with
# The keyword and the field of outputs that hold a cache: `cache`; `past_key_values` before 5.24, which takes both.
CACHE_NAME = getattr(utils, "ALL_CACHE_NAMES", ["cache"])[0]
# module: name, and the parameters of it that are used by name or place.
SEAMS = {
    "generation.configuration_utils": {"ALL_CACHE_IMPLEMENTATIONS": ()},
    "generation.utils": {
        "ALL_CACHE_NAMES": (),
        "GenerationMixin.prepare_inputs_for_generation": (CACHE_NAME,),
        "GenerationMixin._prepare_cache_for_generation": ("generation_config", "model_kwargs"),
        "GenerationMixin._prefill": ("input_ids", "generation_config", "model_kwargs"),
        "GenerationMixin._sample": ("model_kwargs",),
        "GenerationMixin.init_continuous_batching": ("generation_config",),
        "GenerationMixin.generate_batch": ("generation_config", "kwargs"),
    },
    "modeling_utils": {
        "AttentionInterface._global_mapping": (),
        "AttentionInterface.register": ("key", "value"),
        "PreTrainedModel": (),
    },
    "modeling_outputs": {"BaseModelOutputWithPast": (CACHE_NAME,)},
    "cache_utils": {
        "DynamicCache": ("config",),
        "DynamicCache.update": ("key_states", "value_states", "layer_idx"),
        "DynamicCache.activate_past_recording": (),
        "DynamicLayer.crop": ("tokens_to_remove",),
        "DynamicLayer.get_mask_sizes": ("query_length",),
        "DynamicLayer.get_max_length": (),
        "DynamicSlidingWindowLayer": ("sliding_window",),
    },
}


@functools.cache
def check() -> None:
    """Compare the installed transformers with what this package needs. Done when either of the two is imported.

    Warns once where all is there but the version was not tested.

    Raises:
        UnsupportedVersionError: Something is missing, or is called otherwise.
    """
    gone, advice = missing(), f"pip install 'transformers>={LOWEST},<{_after(NEWEST)}'"
    if gone:
        raise UnsupportedVersionError(
            f"transformers {transformers.__version__} has no {', '.join(gone)}, which hf_seqkv needs; it works with "
            f"{LOWEST} to {NEWEST}: {advice}"
        )
    age = untested(transformers.__version__)
    if age:
        warnings.warn(
            f"this transformers is {age} than those hf_seqkv was tested with: {transformers.__version__}, not {LOWEST} "
            f"to {NEWEST}. What it needs is there, so it goes on; if something fails, {advice}",
            SeqKVWarning,
            stacklevel=2,
        )


def missing() -> list[str]:
    """Seams that the installed transformers lacks, or whose parameters have other names."""
    gone = []
    for module, names in SEAMS.items():
        try:
            owner = importlib.import_module(f"transformers.{module}")
        except ImportError:
            gone.append(f"transformers.{module}")
            continue
        for name, parameters in names.items():
            found = functools.reduce(lambda x, part: getattr(x, part, None), name.split("."), owner)
            if found is None:
                gone.append(name)
            elif parameters:
                known = inspect.signature(found).parameters
                gone += [f"{name}({parameter}=)" for parameter in parameters if parameter not in known]
    return gone


def untested(version: str) -> str:
    """`"older"` or `"newer"` than the tested versions, or `""`; patch releases are not told apart."""
    low, own, high = (_minor(x) for x in (LOWEST, version, NEWEST))
    return "older" if own < low else "newer" if own > high else ""


def _minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _after(version: str) -> str:
    major, minor = _minor(version)
    return f"{major}.{minor + 1}"
