"""One generation, measured: memory, time, text; `python -m hf_seqkv.eval.measure JSON` in a process of its own.

A process has one peak of memory, so caches are compared in separate processes.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field

import torch
from tqdm.auto import tqdm
from transformers.generation.streamers import BaseStreamer

from ..config import SeqKVConfig
from ..errors import ConfigError, SeqKVError
from ..integration.cache import SeqKVCache
from ..integration.compat import CACHE_NAME
from . import passages, smollm2
from .extras import require


@dataclass(frozen=True)
class Run:
    """What to measure.

    Args:
        cache: `"dynamic"` or `"seqkv"`.
        options: Fields of `SeqKVConfig`, for `"seqkv"`.
        context: Tokens of the prompt.
        new_tokens: Tokens to generate, greedily.
        dtype: Of weights and activations, `"float32"` or `"bfloat16"`.
    """

    cache: str
    options: dict = field(default_factory=dict)
    context: int = 4096
    new_tokens: int = 64
    dtype: str = "float32"


class Clock(BaseStreamer):
    """Notes when `generate` hands over the prompt and then each token."""

    def __init__(self, tokens: int, label: str, progress: bool):
        self.times: list[float] = []  # seconds
        self.bar = tqdm(total=tokens, desc=label, unit="token", disable=not progress, leave=False)

    def put(self, value) -> None:
        if self.times:
            self.bar.update()
        self.times.append(time.perf_counter())

    def end(self) -> None:
        self.bar.close()

    def prefill(self) -> float:
        return self.times[1] - self.times[0]

    def steps(self) -> list[float]:
        return [b - a for a, b in zip(self.times[1:], self.times[2:], strict=False)]


def measure(run: Run, progress: bool = True) -> dict:
    """Load the model, warm up, generate.

    Returns:
        JSON types; bytes and seconds. `peak_bytes` is the process's most since just before the prefill, or since its
        start where the system cannot restart the count (`peak_since_prefill`).

    Raises:
        ConfigError: The model or the text is too short for `context + new_tokens`.
    """
    require("psutil")
    model, tokenizer, description = smollm2.load(getattr(torch, run.dtype))
    limit = model.config.max_position_embeddings
    if run.context + run.new_tokens > limit:
        raise ConfigError(
            f"context {run.context} + {run.new_tokens} new tokens exceed the model's {limit}; ask for fewer"
        )
    ids = passages.prompt(tokenizer, run.context)
    _warm_up(model, ids, run, progress)
    before = _resident_bytes()
    restarted = _restart_peak()
    clock = Clock(run.new_tokens, f"{run.cache}: prefill and decode", progress)
    out = _generate(model, ids, run, run.new_tokens, clock)
    new = out.sequences[0, run.context :]
    peak, median = _peak_bytes(), statistics.median(clock.steps())
    return {
        "run": asdict(run),
        "model": description,
        "threads": torch.get_num_threads(),
        "tokens": new.tolist(),
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "cache": cache_facts(out[CACHE_NAME]),
        "before_prefill_bytes": before,
        "after_bytes": _resident_bytes(),
        "peak_bytes": peak,
        "peak_since_prefill": restarted,
        "prefill_seconds": clock.prefill(),
        "step_seconds": clock.steps(),
        "median_step_seconds": median,
        "decode_tokens_per_second": 1 / median,
    }


def _warm_up(model, ids: torch.Tensor, run: Run, progress: bool) -> None:
    """The same path on the first tokens: enough of them for two pages, and steps that read those."""
    if progress and run.cache == "seqkv":
        print("warming up; the first time on a machine the kernel is compiled, about 30 s", file=sys.stderr)
    config = SeqKVConfig.from_dict(run.options)
    length = config.n_sink + config.residual_length + 3 * config.page_size
    _generate(model, ids[:, :length], run, 4, Clock(4, f"{run.cache}: warm-up", progress))


def _generate(model, ids: torch.Tensor, run: Run, new_tokens: int, clock: Clock):
    choice = {"cache_implementation": "seqkv", "cache_config": run.options} if run.cache == "seqkv" else {}
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,  # equally many steps for every cache
        do_sample=False,
        streamer=clock,
        return_dict_in_generate=True,
        **choice,
    )


def cache_facts(cache) -> dict:
    """Tokens held, bytes as allocated and their parts; `bits_per_value` is None before the first page."""
    if isinstance(cache, SeqKVCache):
        memory, bits = cache.memory(), cache.bits_per_value()
        parts = {name: size for name, size in memory.items() if name not in ("total", "host")}
        options, total = cache.seqkv_config.to_dict(), memory["total"]
    else:
        tensors = [x for layer in cache.layers for x in (layer.keys, layer.values)]
        total = sum(x.untyped_storage().nbytes() for x in tensors)
        bits, parts, options = float(8 * tensors[0].element_size()), {"dense": total}, {}
    return {
        "kind": type(cache).__name__,
        "tokens": cache.get_seq_length(),
        "options": options,
        "bytes": total,
        "parts": parts,
        "bits_per_value": None if math.isnan(bits) else bits,
    }


def _resident_bytes() -> int:
    """Resident memory, once what was freed has gone back to the system where the C library can do that (glibc)."""
    import psutil

    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)(0)
    return psutil.Process().memory_info().rss


def _peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024  # the one system that counts in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _restart_peak() -> bool:
    """Let the peak start from what is resident now: loading a model takes more than running it (Linux only)."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


def measure_in_process(run: Run) -> dict:
    """`measure` in a fresh process; its progress goes to stderr.

    Raises:
        SeqKVError: The process failed; what it printed says why.
    """
    command = [sys.executable, "-m", __name__, json.dumps(asdict(run))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SeqKVError(f"measuring the {run.cache} cache failed with exit status {done.returncode}, as said above")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    try:
        print(json.dumps(measure(Run(**json.loads(sys.argv[1])))))
    except SeqKVError as error:
        print(f"seqkv: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
