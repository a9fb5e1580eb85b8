"""`seqkv store`: look into a prefix store, check it, shrink it."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time

from ..errors import ConfigError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "store",
        help="list, count, check or shrink a prefix store",
        description="Look into a prefix store without running a model.",
    )
    verbs = parser.add_subparsers(title="what to do", metavar="WHAT", required=True)
    for name, made, said in (
        ("ls", _list, "every entry that the index knows"),
        ("stat", _stat, "totals by scope and form, and measured rates"),
        ("prune", _prune, "evict what is worth least; remove what killed writers left behind"),
        ("verify", _verify, "read every entry; drop the damaged, index the unknown"),
    ):
        verb = verbs.add_parser(name, help=said, description=f"{said[0].upper()}{said[1:]}.")
        verb.add_argument("url", metavar="URL", help="directory, or a URL that fsspec opens")
        if name == "prune":
            verb.add_argument("--max-bytes", required=True, type=size, metavar="SIZE", help="such as 2GB or 500MiB")
        verb.add_argument("--json", action="store_true", help="print it as JSON, the last line of stdout")
        verb.set_defaults(run=run, make=made)


def size(text: str) -> int:
    """Bytes, as argparse's `type`: a number and a unit, such as `2GB`, `1.5 GiB` or `4096`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    if not found or found[2] not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 2GB, 500MiB or 4096")
    return int(float(found[1]) * _UNITS[found[2]])


def run(args: argparse.Namespace) -> int:
    """Do it, print a table on stderr, and JSON if asked.

    Raises:
        ConfigError: There is no store there.
    """
    from ..store.prefix_store import PrefixStore
    from ..store.shelf import local_path

    root = local_path(args.url)
    if root is not None and not root.is_dir():
        raise ConfigError(f"store {args.url!r}: there is no such directory; give the one that sessions were given")
    with PrefixStore(args.url) as store:
        found, table = args.make(store, args)
    print(table, file=sys.stderr)
    if args.json:
        print(json.dumps({"command": args.command, **found}))
    return 0


def _list(store, args) -> tuple[dict, str]:
    rows = {row.key: row for row in store.entries()}
    entries = sorted(({"depth": _depth(rows, key), **_plain(row)} for key, row in rows.items()), key=_order)
    lines = [f"{'key':<14}{'depth':>6} {'form':<10}{'tokens':>7}{'bytes':>10}{'bits/token':>12}{'hits':>6}  used"]
    for entry in entries:
        depth = "-" if entry["depth"] is None else entry["depth"]
        bits = "-" if entry["bits"] is None else f"{entry['bits']:.2f}"
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry["used"]))
        line = f"{entry['key'][:12]:<14}{depth:>6} {entry['form']:<10}{entry['tokens']:>7}{_size(entry['bytes']):>10}"
        lines.append(f"{line}{bits:>12}{entry['hits']:>6}  {used}")
    return {"entries": entries}, "\n".join([*lines, f"{len(entries)} entries"])


def _depth(rows: dict, key: bytes) -> int | None:
    """Pages before this one; None where one of them is not there."""
    depth = 0
    while parent := rows[key].parent:
        if parent not in rows:
            return None
        key, depth = parent, depth + 1
    return depth


def _plain(row) -> dict:
    return {name: value.hex() if isinstance(value, bytes) else value for name, value in row._asdict().items()}


def _order(entry: dict) -> tuple:
    return entry["scope"], entry["depth"] is None, entry["depth"] or 0, entry["key"]


def _stat(store, args) -> tuple[dict, str]:
    found = store.stat()
    lines = [f"{'scope':<14}{'form':<10}{'entries':>8}{'tokens':>10}{'bytes':>10}{'hits':>8}"]
    for group in [*found["groups"], {"scope": "all", "form": "", **found}]:
        line = f"{group['scope'][:12]:<14}{group['form']:<10}{group['entries']:>8}{group['tokens']:>10}"
        lines.append(f"{line}{_size(group['bytes']):>10}{group['hits']:>8}")
    rates = found["rates"]
    lines += [f"load, {form}: {seconds * 1e3:.3g} ms a page" for form, seconds in sorted(rates["load"].items())]
    if rates["prefill"]:
        token, slope = rates["prefill"]
        lines.append(f"prefill: {token * 1e3:.3g} ms a token, and {slope * 1e6:.3g} ms more for 1,000 tokens before it")
    return found, "\n".join(lines)


def _prune(store, args) -> tuple[dict, str]:
    found = store.prune(args.max_bytes)
    said = f"removed {found['removed']} entries, {_size(found['freed'])}, and {found['temporaries']} temporary files; "
    return found, f"{said}{found['entries']} entries, {_size(found['bytes'])}, stay"


def _verify(store, args) -> tuple[dict, str]:
    found = store.verify()
    said = f"{found['entries']} sound entries, {_size(found['bytes'])}, {found['adopted']} of them new to the index"
    rest = ", ".join(f"{found[name]} {name}" for name in ("damaged", "missing", "unreadable", "newer"))
    return found, f"{said}\n{rest}; {found['temporaries']} temporary files removed"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
