"""`seqkv calibrate MODEL`: fit rotations and codebooks, measure them on held-back text, write (and push) them."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ..config import DATA_FREE
from ..errors import ConfigError, SeqKVError

HELD_BACK = 1 / 8  # of every text: measured on, never fitted on


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "calibrate",
        help="fit a calibration for a model",
        description="Fit block-diagonal rotations and codebooks for a causal LM, in minutes on a CPU.",
    )
    parser.add_argument("model", metavar="MODEL", help="directory or Hub repository, or 'demo' for the demo's model")
    parser.add_argument("--gguf-file", help="GGUF file in MODEL, for a model in that format")
    texts = parser.add_mutually_exclusive_group(required=True)
    texts.add_argument("--texts", nargs="+", type=Path, metavar="FILE", help="UTF-8 text files")
    texts.add_argument("--dataset", metavar="ID", help="dataset on the Hub with a 'text' column (needs 'datasets')")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the artefact is written")
    parser.add_argument("--push-to-hub", metavar="REPO", help="repository to upload the artefact to")
    for side in ("key", "value"):
        name, default = f"{side}_bits", DATA_FREE[f"{side}_bits"]
        help_text = f"mean bits of a {side}'s codes (default: {default})"
        parser.add_argument(f"--{side}-bits", dest=name, type=int, default=default, choices=range(2, 6), help=help_text)
    parser.add_argument("--tokens", type=int, default=16_384, help="tokens to run (default: 16384)")
    parser.add_argument("--seed", type=int, default=0, help="which windows are drawn (default: 0)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--no-evaluate", action="store_true", help="skip the measurement on held-back text")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON line on stdout")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..eval.card import render_card
    from ..integration.collect import calibrate

    texts = _read_files(args.texts) if args.texts else _read_dataset(args.dataset)
    fitted, held = _split(texts)
    model, tokenizer = _load(args)
    bits = {"key_bits": args.key_bits, "value_bits": args.value_bits}
    calibration = calibrate(model, tokenizer, fitted, **bits, tokens=args.tokens, seed=args.seed)
    if not args.no_evaluate:
        calibration.config["quality"] = _evaluate(model, tokenizer, held, calibration, bits)
    calibration.config["texts"] = [path.name for path in args.texts] if args.texts else [args.dataset]
    calibration.card = render_card(calibration.config)
    directory = calibration.save_pretrained(args.out)
    print(f"wrote {directory}", file=sys.stderr)
    for name, row in calibration.config.get("quality", {}).items():
        print(
            f"  {name:34s} perplexity x{row['ratio']:.4f} ± {row['ratio_error']:.4f}, KL {row['kl']:.5f}",
            file=sys.stderr,
        )
    if args.push_to_hub:
        print(f"pushed {calibration.push_to_hub(args.push_to_hub)}", file=sys.stderr)
    if args.json:
        print(json.dumps({"out": str(directory), **calibration.config}, sort_keys=True))
    return 0


def _read_files(paths: list[Path]) -> list[str]:
    try:
        return [path.read_text(encoding="utf-8") for path in paths]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--texts: {error}; give readable UTF-8 text files") from error


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


def _load(args: argparse.Namespace):
    import torch

    dtype = getattr(torch, args.dtype)
    if args.model == "demo":
        from ..eval.smollm2 import load

        return load(dtype)[:2]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"gguf_file": args.gguf_file} if args.gguf_file else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, **options)
        return model.eval(), AutoTokenizer.from_pretrained(args.model, **options)
    except OSError as error:
        raise SeqKVError(f"cannot load {args.model}: {error}") from error


def _evaluate(model, tokenizer, text: str, calibration, bits: dict, context: int = 1024, scored: int = 512) -> dict:
    """Quality on held-back text of the calibration and of the data-free methods at the same rate."""
    import torch
    from transformers import DynamicCache

    from ..config import SeqKVConfig
    from ..eval.perplexity import compare, teacher_forced_logits
    from ..integration.cache import SeqKVCache

    ids = tokenizer(text[: 8 * (context + scored)], return_tensors="pt", verbose=False)["input_ids"]
    ids = ids[:, : context + scored].to(model.device)
    if ids.shape[1] < context + 64:
        raise ConfigError(
            f"the held-back text holds {ids.shape[1]} tokens, measuring needs {context + 64}; give more text, or "
            "--no-evaluate"
        )
    dense = teacher_forced_logits(model, ids, DynamicCache(config=model.config), context, "dense")
    methods = {
        "calibrated": {"calibration": calibration},
        "data-free": bits,
        "TurboQuant as published": SeqKVConfig.published_turboquant(-(-sum(bits.values()) // 2)).to_dict(),
    }
    rows = {}
    for name, options in methods.items():
        cache = SeqKVCache(config=model.config, **options)
        coded = teacher_forced_logits(model, ids, cache, context, name)
        quality = compare(dense, coded, ids[0, context:].to(torch.long))
        rows[name] = {"bits_per_value": cache.bits_per_value(), **quality.to_dict()}
    return rows
