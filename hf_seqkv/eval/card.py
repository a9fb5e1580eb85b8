"""The model card of a calibration: a template filled from its `seqkv_config.json`, no number typed by hand."""

from __future__ import annotations

import importlib.resources
import json
import string
from typing import Any


def template() -> str:
    return (importlib.resources.files(__package__) / "card.md").read_text(encoding="utf-8")


def render_card(config: dict[str, Any]) -> str:
    """Markdown with Hub metadata, from a calibration's config."""
    model = config["model"]
    base = config.get("base_model")
    values = {
        "base_model_metadata": f"base_model: {base}\n" if base and "/" in base and not base.startswith("/") else "",
        "title": base if base and not base.startswith("/") else model["model_type"],
        "key_bits": config["key_bits"],
        "value_bits": config["value_bits"],
        "scale_bits": config["scale_bits"],
        "held": f"{config['held']:.1%}",
        "sequence": _sequence(config.get("sequence", {})),
        "layers": model["num_hidden_layers"],
        "heads": model["num_key_value_heads"],
        "head_dim": model["head_dim"],
        "rope": json.dumps(model["rope"], sort_keys=True),
        "texts": ", ".join(config.get("texts", [])) or "not recorded",
        "texts_sha256": config["texts_sha256"],
        "tokens": config["tokens"],
        "window": config["window"],
        "seed": config["seed"],
        "weights": config["weights"],
        "format_version": config["format_version"],
        "quality": _quality_table(config.get("quality")),
    }
    return string.Template(template()).substitute(values)


def _sequence(profiles: dict[str, dict]) -> str:
    if not profiles:
        return "It has no sequence codec."
    presets = [f"{name} {made['presets']}" for name, made in profiles.items() if "presets" in made]
    steps = f" (steps of its presets: {'; '.join(presets)})" if presets else ""
    return f"Its sequence codec stores pages in profiles {' and '.join(profiles)}{steps}."


def _quality_table(quality: dict[str, dict] | None) -> str:
    if not quality:
        return "Not measured."
    head = "| method | bits a value | perplexity / dense | KL, nats a token | same top-1 |\n|---|---|---|---|---|\n"
    return head + "\n".join(
        f"| {name} | {row['bits_per_value']:.3f} | {row['ratio']:.4f} ± {row['ratio_error']:.4f} | {row['kl']:.5f} | "
        f"{row['top1']:.1%} |"
        for name, row in quality.items()
    )
