"""Every causal LM that transformers has, tiny and random, with this cache and with transformers' own.

    python tests/architectures.py [--table tests/ARCHITECTURES.md] [--only a,b] [--json FILE]

Each is generated from in several modes with lossless pages, which must give `DynamicCache`'s tokens (or, where they
part, the same scores), and read through pages of 8 bits, whose logits must stay close. Whether attention runs on codes
is counted, not assumed. What fails with `DynamicCache` too is not applicable, with its error; it is no pass.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from architecture_check import ERROR, MODES, Report, check
from architecture_models import TYPES
from tqdm import tqdm

COMMAND = "python tests/architectures.py --table tests/ARCHITECTURES.md"
COLUMNS = ("type", "layers coded", "attention", "modes", "8 bits", "notes")
MEANINGS = {
    "fused": "every step attends to codes",
    "partly fused": "every step attends to codes, and some of its layers rebuild dense tensors",
    "in parts": "every step rebuilds dense tensors from codes, 1,024 tokens at a time: correct, not faster",
    "rebuilt": "every step rebuilds the dense tensors of a layer from codes: correct, not faster",
    "n/a": "nothing to code, or transformers itself cannot generate",
    "not built": "no tiny model of it can be made",
    "unknown": "no step was counted",
}
LONGEST = 240  # characters of a note


def _quiet() -> None:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)


def sweep(names: Iterable[str]) -> Iterator[Report]:
    """Reports of types, in a process of their own: one that dies is a finding, and the next type gets a new one."""
    names, context = list(names), multiprocessing.get_context("spawn")
    while names:
        with ProcessPoolExecutor(1, mp_context=context, initializer=_quiet) as pool:
            try:
                while names:
                    yield pool.submit(check, names[0]).result()
                    del names[0]
            except BrokenProcessPool:
                yield Report(names.pop(0), crash="its process died")


def _shortened(text: str) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def row(report: Report) -> list[str]:
    """Cells of one type."""
    tried = [result for result in report.modes.values() if not result.startswith("n/a")]
    passed = sum(not result.startswith("failed") for result in tried)
    notes = [f"**{failure}**" for failure in report.failures()]
    notes += [report.not_built, report.unsupported, report.refused]
    notes += [f"{count} {kind} uncompressed" for kind, count in report.uncompressed.items()]
    notes += report.reasons
    notes += [f"{mode} {result}" for mode, result in report.modes.items() if result.startswith("n/a")]
    layers = report.coded + sum(report.uncompressed.values())
    return [
        report.name,
        f"{report.coded} of {layers}" if layers else "",
        report.attention,
        f"{passed} of {len(tried)}" if tried else "",
        "n/a" if report.refused else "" if report.error is None else f"{report.error:.4f}",
        "; ".join(_shortened(note) for note in notes if note),
    ]


def write(reports: list[Report]) -> str:
    """The table as Markdown."""
    kinds = Counter(report.attention for report in reports)
    tried = [report for report in reports if report.modes]
    right = [report for report in tried if not report.failures()]
    whole = sum(not report.uncompressed for report in right)
    lossless = sum(bool(report.refused) for report in right)
    system = f"transformers {transformers.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    lines = [
        "# Architectures",
        "",
        "Every model type of transformers' causal-LM mapping, as a tiny random model. Made by",
        f"`{COMMAND}` with",
        f"{system}, on a CPU.",
        "",
        f"Of {len(reports)} types {len(tried)} could be tried, and {len(right)} of these pass in every mode that",
        f"`DynamicCache` passes: {whole} with all their layers coded, {len(right) - whole} with a part of them;",
        f"{lossless} with lossless pages only.",
        "",
        "| attention | types | |",
        "|---|---|---|",
        *(f"| {kind} | {kinds[kind]} | {meaning} |" for kind, meaning in MEANINGS.items() if kinds[kind]),
        "",
        f"Modes: {', '.join(MODES)}; with lossless pages of 8 tokens, against the tokens",
        "of `DynamicCache`. A mode in which `DynamicCache` fails is not counted; the note gives its error. 8 bits: the",
        f"error of teacher-forced logits relative to `DynamicCache`'s, below {ERROR}. Layers coded: of those that keep",
        "anything.",
        "",
        *("| " + " | ".join(cells) + " |" for cells in (COLUMNS, ["---"] * len(COLUMNS), *map(row, reports))),
    ]
    return "\n".join(lines) + "\n"


def read(path: Path) -> tuple[str, dict[str, dict[str, str]]]:
    """Version of transformers that a table was made with, and its rows: type to column to cell."""
    text = path.read_text(encoding="utf-8")
    version = text.split("\ntransformers ")[1].split(",")[0]
    lines = text.split("| " + " | ".join(COLUMNS))[1].splitlines()[2:]
    rows = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in lines]
    return version, {cells[0]: dict(zip(COLUMNS, cells, strict=True)) for cells in rows}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", type=Path, help="write a Markdown table of everything")
    parser.add_argument("--only", type=lambda text: text.split(","), help="types, separated by commas")
    parser.add_argument("--json", type=Path, help="write everything that was found")
    options = parser.parse_args(arguments)
    names, reports = options.only or list(TYPES), []
    unknown = sorted(set(names) - set(TYPES))
    if unknown:
        parser.error(f"transformers {transformers.__version__} has no {', '.join(unknown)} in its causal-LM mapping")
    if options.table and options.only:
        parser.error("--table is of all types: leave --only out")
    with tqdm(total=len(names)) as bar:
        for report in sweep(names):
            reports.append(report)
            bar.update()
            bar.set_postfix_str(report.name)
            for failure in report.failures():
                bar.write(f"{report.name}: {failure}", file=sys.stderr)
    if options.table:
        options.table.write_text(write(reports), encoding="utf-8")
    if options.json:
        found = [asdict(report) | {"attention": report.attention} for report in reports]
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if not options.table and not options.json:
        print(write(reports))
    return int(any(report.failures() for report in reports))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    sys.exit(main(sys.argv[1:]))
