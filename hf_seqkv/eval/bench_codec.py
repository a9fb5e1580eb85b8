"""The sequence codec on pages of a real text, all layers, as a store would use it: its speed, and its rate by layer.

Every setting decodes to what its encoder said before it is timed. A layer's rate stands beside the bound of coding each
vector by itself: at the same mean squared error no code that knows nothing but a vector's energy, however good, takes
less than `log2(E|x|^2 / E|e|^2) / 2` bits a value. Source: Shannon; TurboQuant, arXiv 2504.19874, theorem 3.
"""

from __future__ import annotations

import torch
from tqdm.auto import tqdm

from ..calibration.artifact import SIDES, SeqKVCalibration
from ..codec.sequence import SequenceEncoder
from ..codec.sequence_part import CLASSES, LEVEL_CLASSES, SHIFTS, best_shifts
from ..codec.sequence_quiet import are_active, with_flags
from ..codec.symbol_tables import LIMIT
from ..errors import ConfigError, SeqKVError
from ..integration.tap import embed, run_window
from .bench_timing import interleaved, spread

SINKS = 4  # as in a cache, first tokens are in no page


def measure(
    model,
    ids: torch.Tensor,
    calibration: SeqKVCalibration,
    settings: list[tuple[str, int | str]],
    pages: int,
    seconds: float,
    progress: bool = True,
) -> list[dict]:
    """Time encoding and decoding at settings `(profile, step)`.

    Args:
        ids: Tokens of a text, `[T]`; its whole pages are repeated up to `pages` of them.
        seconds: For each setting.

    Returns:
        JSON types by setting: `profile`, `step`, `bits_per_value` as stored, `ideal_bits_per_value` by the logarithms
        of the coder's probabilities, for `encode` and `decode` seconds (median, quartiles, mean) and
        `values_per_second` by the median, and for each of `parts` `layer`, `side`, `bits` a value and `bound`.

    Raises:
        ConfigError: The text is too short for a page, or the calibration has no such codec.
        SeqKVError: A setting decodes to something else than its encoder said.
    """
    codecs = {setting: calibration.sequence_codec(*setting) for setting in settings}
    size = next(iter(codecs.values())).page_size
    whole = (len(ids) - SINKS) // size
    if not whole:
        raise ConfigError(f"a text of {len(ids)} tokens holds no page: {SINKS + size} are needed; give a longer one")
    layers = range(model.config.get_text_config(decoder=True).num_hidden_layers)
    taps = run_window(model, ids, list(layers), len(ids) // 2, None)
    which = torch.arange(pages) % whole
    sides = [
        [_pages(x, whole, size)[which].contiguous() for x in (tap.plain_keys(), tap.values)] for tap in taps
    ]  # [pages, H, P, D]
    embedded = _pages(embed(model, ids)[None], whole, size)[which, 0]
    positions = SINKS + torch.arange(whole * size).unflatten(0, (whole, size))[which]
    counts = [x.numel() for pair in sides for x in pair]
    values = sum(counts)
    heads = [k.shape[1] for k, _ in sides]
    rows = []
    for (profile, step), codec in tqdm(codecs.items(), desc="codec", unit="setting", disable=not progress, leave=False):
        inputs = embedded if codec.predicts else None
        encoder, expected = _encode(codec, sides, inputs, positions)
        stored, parts = encoder.finish(), _parts(encoder, sides, expected)
        for found, meant in zip(codec.decode(stored, inputs, heads), expected, strict=True):
            if not all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(found, meant, strict=True)):
                raise SeqKVError(f"{profile} at step {step} decodes to something else than it encoded: report this")
        del encoder, expected
        calls = {
            "encode": lambda _, codec=codec, inputs=inputs: _encode(codec, sides, inputs, positions)[0].finish(),
            "decode": lambda _, codec=codec, inputs=inputs, stored=stored: [*codec.decode(stored, inputs, heads)],
        }
        times = {name: spread(found) for name, found in interleaved(calls, 1, seconds).items()}
        rows.append(
            {
                "profile": profile,
                "step": codec.step,
                "bits_per_value": 8 * sum(map(len, stored)) / values,
                "ideal_bits_per_value": sum(x["bits"] * n for x, n in zip(parts, counts, strict=True)) / values,
                "parts": parts,
                **{name: x | {"values_per_second": values / x["median"]} for name, x in times.items()},
            }
        )
    return rows


def _pages(x: torch.Tensor, whole: int, size: int) -> torch.Tensor:
    """`[H, T, D]` to `[whole, H, size, D]`."""
    return x[:, SINKS : SINKS + whole * size].unflatten(1, (whole, size)).transpose(0, 1)


def _encode(codec, sides, embedded, positions) -> tuple[SequenceEncoder, list]:
    """An encoder with all layers, and what they decode to."""
    encoder = codec.encoder(embedded)
    return encoder, [encoder.add(k, v, positions) for k, v in sides]


def _parts(encoder: SequenceEncoder, sides, decoded) -> list[dict]:
    """Code length and bound of each part; shifts, one symbol a page, are left out."""
    bits = with_flags(encoder.codec.tables).bits()
    found = []
    for index, coder in enumerate(encoder.codec.coders):
        layer, side = divmod(index, 2)
        x, y = sides[layer][side].float(), decoded[layer][side]
        levels, loud, quiet, fine = encoder.coded(index)
        shifts, active = best_shifts(loud, coder.kinds[SHIFTS], bits) + SHIFTS, are_active(quiet)
        spent = _length(bits, coder.kinds[shifts], loud)
        spent += _length(bits, coder.quiet_kinds[shifts][active], quiet[active])
        spent += _length(bits, coder.flags + CLASSES, active)
        spent += _length(bits, coder.fine.classes[levels[levels > 0] - 1], fine)
        kinds = torch.full_like(levels, LEVEL_CLASSES + coder.part.share)
        spent += _length(bits, kinds, levels)
        bound = (x.square().mean() / (x - y).square().mean().clamp_min(1e-30)).log2() / 2
        found.append({"layer": layer, "side": SIDES[side], "bits": spent / x.numel(), "bound": max(0.0, bound.item())})
    return found


def _length(bits: torch.Tensor, classes: torch.Tensor, symbols: torch.Tensor) -> float:
    """Bits of symbols by tables; those beyond count as the last in the tables."""
    columns = symbols.long().clamp(-LIMIT, LIMIT) + LIMIT
    return bits[classes.long().expand_as(columns), columns].sum(dtype=torch.float64).item()


def table(result: dict) -> str:
    """For people: a line a setting, then for each of them a line a layer."""
    titles = f"{'profile':<10}{'step':>6}{'bits a value':>14}{'of the ideal':>14}"
    lines = [f"{titles}{'encode, M values/s':>22}{'decode, M values/s':>22}"]
    for row in result["rows"]:
        speeds = (row[name]["values_per_second"] / 1e6 for name in ("encode", "decode"))
        rates = "".join(f"{speed:>22.1f}" for speed in speeds)
        ratio = row["bits_per_value"] / row["ideal_bits_per_value"]
        lines.append(f"{row['profile']:<10}{row['step']:>6}{row['bits_per_value']:>14.3f}{'x':>9}{ratio:5.3f}{rates}")
    for row in result["rows"]:
        lines += [
            "",
            f"{row['profile']}, step {row['step']}: bits a value, and the bound of vectors coded by themselves",
        ]
        lines.append(f"{'layer':>5}" + "".join(f"{side:>12}{'bound':>9}" for side in SIDES))
        for pair in zip(row["parts"][::2], row["parts"][1::2], strict=True):
            cells = "".join(f"{part['bits']:>12.3f}{part['bound']:>9.3f}" for part in pair)
            lines.append(f"{pair[0]['layer']:>5}{cells}")
        means = [
            [sum(p[x] for p in row["parts"][i::2]) / len(row["parts"][i::2]) for x in ("bits", "bound")] for i in (0, 1)
        ]
        lines.append(f"{'mean':>5}" + "".join(f"{bits:>12.3f}{bound:>9.3f}" for bits, bound in means))
    return "\n".join(lines)
