"""What `seqkv bench replay` measures: bits a token of texts kept as token ids, and what restoring their cache costs."""

from __future__ import annotations

import lzma
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import DynamicCache

from ..errors import ConfigError, SeqKVError
from ..integration.replay import MODEL_HEADER_BYTES, pack, restore, unpack

# Key and value components of a token in caches that people quote ratios of: layers x KV heads x (Dk + Dv).
QUOTED = {"80 layers, 8 KV heads of 128": (80 * 8 * 256, 128), "80 layers, 64 KV heads of 128": (80 * 64 * 256, 128)}
QUICK = 5  # repetitions of what takes little
_XZ = {"format": lzma.FORMAT_RAW, "filters": [{"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 2, "lp": 1, "pb": 1}]}


def turboquant_bits(dim: int) -> float:
    """Bits a value at 3 bits, with a scale of 16 bits for each vector of `dim`."""
    return 3 + 16 / dim


@torch.no_grad()
def measure(model, texts: dict[str, torch.Tensor], repeats: int, progress: bool = True) -> dict:
    """Code texts in every way, restore their caches, and time it.

    Args:
        texts: Token ids by name, `[T]` int64, `T` the same for all and at least 2.
        repeats: Of everything that runs the model a step a token.

    Returns:
        JSON types: `tokens`; `texts`, for each its `bits` a token by coder, all bytes counted, and `model_stream`
        without the header; `caches`, for each its `values_per_token`, `turboquant_bits_per_token` and `ratios` of that
        to the texts' mean bits by coder; `seconds`, medians for the whole sequence; `read`, by form of the cache its
        `bytes` and the `seconds` to read them from a file that the system holds in memory.

    Raises:
        ConfigError: Texts are not of one length, or too short.
        SeqKVError: What is read back is not what was written, or the model does not run twice alike.
    """
    lengths = {len(ids) for ids in texts.values()}
    if len(lengths) != 1 or min(lengths) < 2:
        raise ConfigError(f"texts have {sorted(lengths)} tokens, must be of one length of at least 2")
    tokens, found, seconds = lengths.pop(), {}, {}
    for name, ids in tqdm(texts.items(), desc="replay", unit="text", disable=not progress, leave=False):
        coded, cache = _run(model, name, ids, repeats, seconds)
        found[name] = {
            "bits": _bits(model, ids, coded),
            "model_stream": 8 * (len(coded["model"]) - MODEL_HEADER_BYTES) / tokens,
        }
    held = [x for layer in cache.layers for x in (layer.keys, layer.values)]
    values, dim = sum(x.shape[1] * x.shape[3] for x in held), held[0].shape[3]
    shapes = {"this model": (values, dim), **QUOTED}
    return {
        "tokens": tokens,
        "texts": found,
        "caches": {name: _cache(*shape, found) for name, shape in shapes.items()},
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "read": _read({"bf16": 16, "TurboQuant at 3 bits": turboquant_bits(dim)}, values * (tokens - 1)),
    }


def _run(model, name: str, ids: torch.Tensor, repeats: int, seconds: dict) -> tuple[dict[str, bytes], DynamicCache]:
    """One text by both coders, and its restored cache; times are appended to `seconds`."""
    coded = {}
    for _ in range(repeats):
        coded["model"] = _timed(seconds, "write, a step a token", pack, ids, model, False)
        back, stepped = _timed(seconds, "restore by steps", restore, coded["model"], model)
        _same(name, ids, back)
    for _ in range(QUICK):
        coded["static"] = _timed(seconds, "write, static", pack, ids)
        _same(name, ids, _timed(seconds, "read, static", unpack, coded["static"]))
        _, cache = _timed(seconds, "restore by prefill", restore, coded["static"], model)
    if stepped.get_seq_length() != cache.get_seq_length():
        raise SeqKVError(f"{name}: steps and prefill restore caches of other lengths: report this")
    return coded, cache


def _timed(seconds: dict[str, list[float]], name: str, call: Callable, *args):
    start = time.perf_counter()
    result = call(*args)
    seconds.setdefault(name, []).append(time.perf_counter() - start)
    return result


def _same(name: str, ids: torch.Tensor, back: torch.Tensor) -> None:
    if not torch.equal(ids.cpu(), back):
        raise SeqKVError(f"{name}: token ids read are not those written: report this")


def _bits(model, ids: torch.Tensor, coded: dict[str, bytes]) -> dict[str, float]:
    """Bits a token of each coder; raw ids are as wide as the vocabulary asks for."""
    raw = (model.config.get_text_config(decoder=True).vocab_size - 1).bit_length()
    wide = ids.cpu().numpy().astype("<u2" if raw <= 16 else "<u4")
    sizes = {"xz": len(lzma.compress(np.ascontiguousarray(wide), **_XZ))}
    sizes |= {name: len(coded[name]) for name in ("static", "model")}
    return {"raw": raw, **{name: 8 * size / len(ids) for name, size in sizes.items()}}


def _cache(values: int, dim: int, found: dict) -> dict:
    bits = values * turboquant_bits(dim)
    coders = next(iter(found.values()))["bits"]
    means = {name: statistics.fmean(text["bits"][name] for text in found.values()) for name in coders}
    ratios = {name: bits / mean for name, mean in means.items()}
    return {"values_per_token": values, "turboquant_bits_per_token": bits, "ratios": ratios}


def _read(forms: dict[str, float], values: int) -> dict:
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "cache"
        for name, bits in forms.items():
            path.write_bytes(bytes(int(values * bits / 8)))
            times = {}
            for _ in range(QUICK):
                _timed(times, name, path.read_bytes)
            found[name] = {"bytes": path.stat().st_size, "seconds": statistics.median(times[name])}
    return found


def table(result: dict) -> str:
    """For people: bits of each text, ratios of each cache, costs."""
    coders = list(next(iter(result["texts"].values()))["bits"])
    lines = [f"{'bits a token':<32}" + "".join(f"{name:>12}" for name in coders) + f"{'no header':>12}"]
    for name, text in result["texts"].items():
        cells = "".join(f"{text['bits'][coder]:>12.2f}" for coder in coders)
        lines.append(f"{name[-31:]:<32}{cells}{text['model_stream']:>12.2f}")
    lines += [
        "",
        f"{'TurboQuant at 3 bits is larger by':<46}{'bits a token':>14}" + "".join(f"{c:>12}" for c in coders),
    ]
    for name, cache in result["caches"].items():
        ratios = "".join(f"{cache['ratios'][coder]:>11,.0f}x" for coder in coders)
        lines.append(f"{name:<46}{cache['turboquant_bits_per_token']:>14,.0f}{ratios}")
    lines += ["(all with this model's bits a token: the ratio is a property of the cache's size)", ""]
    lines.append(f"{result['tokens']} tokens, seconds")
    lines += [f"  {name:<40}{seconds:>14.6f}" for name, seconds in result["seconds"].items()]
    for name, read in result["read"].items():
        lines.append(f"  {'read ' + name + ', not decoded':<40}{read['seconds']:>14.6f}  {read['bytes']:,} bytes")
    return "\n".join(lines)
