"""Whole decode steps of a model with the dense caches of transformers and with this one, in one run.

Every cache is filled by a prefill of the same prompt; then the caches take single steps in turn. Weights take most of a
small model's step, so this is what a user gains, where `bench_kernels` shows what a layer's attention gains.
"""

from __future__ import annotations

import time

import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

from ..config import SeqKVConfig
from ..errors import ConfigError
from ..integration.cache import SeqKVCache
from ..integration.compat import CACHE_NAME
from ..integration.layer import SeqKVLayer
from . import passages, roofline_model
from .bench_timing import spread, with_speedup

CACHES = ("dynamic", "static", "seqkv")
DENSE = ("dynamic", "static")
TEXT = 4096  # tokens of a real text, which the demo's has


class PageClock:
    """Seconds that the layers of a cache spend on making pages: encoding, and copying the tokens that stay dense.

    On a GPU those between events before and after: what runs there of it, and nothing waits.
    """

    def __init__(self, cache):
        self.pages = 0
        self._seconds: list[float] = []
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        for layer in cache.layers:
            if isinstance(layer, SeqKVLayer):
                self._watch(layer)

    @property
    def seconds(self) -> float:
        return sum(self._seconds) + sum(first.elapsed_time(last) for first, last in self._events) / 1e3

    def _watch(self, layer: SeqKVLayer) -> None:
        flush = layer._flush

        def timed(source, plan):
            self.pages += sum(due for _, _, due, _ in plan)
            if source[0].device.type != "cuda":
                start = time.perf_counter()
                flush(source, plan)
                self._seconds.append(time.perf_counter() - start)
                return
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            flush(source, plan)
            events[1].record()
            self._events.append(tuple(events))

        layer._flush = timed


def prompt(tokenizer, length: int) -> torch.Tensor:
    """`[1, length]` token ids; beyond `TEXT` they repeat, since times depend on the length alone."""
    ids = passages.prompt(tokenizer, min(length, TEXT))
    return ids.repeat(1, -(-length // ids.shape[1]))[:, :length]


def make_cache(name: str, config, room: int, options: dict):
    """An empty cache, `"dynamic"`, `"static"` of `room` tokens, or `"seqkv"` with `options`."""
    if name == "seqkv":
        return SeqKVCache(config=config, **options)
    return DynamicCache(config=config) if name == "dynamic" else StaticCache(config=config, max_cache_len=room)


def forward(model, ids: torch.Tensor, cache) -> float:
    """Seconds of one forward of `ids [B, T]` through a cache, a GPU's work included."""
    start = time.perf_counter()
    model(ids, **{CACHE_NAME: cache}, logits_to_keep=1)
    if ids.device.type == "cuda":
        torch.cuda.synchronize(ids.device)
    return time.perf_counter() - start


def random_model(name: str, dtype: torch.dtype, device: str):
    """A model of random weights, of a published shape (`roofline_model.PUBLISHED`) or a `config.json`.

    Raises:
        ConfigError, SeqKVError: There is no such config; see `roofline_model.load`.
    """
    config = AutoConfig.for_model(**roofline_model.config_of(name))
    with torch.device(device), torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@torch.no_grad()
def bench(
    model,
    ids: torch.Tensor,
    new_tokens: int,
    caches: tuple[str, ...] = CACHES,
    options: dict | None = None,
    progress: bool = True,
) -> dict:
    """Prefill and decode with every cache.

    Args:
        model: A causal language model.
        ids: The prompts, `[B, T]`, on its device. Their first tokens are fed again as the new ones, to all caches.
        new_tokens: Steps of each cache, at least 2. Every `page_size` steps one of them makes a page.
        options: Fields of `SeqKVConfig`.

    Returns:
        JSON types, seconds. `speedup` is against `baseline`, the faster of the dense caches, by medians.

    Raises:
        ConfigError: More steps than the prompt has tokens, or an invalid option.
    """
    options, context = options or {}, ids.shape[1]
    config = SeqKVConfig.from_dict(options)
    if new_tokens > context:
        raise ConfigError(f"{new_tokens} new tokens are more than the context's {context}; ask for fewer")
    _warm_up(model, ids[:, : config.n_sink + config.residual_length + 3 * config.page_size], caches, options)
    total = len(caches) * (context + new_tokens)
    with tqdm(total=total, unit="token", disable=not progress, leave=False) as bar:
        held, clocks, prefill = {}, {}, {}
        for name in caches:
            bar.set_description(f"{name}: prefill")
            held[name] = make_cache(name, model.config, context + new_tokens, options)
            clocks[name] = PageClock(held[name])
            prefill[name] = forward(model, ids, held[name])
            bar.update(context)
        prefill_pages = {name: clock.seconds for name, clock in clocks.items()}
        bar.set_description("decode")
        times: dict[str, list[float]] = {name: [] for name in caches}
        made = 0
        for i in range(new_tokens):
            for name, cache in held.items():
                before = clocks[name].pages
                times[name].append(forward(model, ids[:, i : i + 1], cache))
                made += clocks[name].pages > before
                bar.update()
    steps = {name: {"step": spread(times[name]), "step_seconds": times[name]} for name in caches}
    found, baseline = against_dense(steps)
    for name, entry in found.items():
        entry |= {"tokens_per_second": len(ids) / entry["step"]["median"], "prefill_seconds": prefill[name]}
        if name == "seqkv":
            decode = clocks[name].seconds - prefill_pages[name]
            entry["memory"] = held[name].memory()
            entry["pages"] = {
                "prefill_seconds": prefill_pages[name],
                "prefill_share": prefill_pages[name] / prefill[name],
                "decode_seconds": decode,
                "decode_share": decode / sum(times[name]),
                "steps": made,
            }
    sizes = {"context": context, "batch": len(ids), "new_tokens": new_tokens}
    return {**sizes, "baseline": baseline, "caches": found}


def against_dense(found: dict[str, dict]) -> tuple[dict[str, dict], str | None]:
    """Entries with `speedup` against the faster dense cache, and its name; both None where there is none."""
    dense = {name: entry["step"]["median"] for name, entry in found.items() if name in DENSE}
    if not dense:
        return {name: entry | {"speedup": None} for name, entry in found.items()}, None
    baseline = min(dense, key=dense.get)
    gains = with_speedup({name: entry["step"] for name, entry in found.items()}, baseline)
    return {name: entry | {"speedup": gains[name]["speedup"]} for name, entry in found.items()}, baseline


def _warm_up(model, ids: torch.Tensor, caches, options: dict) -> None:
    """The same path on a few tokens, enough for two pages: kernels are compiled and memory is mapped."""
    for name in caches:
        cache = make_cache(name, model.config, ids.shape[1] + 4, options)
        for part in (ids, *(ids[:, i : i + 1] for i in range(4))):
            forward(model, part, cache)
