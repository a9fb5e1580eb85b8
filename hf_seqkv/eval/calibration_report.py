"""What a calibration holds, for people: spectra, bits of hot pages, predicted rates of the sequence codec."""

from __future__ import annotations

import torch

from ..calibration.artifact import SIDES, SeqKVCalibration
from ..codec.importance import LEVELS
from ..codec.sequence import SequenceCodec
from ..codec.sequence_part import LEVEL_CLASSES
from ..codec.symbol_tables import LIMIT, TOTAL


def predicted_rates(codec: SequenceCodec) -> list[float]:
    """Bits a value of each part, were its symbols distributed as the tables say.

    Levels and refinements are included; of values beyond the tables only that they are.
    """
    shares = codec.tables.frequencies.double() / TOTAL
    entropy = -(shares * shares.clamp_min(1e-12).log2()).sum(1)
    found = []
    for coder in codec.coders:
        part = coder.part
        size, width = part.sizes.shape[1:]
        kind = LEVEL_CLASSES + part.share
        refined = entropy[coder.fine.classes.long()].sum(1)  # bits a token, by level
        chance = shares[kind, LIMIT + 1 : LIMIT + LEVELS + 1]
        bits = entropy[coder.coarse.classes.long()].sum() / size + entropy[kind] + chance @ refined
        found.append((bits / width).item())
    return found


def facts(calibration: SeqKVCalibration, step: int | str) -> dict:
    """JSON types: `layers`, one a layer and side, and what the calibration was made from.

    Args:
        step: Of the sequence codecs; see `SeqKVCalibration.sequence_codec`.
    """
    config, rows = calibration.config, []
    profiles = {name: calibration.sequence_codec(name, step) for name in config.get("sequence", {})}
    rates = {name: predicted_rates(codec) for name, codec in profiles.items()}
    for layer in range(config["model"]["num_hidden_layers"]):
        for i, side in enumerate(SIDES):
            widths = calibration.tensors[f"{layer}.{side}.widths"]
            row = {"layer": layer, "side": side, "hot_bits": widths.float().mean().item()}
            row["hot_widths"] = {int(w): (widths == w).float().mean().item() for w in widths.unique()}
            row["rates"] = {name: found[2 * layer + i] for name, found in rates.items()}
            row["inputs"] = {name: sum(codec.parts[2 * layer + i].inputs) for name, codec in profiles.items()}
            row["left"] = {name: config["sequence"][name]["left"][side][layer] for name in profiles}
            floors = {name: config["sequence"][name].get("floor") for name in profiles}  # None: fitted with one for all
            row["floor"] = {name: found and found[side][layer] for name, found in floors.items()}
            rows.append(row)
    made = {name: config.get(name) for name in ("base_model", "tokens", "window", "seed", "held", "quality")}
    presets = {name: config["sequence"][name].get("presets") for name in profiles}
    return {**made, "presets": presets, "step": step, "layers": rows}


def table(found: dict) -> str:
    """A line a layer and side."""
    profiles = list(found["layers"][0]["rates"])
    titles = "".join(f"{name + ' from':>12}{'left':>7}{'floor':>8}{'bits':>7}" for name in profiles)
    what = "components predicted from, variance left (held out), floor of the metric, predicted bits a value"
    lines = [
        "hot: mean bits a code",
        *(f"{name}: {what}" for name in profiles),
        "",
        f"{'layer':>5} {'side':<6}{'hot':>6}{titles}",
    ]
    for row in found["layers"]:
        line = f"{row['layer']:>5} {row['side']:<6}{row['hot_bits']:>6.2f}"
        for p in profiles:
            floor = "-" if row["floor"][p] is None else f"{row['floor'][p]:.4f}"
            line += f"{row['inputs'][p]:>12}{row['left'][p]:>7.3f}{floor:>8}{row['rates'][p]:>7.3f}"
        lines.append(line)
    for name in profiles:
        mean = sum(row["rates"][name] for row in found["layers"]) / len(found["layers"])
        lines.append(
            f"{name} at step {found['step']}: {mean:.3f} bits a value predicted; presets {found['presets'][name]}"
        )
    return "\n".join(lines)


def plot(calibration: SeqKVCalibration, found: dict, path: str) -> None:
    """Spectra of the first head by layer, and rates by layer; the file's suffix is its format."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    for column, side in enumerate(SIDES):
        layers = [row for row in found["layers"] if row["side"] == side]
        spectra = torch.stack([calibration.tensors[f"{row['layer']}.{side}.std"][0].log2() for row in layers])
        image = axes[0, column].imshow(spectra.T.numpy(), aspect="auto", origin="lower")
        figure.colorbar(image, label="log2 of the deviation")
        axes[0, column].set(title=f"{side}s of hot pages, head 0", xlabel="layer", ylabel="component")
        rates = axes[1, column]
        rates.plot([row["hot_bits"] for row in layers], label="hot codes")
        for name in layers[0]["rates"]:
            rates.plot([row["rates"][name] for row in layers], label=f"sequence, {name}, predicted")
        rates.set(title=f"{side}s", xlabel="layer", ylabel="bits a value", ylim=(0, None))
        rates.legend()
    figure.savefig(path, dpi=150)
