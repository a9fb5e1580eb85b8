"""Whole decode steps of a model with the dense caches of transformers and with this one, in one run.

Every cache is filled by a prefill of the same prompt; then the caches take single steps in turn. Weights take most of a
small model's step, so this is what a user gains, where `bench_kernels` shows what a layer's attention gains.

Steps run as `generate` runs them: on a GPU ours are replayed as CUDA graphs (`"seqkv-eager"` are not), and those of a
`StaticCache` compiled (`"compiled"`; `"static"` are not).
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

from ..config import SeqKVConfig
from ..errors import ConfigError
from ..integration.cache import SeqKVCache
from ..integration.compat import CACHE_NAME
from ..integration.graphed_steps import Steps
from ..integration.layer import SeqKVLayer
from . import passages, roofline_model
from .bench_timing import spread, with_speedup

CACHES = {"cpu": ("dynamic", "static", "seqkv"), "cuda": ("dynamic", "static", "compiled", "seqkv-eager", "seqkv")}
OURS = ("seqkv", "seqkv-eager")
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
    """An empty cache, `"dynamic"`, `"static"` or `"compiled"` of `room` tokens, or one of ours with `options`."""
    if name in OURS:
        cache = SeqKVCache(config=config, **options)
        cache.expected_length = room
        return cache
    return DynamicCache(config=config) if name == "dynamic" else StaticCache(config=config, max_cache_len=room)


def stepper(name: str, model, cache) -> Callable:
    """What runs steps of a model through a cache of that name."""
    if name == "compiled":
        return model.get_compiled_call(None)
    if name == "seqkv" and model.device.type == "cuda" and cache.seqkv_config.cuda_graphs:
        return Steps(model, cache)
    return model


def forward(model: Callable, ids: torch.Tensor, cache, first: int = 0) -> float:
    """Seconds of one forward of `ids [B, T]`, at positions from `first`, through a cache, a GPU's work included."""
    positions = torch.arange(first, first + ids.shape[1], device=ids.device)[None]
    start = time.perf_counter()
    model(input_ids=ids, position_ids=positions, **{CACHE_NAME: cache}, logits_to_keep=1)
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
    caches: tuple[str, ...] | None = None,
    options: dict | None = None,
    progress: bool = True,
) -> dict:
    """Prefill and decode with every cache.

    Args:
        model: A causal language model.
        ids: The prompts, `[B, T]`, on its device. Their first tokens are fed again as the new ones, to all caches.
        new_tokens: Steps of each cache, at least 2. Every `page_size` steps one of them makes a page.
        caches: Which; by default `CACHES` of the device.
        options: Fields of `SeqKVConfig`.

    Returns:
        JSON types, seconds. `speedup` is against `baseline`, the faster of the dense caches, by medians.

    Raises:
        ConfigError: More steps than the prompt has tokens, or an invalid option.
    """
    options, context = options or {}, ids.shape[1]
    caches = caches or CACHES[ids.device.type]
    config = SeqKVConfig.from_dict(options)
    if new_tokens > context:
        raise ConfigError(f"{new_tokens} new tokens are more than the context's {context}; ask for fewer")
    few = min(context, config.n_sink + config.residual_length + 3 * config.page_size)
    _warm_up(model, ids[:, :few], caches, context + new_tokens, options)
    total = len(caches) * (context + new_tokens)
    with tqdm(total=total, unit="token", disable=not progress, leave=False) as bar:
        held, clocks, prefill, steppers = {}, {}, {}, {}
        for name in caches:
            bar.set_description(f"{name}: prefill")
            held[name] = make_cache(name, model.config, context + new_tokens, options)
            clocks[name] = PageClock(held[name])
            prefill[name] = forward(model, ids, held[name])
            steppers[name] = stepper(name, model, held[name])
            bar.update(context)
        prefill_pages = {name: clock.seconds for name, clock in clocks.items()}
        bar.set_description("decode")
        times: dict[str, list[float]] = {name: [] for name in caches}
        made = dict.fromkeys(caches, 0)
        for i in range(new_tokens):
            for name, cache in held.items():
                before = clocks[name].pages
                times[name].append(forward(steppers[name], ids[:, i : i + 1], cache, context + i))
                made[name] += clocks[name].pages > before
                bar.update()
    steps = {name: {"step": spread(times[name]), "step_seconds": times[name]} for name in caches}
    found, baseline = against_dense(steps)
    for name, entry in found.items():
        entry |= {"tokens_per_second": len(ids) / entry["step"]["median"], "prefill_seconds": prefill[name]}
        if name in OURS:
            decode = clocks[name].seconds - prefill_pages[name]
            entry["memory"] = held[name].memory()
            entry["pages"] = {
                "prefill_seconds": prefill_pages[name],
                "prefill_share": prefill_pages[name] / prefill[name],
                "decode_seconds": decode,
                "decode_share": decode / sum(times[name]),
                "steps": made[name],
            }
    sizes = {"context": context, "batch": len(ids), "new_tokens": new_tokens}
    return {**sizes, "baseline": baseline, "caches": found}


def against_dense(found: dict[str, dict]) -> tuple[dict[str, dict], str | None]:
    """Entries with `speedup` against the faster dense cache, and its name; both None where there is none."""
    dense = {name: entry["step"]["median"] for name, entry in found.items() if name not in OURS}
    if not dense:
        return {name: entry | {"speedup": None} for name, entry in found.items()}, None
    baseline = min(dense, key=dense.get)
    gains = with_speedup({name: entry["step"] for name, entry in found.items()}, baseline)
    return {name: entry | {"speedup": gains[name]["speedup"]} for name, entry in found.items()}, baseline


def _warm_up(model, ids: torch.Tensor, caches, room: int, options: dict) -> None:
    """The same path on a few tokens, enough for two pages: kernels are compiled and memory is mapped."""
    for name in caches:
        cache = make_cache(name, model.config, room, options)
        forward(model, ids, cache)
        step = stepper(name, model, cache)
        for i in range(4):
            forward(step, ids[:, i : i + 1], cache, ids.shape[1] + i)
