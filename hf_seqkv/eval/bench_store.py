"""Time to first token with and without a stored prefix, and what the store's forms take: bytes, and time to write.

A prompt is a prefix that was stored, and tokens that follow it. All ways to its first token are timed in turn in one
run: prefill with transformers' own cache, prefill with this one, and loading from every form, with its files in the
system's page cache (warm) or put out of it (cold, where the system allows that).
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import DynamicCache

from ..errors import ConfigError, SeqKVError
from ..integration.cache import SeqKVCache
from ..integration.compat import CACHE_NAME
from ..store.prefix_store import PrefixStore
from .bench_timing import interleaved, spread

DENSE, PREFILL = "DynamicCache", "prefill"


def measure(
    model,
    ids: torch.Tensor,
    prefix: int,
    forms: list[str],
    options: dict[str, Any],
    seconds: float,
    directory: Path | None = None,
    others: Sequence[torch.Tensor] = (),
    progress: bool = True,
) -> dict:
    """Time the first token of a prompt.

    Args:
        ids: The prompt, `[1, T]`; its first `prefix` tokens are stored.
        forms: Of pages, `"hot"`, `"exact"`, `"sequence"`.
        options: Fields of `SeqKVConfig`.
        seconds: For each way.
        directory: Where stores are made, for a while; a temporary one if None.
        others: Other prompts, `[1, T]`: the store of the form `exact` gets one after the other until it has tables, as
            a store in use has them.

    Returns:
        JSON types: for each of `ways` seconds (median, quartiles, mean) and `speedup` over transformers' own cache; for
        each of `forms` `pages`, `bytes`, `bits_per_value`, `write_seconds` and `kl`, nats a token by which predictions
        of what follows the prefix differ from those after a dense prefill; of `exact` also `tables`, the bytes of those
        that were learned, which are in no other figure.

    Raises:
        ConfigError: The prefix holds no page, or is the whole prompt; or a form cannot be had with these options.
        SeqKVError: Stored pages could not be loaded.
    """
    if not 0 < prefix < ids.shape[1]:
        raise ConfigError(f"a prefix of {prefix} tokens of a prompt of {ids.shape[1]}: it must be shorter")
    # Predictions of what no form has loaded: the vocabulary is large.
    last = ids.shape[1] - prefix
    expected = _predictions(model, ids, DynamicCache(config=model.config), last)
    facts, calls = {}, {DENSE: lambda _: _first_token(model, ids), PREFILL: lambda _: _first_token(model, ids, options)}
    with tempfile.TemporaryDirectory(dir=directory) as made:
        for form in tqdm(forms, desc="store: write", unit="form", disable=not progress, leave=False):
            store = _AlwaysLoaded(Path(made, form), form=form)
            tables = _teach(model, options, store, others) if form == "exact" else 0
            known = store.stat()
            begun = time.perf_counter()
            cache = _first_token(model, ids[:, :prefix], options, store)
            first = time.perf_counter()
            store.flush()
            found = {name: store.stat()[name] - known[name] for name in ("entries", "bytes")}
            if not found["entries"]:
                raise ConfigError(f"a prefix of {prefix} tokens holds no page; take a longer one")
            values = found["entries"] * sum(
                layer.codec.page_size * layer.codec.heads * (layer.codec.key_dim + layer.codec.value_dim)
                for layer in cache._coded()
            )
            facts[form] = {
                "pages": found["entries"],
                "bytes": found["bytes"],
                "bits_per_value": 8 * found["bytes"] / values,
                "prefill_seconds": first - begun,
                "write_seconds": time.perf_counter() - first,
            }
            if tables:
                facts[form]["tables"] = tables
            woken = SeqKVCache(config=model.config.get_text_config(decoder=True), prefix_store=store, **options)
            woken.bind(model)
            filled = woken.prefixes.load(ids)
            found = _predictions(model, ids[:, filled:], woken, last)
            facts[form]["kl"] = (expected.exp() * (expected - found)).sum(-1).mean().item()
            calls |= _loads(model, ids, options, store, Path(made, form))
        times = {name: spread(found) for name, found in interleaved(calls, 1, seconds * len(calls)).items()}
    dense = times[DENSE]["median"]
    ways = {name: time | {"speedup": dense / time["median"]} for name, time in times.items()}
    return {"tokens": ids.shape[1], "prefix": prefix, "ways": ways, "forms": facts}


def _teach(model, options: dict[str, Any], store: PrefixStore, others: Sequence[torch.Tensor]) -> int:
    """Store prompts until tables are learned of their pages; returns the bytes these take."""
    for ids in others:
        _first_token(model, ids, options, store)
        store.flush(slow=True)
        for entry in store.entries():
            if entry.form == "tables":
                return entry.bytes
    return 0


class _AlwaysLoaded(PrefixStore):
    """A store that no plan finds slower than a prefill: it forgets what was measured."""

    def note_rate(self, *measured, **more) -> None:
        pass


@torch.no_grad()
def _predictions(model, ids: torch.Tensor, cache, last: int) -> torch.Tensor:
    """Log-probabilities after each of the last tokens of `ids [1, T]`, `[last, V]`."""
    return model(ids, **{CACHE_NAME: cache}, logits_to_keep=last).logits[0].float().log_softmax(-1)


def _loads(model, ids, options, store: PrefixStore, folder: Path) -> dict[str, Callable]:
    """Ways to load from a store: warm and, where the system can forget files, cold."""

    def warm(_) -> None:
        cache = _first_token(model, ids, options, store)
        if not cache.prefixes.loaded:
            raise SeqKVError(f"pages of the form {store.form} were not loaded: {cache.prefixes.plan.why}")

    def cold(_) -> None:
        for path in folder.rglob("*"):
            if path.is_file():
                file = os.open(path, os.O_RDONLY)
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(file)
        warm(_)

    ways = {f"{store.form}, warm": warm}
    return ways | {f"{store.form}, cold": cold} if hasattr(os, "posix_fadvise") else ways


def _first_token(model, ids: torch.Tensor, options: dict[str, Any] | None = None, store: PrefixStore | None = None):
    """The cache after one token; transformers' own where there are no options."""
    chosen = {}
    if options is not None:
        chosen = {"cache_implementation": "seqkv", "cache_config": options | {"prefix_store": store}}
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=1,
        do_sample=False,
        return_dict_in_generate=True,
        **chosen,
    )
    return made[CACHE_NAME]


def table(result: dict) -> str:
    """For people: a line a way, then a line a form."""
    lines = [f"{'first token of ' + str(result['tokens']) + ' tokens':<28}{'seconds':>10}{'speedup':>10}"]
    for name, way in result["ways"].items():
        lines.append(f"{name:<28}{way['median']:>10.3f}{way['speedup']:>9.1f}x")
    lines += ["", f"{'form':<12}{'pages':>7}{'MB':>9}{'bits a value':>14}{'KL':>10}{'written in, s':>15}"]
    for form, facts in result["forms"].items():
        size = f"{facts['bytes'] / 1e6:>9.2f}{facts['bits_per_value']:>14.3f}{facts['kl']:>10.4f}"
        lines.append(f"{form:<12}{facts['pages']:>7}{size}{facts['write_seconds']:>15.2f}")
    return "\n".join(lines)
