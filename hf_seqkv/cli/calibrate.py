"""`seqkv calibrate MODEL`: fit hot pages and the sequence codec, measure them on held-back text, write (and push)."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ..config import DATA_FREE
from ..errors import ConfigError, SeqKVError
from .options import add_count, add_model_arguments, load_model, read_texts

HELD_BACK = 1 / 8  # of every text: measured on, never fitted on
WINDOW = 1536  # tokens measured on


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "calibrate",
        help="fit a calibration for a model",
        description="Fit rotations, codebooks and the sequence codec for a causal LM, in minutes on a CPU.",
    )
    parser.add_argument("model", metavar="MODEL", help="directory or Hub repository, or 'demo' for the demo's model")
    add_model_arguments(parser)
    texts = parser.add_mutually_exclusive_group(required=True)
    texts.add_argument("--texts", nargs="+", type=Path, metavar="FILE", help="UTF-8 text files")
    texts.add_argument("--dataset", metavar="ID", help="dataset on the Hub with a 'text' column (needs 'datasets')")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the artefact is written")
    parser.add_argument("--push-to-hub", metavar="REPO", help="repository to upload the artefact to")
    for side in ("key", "value"):
        name, default = f"{side}_bits", DATA_FREE[f"{side}_bits"]
        help_text = f"mean bits of a {side}'s codes, 2 to 5 in quarters (default: {default})"
        parser.add_argument(f"--{side}-bits", dest=name, type=float, default=default, metavar="B", help=help_text)
    held = "share of hot tokens held dense, those on which most depends (default: 0.01)"
    parser.add_argument("--held", type=float, default=0.01, metavar="SHARE", help=held)
    no_sequence = "neither sequence codec nor held tokens: no gradients, a third of the time"
    parser.add_argument("--no-sequence", dest="sequence", action="store_false", help=no_sequence)
    add_count(parser, "--tokens", 32_768, "tokens to run")
    parser.add_argument("--seed", type=int, default=0, help="which windows are drawn (default: 0)")
    parser.add_argument("--no-evaluate", action="store_true", help="skip the measurement on held-back text")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON line on stdout")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..eval.card import render_card
    from ..integration.collect import calibrate

    texts = list(read_texts(args.texts).values()) if args.texts else _read_dataset(args.dataset)
    fitted, held = _split(texts)
    model, tokenizer, _ = load_model(args.model, args.gguf_file, args.dtype)
    bits = {"key_bits": args.key_bits, "value_bits": args.value_bits}
    how = {"sequence": args.sequence, "held": args.held, "tokens": args.tokens, "seed": args.seed}
    calibration = calibrate(model, tokenizer, fitted, **bits, **how)
    if not args.no_evaluate:
        calibration.config["quality"] = _evaluate(model, tokenizer, held, calibration)
    calibration.config["texts"] = [path.name for path in args.texts] if args.texts else [args.dataset]
    calibration.card = render_card(calibration.config)
    directory = calibration.save_pretrained(args.out)
    print(f"wrote {directory}", file=sys.stderr)
    for name, row in calibration.config.get("quality", {}).items():
        forecast = f", {row['kl'] / row['forecast']:.1f} times the metric's forecast" if "forecast" in row else ""
        print(
            f"  {name:34s} {row['bits_per_value']:.3f} bits a value, perplexity x{row['ratio']:.4f} ± "
            f"{row['ratio_error']:.4f}, KL {row['kl']:.5f}{forecast}",
            file=sys.stderr,
        )
    if args.push_to_hub:
        print(f"pushed {calibration.push_to_hub(args.push_to_hub)}", file=sys.stderr)
    if args.json:
        print(json.dumps({"out": str(directory), **calibration.config}, sort_keys=True))
    return 0


def _read_dataset(name: str, characters: int = 2_000_000) -> list[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise SeqKVError("--dataset needs the datasets library: pip install datasets, or use --texts FILES") from error
    texts, size = [], 0
    for row in load_dataset(name, split="train", streaming=True):
        if "text" not in row:
            raise ConfigError(f"--dataset {name} has columns {', '.join(row)}, none of them 'text'; use --texts FILES")
        texts.append(row["text"])
        size += len(row["text"])
        if size >= characters:
            break
    return ["\n\n".join(texts)]


def _split(texts: list[str]) -> tuple[list[str], str]:
    """What is fitted on, and the end of every text, held back."""
    cuts = [int(len(text) * (1 - HELD_BACK)) for text in texts]
    fitted = [text[:cut] for text, cut in zip(texts, cuts, strict=True)]
    return fitted, "\n\n".join(text[cut:] for text, cut in zip(texts, cuts, strict=True))


def _evaluate(model, tokenizer, text: str, calibration) -> dict:
    """Quality on held-back text of what was fitted and of data-free methods; names the sequence codec's presets.

    How far its divergence is above the `forecast` of the metric of gradients, which leaves out refined tokens and how
    errors of all layers meet, tells whether that has seen enough tokens: 16 to 25 times with 32,768 of SmolLM2's, up to
    33 without prediction, and 20 to 29 times with 8,192 of Gemma 3 270M's.
    """
    from ..eval import quality
    from ..eval.presets import choose_steps

    methods = {
        "hot pages": quality.seqkv(calibration=calibration),
        "TurboQuant 4 bits": quality.METHODS["turboquant-4"],
    }
    sequence = calibration.config.get("sequence", {})
    names = {(profile, step): f"sequence, {profile}, step {step}" for profile in sequence for step in (-6, 0, 6)}
    methods |= {name: quality.sequence(calibration, *key) for key, name in names.items()}
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or WINDOW
    plan = quality.Plan(windows=1, window=min(WINDOW, limit))
    rows = quality.measure(model, tokenizer, {"held-back text": text}, methods, plan)["all"]
    for (profile, step), name in names.items():
        rows[name]["forecast"] = sequence[profile]["forecast"][str(step)]
    for profile, made in sequence.items():
        made["presets"] = choose_steps({step: rows[name]["kl"] for (of, step), name in names.items() if of == profile})
    return rows
