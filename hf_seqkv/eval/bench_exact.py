"""The exact codec on the pages of a cache that has run a real text: its rate, its speed, and what each predictor gains.

Tables are fitted to another text than the one that is measured. Every page is decoded and compared before anything is
timed or counted.
"""

from __future__ import annotations

from typing import Any

import torch
from tqdm.auto import tqdm

from ..calibration.artifact import SIDES, SeqKVCalibration
from ..calibration.exact_fit import Predictors, fit_exact
from ..codec.exact import ExactCodec
from ..codec.page import QuantizedPageCodec
from ..codec.surroundings import Surroundings
from ..errors import ConfigError, SeqKVError
from ..integration.cache import SeqKVCache
from ..integration.compat import CACHE_NAME
from ..integration.tap import embedding_rows
from .bench_timing import interleaved, spread

ALONE, EVERYTHING = "codebooks alone", "everything"
_NONE = dict.fromkeys(("keys", "embedding", "heads", "components"), False)
GAINS = {
    "layers below": Predictors(**_NONE),
    "+ own keys": Predictors(**_NONE | {"keys": True}),
    "+ embedding": Predictors(heads=False, components=False),
    "+ earlier heads": Predictors(components=False),
    "not adapting": Predictors(adapts=False),
}


def measure(
    model,
    ids: list[torch.Tensor],
    windows: torch.Tensor,
    calibration: SeqKVCalibration,
    options: dict[str, Any],
    gains: bool,
    seconds: float,
    progress: bool = True,
) -> dict:
    """Code the pages of texts.

    Args:
        ids: Tokens of each text, `[T]`.
        windows: Tokens of other ones that tables are fitted to, `[W, T]`.
        calibration: With a sequence codec that predicts: the embedding's weights are taken from it.
        options: Fields of `SeqKVConfig`.
        gains: Whether to fit tables without some of the predictors, too.
        seconds: Of timing.

    Returns:
        JSON types: `hot` bits a value; for each of `rows` `name`, `bits`, `ratio`, and `layers`, the bits of each
        layer's `key` and `value`; of the row of everything also `encode` and `decode` seconds and `values_per_second`.

    Raises:
        ConfigError: A text is too short for a page, or the cache has no quantised pages; or the calibration does not
            predict.
        SeqKVError: A page does not come back.
    """
    runs = [_run(model, x, options) for x in ids]
    codecs = runs[0][0]
    parts = calibration.sequence_codec("full").parts
    _, fitted, beside = zip(*(_run(model, x, options) for x in windows), strict=True)
    fitted, beside = [torch.cat(x) for x in zip(*fitted, strict=True)], Surroundings.joined(beside)
    variants = {ALONE: None, **(GAINS if gains else {}), EVERYTHING: Predictors()}
    values = sum(len(pages[0]) * sum(_values(codec) for codec in codecs) for _, pages, _ in runs)
    hot = sum(8 * x.numel() for _, pages, _ in runs for x in pages) / values
    found = []
    for name, using in tqdm(variants.items(), desc="exact", unit="variant", disable=not progress, leave=False):
        codec = ExactCodec(codecs)
        if using is not None:
            tables = fit_exact(codecs, fitted, beside, parts, using, progress)
            codec = ExactCodec(codecs, parts, tables)
        stored = [codec.encode(pages, around) for _, pages, around in runs]
        for data, (_, pages, around) in zip(stored, runs, strict=True):
            if not all(map(torch.equal, codec.decode(data, around), pages)):
                raise SeqKVError(f"{name}: pages do not come back as they were; report this")
        bits = 8 * sum(len(x) for data in stored for x in data) / values
        taken = sum(codec.lengths(pages, around) for _, pages, around in runs)
        counts = [len(pages[0]) for _, pages, _ in runs]
        layers = [
            {
                side: float(x / sum(counts) / (each.heads * each.page_size * dim))
                for side, x, dim in zip(SIDES, pair, (each.key_dim, each.value_dim), strict=True)
            }
            for each, pair in zip(codecs, taken, strict=True)
        ]
        found.append({"name": name, "bits": bits, "ratio": bits / hot, "layers": layers})
    _, pages, around = runs[0]
    calls = {
        "encode": lambda _: codec.encode(pages, around),
        "decode": lambda _: codec.decode(stored[0], around),
    }
    timed = len(pages[0]) * sum(_values(codec) for codec in codecs)
    times = {name: spread(x) for name, x in interleaved(calls, 1, seconds).items()}
    found[-1] |= {name: x | {"values_per_second": timed / x["median"]} for name, x in times.items()}
    return {"hot": hot, "pages": sum(len(pages[0]) for _, pages, _ in runs), "rows": found}


def _values(codec: QuantizedPageCodec) -> int:
    return codec.heads * codec.page_size * (codec.key_dim + codec.value_dim)


def _run(model, ids: torch.Tensor, options: dict[str, Any]) -> tuple[list, list[torch.Tensor], Surroundings]:
    """Codecs, pages and surroundings of a cache that has run a text."""
    cache = SeqKVCache(config=model.config, **options)
    with torch.no_grad():
        model(ids[None].to(model.device), **{CACHE_NAME: cache}, logits_to_keep=1)
    layers = cache._coded()
    codecs = [layer.codec for layer in layers]
    count = min(layer.counts[0] for layer in layers)
    if not count or not all(isinstance(codec, QuantizedPageCodec) for codec in codecs):
        raise ConfigError(f"a text of {len(ids)} tokens with {options} makes no page of codes; give a longer text")
    if any(layer.dropped for layer in layers):
        raise ConfigError(f"sliding layers forget pages of a text of {len(ids)} tokens; give a shorter one")
    size, sinks = codecs[0].page_size, cache.seqkv_config.n_sink
    tables = [cache.table(layer.index) for layer in layers]
    if None in tables:
        raise ConfigError("the bench needs keys that are centred; leave center_keys on")
    kept = ids[sinks : sinks + count * size].unflatten(0, (count, size))
    around = Surroundings(
        embedding_rows(model, kept),
        [table.starts[0, :count].cpu() for table in tables],
        [table.relative.cpu() for table in tables],
        [table.interleaved for table in tables],
        [layer.mean[0].cpu().expand(count, -1, -1) for layer in layers],
    )
    return codecs, [layer.pages[0, :count].cpu() for layer in layers], around


def table(result: dict) -> str:
    """For people: a line a variant, then a line a layer of the last of them."""
    lines = [f"hot pages: {result['hot']:.3f} bits a value", f"{'':<22}{'bits a value':>14}{'of hot':>9}{'gain':>9}"]
    before = result["hot"]
    for row in result["rows"]:
        gain = f"{before - row['bits']:>9.3f}" if row["name"] != "not adapting" else f"{'':>9}"
        before = row["bits"] if row["name"] != "not adapting" else before
        lines.append(f"{row['name']:<22}{row['bits']:>14.3f}{row['ratio']:>9.3f}{gain}")
    last = result["rows"][-1]
    speeds = (f"{name} {last[name]['values_per_second'] / 1e6:.1f}" for name in ("encode", "decode"))
    lines += [", ".join(speeds) + " M values/s", "", f"{'layer':>5}" + "".join(f"{side:>9}" for side in SIDES)]
    lines += [f"{i:>5}" + "".join(f"{row[side]:>9.3f}" for side in SIDES) for i, row in enumerate(last["layers"])]
    return "\n".join(lines)
