"""Continuous batching (`generate_batch`): refused where "seqkv" is asked for, because this cache cannot be made there.

transformers' paged cache hands an allocator keys and values one token at a time, of several requests at once, and
nothing else. Without positions the constant part of the keys stays in, without requests no first and last tokens are
dense, and a block is read before it is full, so that its tokens would have to be coded one by one, for which there are
no kernels. Tried that way on SmolLM2-135M, at the bits of the default setting: a KL divergence of 0.011 nats a token
(0.026 where the newest tokens are read from codes too) against 0.0013 in `generate`. Keys with a large bias (Qwen 2.5)
would be lost altogether.
"""

from __future__ import annotations

import functools
import inspect
import warnings

from ..errors import SeqKVWarning, UnsupportedOperationError

NAME = "seqkv"


def refuse(original):
    """Wrap a way into continuous batching: it raises `UnsupportedOperationError` where it is asked for this cache."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def batching(self, *args, **kwargs):
        given = signature.bind_partial(self, *args, **kwargs).arguments
        ignored = given.get("kwargs", {})  # `generate_batch` takes any keyword and reads one
        config = given.get("generation_config") or getattr(self, "generation_config", None)
        named = NAME in (getattr(config, "cache_implementation", None), ignored.get("cache_implementation"))
        if named or any(hasattr(x, "seqkv_config") for x in ignored.values()):
            raise UnsupportedOperationError(
                "continuous batching (generate_batch) has a paged cache of its own, which cannot hold codes; use "
                "generate() with cache_implementation='seqkv', or generate_batch() without it"
            )
        return original(self, *args, **kwargs)

    batching.seqkv_original = original
    return batching


def warn(original):
    """Wrap it where "seqkv" is only the default: it says once that continuous batching keeps its own cache."""
    said: list[bool] = []

    @functools.wraps(original)  # copies `seqkv_original` too
    def batching(self, *args, **kwargs):
        if not said:
            said.append(True)
            message = "continuous batching (generate_batch) keeps its own paged cache; only generate() uses seqkv"
            warnings.warn(message, SeqKVWarning, stacklevel=2)
        return original(self, *args, **kwargs)

    return batching


PATCHES = {"init_continuous_batching": refuse, "generate_batch": refuse}
