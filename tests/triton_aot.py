"""Compile the Triton kernels for GPUs that are not here, and read what the compiler made of them.

    python tests/triton_aot.py [--stale | --only VARIANT [TARGET...]] [--update | --json]

It prints a table of what the tests compile; `--update` records it as what is allowed from then on, with a fingerprint
of what it was made from. A test fails if anything else is recorded of any variant: change a kernel, and run `--stale
--update`, which compiles all that it changed.

Needs no GPU: triton ships ptxas, nvdisasm and LLVM's AMDGPU backend. Instructions a code are those of the hot loop (the
smallest loop with matrix instructions: pages that every query sees whole) times lanes, over the codes of a page's keys
and values, everything included.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

BUDGETS = Path(__file__).with_name("triton_budgets.json")
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
# Instructions a code that a hot loop may take at all, whatever is recorded.
MOST = {"4x4 d128": 3.3, "2x2 d128": 3.0, "4x4 d64": 5.0, "3.5x2.5 d128": 3.3, "3.5x2.5 d64": 5.0}
REQUIRED = {(name, target): most for name, most in MOST.items() for target in ("sm_80", "sm_90")}
_SOURCES = ("variants", "_constants", "compile_kernel")  # what of this file decides what is compiled
# In a loop nothing may be spilt. Outside, once a program, these bytes may, written and read: with as many registers as
# that takes fewer programs would fit a multiprocessor.
SPILT = {
    "4x4 d128, mask": {"sm_90": 24, "sm_120": 48},
    "encode_kernel, mixed widths": {"sm_90": 8, "sm_100": 8},
}

_TYPES = {
    "fp16": "relative key_levels value_levels",
    "bf16": "query sink_k sink_v recent_k recent_v side_k side_v out k v",
    "i32": "pages ints key_tables key_widths key_offsets value_tables value_widths value_offsets widths offsets",
    "i64": "side_slots",
    "fp32": "prepared starts scores sums key_middle value_middle matrix norm key_mean center_mean mask value_mean "
    "sink_logits key_center key_matrix key_weight key_edges value_matrix value_weight value_edges levels",
}
_POINTERS = {name: kind for kind, names in _TYPES.items() for name in names.split()}
# Of the kernels of pages, which see bytes and levels as they are.
_PAGES = {"pages": "u8", "key_levels": "fp32", "value_levels": "fp32", "out": "fp32", "relative": "fp32"}
_FLOATS = {"softcap", "scale"}
# Numbers that are multiples of 16 in any real cache, as the launcher finds out.
_ALIGNED = {"batch_words", "page_words", "key_codes", "key_scales", "value_codes", "value_scales",
            "starts_n", "qb", "qh", "qt", "page_bytes", "kb", "kn", "kh", "kt", "vb", "vn", "vh", "vt"}  # fmt: skip


def variants() -> dict[str, tuple[str, dict]]:
    """Name -> (kernel, constants that differ from the usual ones)."""
    found = {f"{k}x{v} d{d}": ("partials", {"KEYS": [(k, d)], "VALUES": [(v, d)], "D": d})
             for k, v, d in [(4, 4, 128), (2, 2, 128), (3, 3, 128), (5, 4, 128), (4, 4, 64), (4, 4, 80), (4, 4, 96),
                             (4, 4, 256)]}  # fmt: skip
    for d in (64, 128, 256):
        runs = {"KEYS": [(5, d)], "VALUES": [(4, d)], "D": d}
        found[f"5x4 d{d}, constant part"] = ("partials", {**runs, "CENTER": True})
    found["4x4 d64, 8-bit scales"] = ("partials", {"KEYS": [(4, 64)], "VALUES": [(4, 64)], "D": 64, "NARROW": True})
    runs = {"KEYS": [(5, 64), (4, 64)], "VALUES": [(4, 64), (3, 64)], "free": True}
    found["4.5x3.5 d128, constant part"] = ("partials", {**runs, "CENTER": True})
    found["4x4 d128, mask"] = ("partials", {"KEYS": [(4, 128)], "VALUES": [(4, 128)], "MASK": 2})
    found["4x4 d256, softcap"] = ("partials", {"KEYS": [(4, 256)], "VALUES": [(4, 256)], "D": 256, "SOFTCAP": True})
    found["gathered 8x8 d128"] = ("partials", {"KU": 8, "VU": 8})
    for d in (64, 128, 256):
        runs = {"KEYS": [(4, d // 2), (3, d // 2)], "VALUES": [(3, d // 2), (2, d // 2)], "D": d}
        found[f"3.5x2.5 d{d}"] = ("partials", runs)
    found["3.5x2.5 d128, constant part"] = ("partials", {**found["3.5x2.5 d128"][1], "CENTER": True})
    found["mixed widths d128, constant part"] = ("partials", {"CENTER": True})
    found["prepare d256, mask"] = ("prepare", {"D": 256, "MASK": 1})
    for name in ("prepare", "combine", "encode_kernel", "unpack_kernel"):
        found[name] = (name, {"KU": 4, "VU": 4} if "_" in name else {})
    found["encode_kernel, mixed widths"] = ("encode_kernel", {})
    return found


# What the tests compile: one of each kind, to see that what is recorded is what compilers make.
GATE = {
    "4x4 d128": ("sm_90", "gfx942"),
    "2x2 d128": ("sm_80",),
    "3.5x2.5 d64": ("sm_90",),
    "5x4 d128, constant part": ("sm_120",),
    "4x4 d128, mask": ("sm_100",),
    "prepare": ("sm_90",),
    "combine": ("sm_80",),
    "encode_kernel": ("gfx942",),
    "unpack_kernel": ("sm_90",),
}


@functools.cache
def sources() -> str:
    """16 digits of a SHA-256 of what compiled code is made from: the kernels' files, and how they are compiled here."""
    files = sorted((Path(__file__).parent.parent / "hf_seqkv" / "kernels").glob("triton_*.py"))
    mine = Path(__file__).read_text()
    own = [x for x in ast.parse(mine).body if getattr(x, "name", "") in _SOURCES]
    texts = [*(file.read_text() for file in files), *(ast.get_source_segment(mine, x) for x in own)]
    return hashlib.sha256("".join(texts).encode()).hexdigest()[:16]


def recorded() -> dict[str, dict[str, dict]]:
    """Facts that were recorded, by variant and target."""
    return json.loads(BUDGETS.read_text())


def stale() -> dict[str, list[str]]:
    """Targets of variants whose facts are of other kernels, or not recorded."""
    old = recorded()
    found = {n: [t for t in TARGETS if old.get(n, {}).get(t, {}).get("sources") != sources()] for n in variants()}
    return {name: targets for name, targets in found.items() if targets}


def _constants(kernel, target: str, given: dict) -> dict:
    import torch

    from hf_seqkv.kernels.triton_tables import pieces, unlike

    dim = given.get("D", 128)
    padded = 1 << (dim - 1).bit_length()
    amd = target.startswith("gfx")
    usual = {
        "H": 8, "ROWS": 4, "RB": 16 if amd else 4, "D": dim, "DP": padded, "DV": dim, "DVP": padded, "KEYS": [],
        "KU": 0, "VALUES": [], "VU": 0, "HALF": dim // 2, "HP": padded // 2, "SOFTCAP": False, "MASK": 0,
        "INTERLEAVED": False, "SIDE": True, "SINKS": True, "RP": 4, "PAGES": 16, "TILES": not amd,
        "KEY_FIT": True, "VALUE_FIT": True, "NARROW": False,
        "CENTER": kernel.fn.__name__ != "partials", "PRECISION": "ieee" if amd else "tf32x3", "PART": min(padded, 64),
    }  # fmt: skip
    usual.update(given)
    for side, uniform in (("KEYS", "KU"), ("VALUES", "VU")):
        runs = usual[side]
        widths = torch.tensor([[bits for bits, size in runs for _ in range(size)]])
        usual[side] = pieces(widths, "free" in given) if runs and not amd else unlike(dim)  # tables are for NVIDIA
        if len(runs) == 1:
            usual[uniform] = runs[0][0]
    usual |= {"KEY_MOST": usual["KU"] or 4, "VALUE_MOST": usual["VU"] or 3}
    usual["UNIFORM"] = usual["KU"]
    return {name: value for name, value in usual.items() if name in kernel.arg_names}


def compile_kernel(kernel, target: str, given: dict):
    """`(compiled kernel, warps, ptxas' words)`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hf_seqkv.kernels.triton_pages import ENCODE, UNPACK
    from hf_seqkv.kernels.triton_partials import partials, partials_options
    from hf_seqkv.kernels.triton_rows import OPTIONS, prepare, prepare_options

    constants = _constants(kernel, target, given)
    pointers = {**_POINTERS, **_PAGES} if "_kernel" in kernel.fn.__name__ else _POINTERS
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = "*" + pointers[name] if name in pointers else "fp32" if name in _FLOATS else "i32"
        if name in pointers or name in _ALIGNED:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    where = GPUTarget("cuda", int(target[3:]), 32) if target.startswith("sm_") else GPUTarget("hip", target, 64)
    options = {"encode_kernel": ENCODE, "unpack_kernel": UNPACK}.get(kernel.fn.__name__, OPTIONS)
    if kernel is prepare:
        options, _ = prepare_options(constants["HP"], where.backend == "cuda")
    if kernel is partials:
        shared = (100 if target == "sm_120" else 164) << 10
        options = partials_options(constants["KEYS"][0][0] > 0, constants["D"], shared)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        compiled = triton.compile(source, target=where, options=options)
    return compiled, options["num_warps"], said.getvalue()


def _loops(lines: list[tuple[str | None, str]], target_of) -> list[tuple[list[str], bool]]:
    """Bodies of backward branches, and whether there is none inside."""
    at = {label: i for i, (label, _) in enumerate(lines) if label}
    found = [(at[target_of(text)], i) for i, (_, text) in enumerate(lines) if at.get(target_of(text), i + 1) <= i]
    return [([text for _, text in lines[b : e + 1]], all(x < b or y >= e for x, y in found)) for b, e in found]


def _nvidia(compiled, said: str) -> tuple[dict, list, str]:
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        sass = subprocess.run([folder / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    ptx, lines, label = compiled.asm["ptx"], [], None
    for line in sass.splitlines():
        if match := re.match(r"\s*\.?(L_x_\d+):", line):
            label = match[1]
        elif match := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            lines.append((label, match[1]))
            label = None

    def target_of(text):
        match = re.search(r"\bBRA(?:\.\w+)*\b.*?\(?\.(L_x_\d+)", text)
        return match and match[1]

    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^\]]*\], \[[^\]]*\], (0x)?(\w+)", ptx)
    facts = {
        "registers": max(map(int, re.findall(r"Used (\d+) registers", said))),
        "spills": sum(int(n) for n in re.findall(r"(\d+) bytes spill", said)),
        "copies": sorted({int(size, 16) for _, size in copies}),
    }
    return facts, _loops(lines, target_of), r"\b[A-Z]*MMA\b|\bHMMA"


def _amd(compiled) -> tuple[dict, list, str]:
    text, lines, label = compiled.asm["amdgcn"], [], None
    for line in text.splitlines():
        if match := re.match(r"(\.LBB\w+):", line):
            label = match[1]
        elif re.match(r"\t[a-z]\w+", line):
            lines.append((label, line.strip()))
            label = None

    def target_of(text):
        match = re.search(r"s_c?branch\w*\s+(\.LBB\w+)", text)
        return match and match[1]

    def number(name):
        match = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(match[1]) if match else 0

    # In memory: scalar registers are spilt to lanes of vector ones.
    facts = {"registers": number("vgpr_count"), "spills": number("private_segment_fixed_size")}
    return facts, _loops(lines, target_of), r"v_mfma"


def measure(name: str, target: str) -> dict:
    """Registers, bytes spilt, shared bytes, matrix instructions and instructions a code of a variant."""
    from hf_seqkv.kernels import triton_pages, triton_partials, triton_rows

    which, given = variants()[name]
    kernel = next(getattr(m, which) for m in (triton_partials, triton_rows, triton_pages) if hasattr(m, which))
    compiled, warps, said = compile_kernel(kernel, target, given)
    facts, loops, mma = _nvidia(compiled, said) if target.startswith("sm_") else _amd(compiled)
    inner = [text for loop, last in loops for text in loop if last]
    spilt = sum(bool(re.search(r"\b(STL|LDL)\b|scratch_(load|store)", text)) for text in inner)
    facts |= {"spilt_in_loops": spilt, "shared": compiled.metadata.shared, "sources": sources()}
    if which == "partials":
        # One loop for pages seen whole and one for the others, which is the longer; AMD's kernels have one for all.
        found = sorted((len(loop), sum(bool(re.search(mma, text)) for text in loop)) for loop, _ in loops)
        most = max((count for _, count in found), default=0)
        alike, lanes = (1, 64) if target.startswith("gfx") else (2, 32)
        length, facts["mma"] = min((pair for pair in found if alike * pair[1] >= most > 0), default=(0, 0))
        facts["per_code"] = round(length * warps * lanes / (2 * 64 * given.get("D", 128)), 2)
    return facts


def _timed(pair: tuple[str, str]) -> tuple[dict, float]:
    """What `measure` finds, and seconds of processors that it took."""
    started = sum(os.times()[:4])
    return measure(*pair), sum(os.times()[:4]) - started


def main(arguments: list[str]) -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"
    todo = stale() if "--stale" in arguments else GATE
    if "--only" in arguments:
        todo = {arguments[arguments.index("--only") + 1]: [t for t in TARGETS if t in arguments] or TARGETS}
    found, records = {}, recorded()
    if "--json" not in arguments:
        heads = f"{'ins/code':>9}{'regs':>6}{'spills':>8}{'shared':>8}{'mma':>6}{'CPU s':>7}  copies, bytes"
        print(f"{'variant':<36}{'target':<9}{heads}")
    pairs = [(name, target) for name, targets in todo.items() for target in targets]
    with ProcessPoolExecutor(os.cpu_count() if "--stale" in arguments else 1) as pool:
        for (name, target), (facts, seconds) in zip(pairs, pool.map(_timed, pairs), strict=True):
            found.setdefault(name, {})[target] = facts
            if "--update" in arguments:
                records.setdefault(name, {})[target] = facts
                kept = {name: records[name] for name in variants() if name in records}
                BUDGETS.write_text(json.dumps(kept, indent=1) + "\n")
            if "--json" not in arguments:
                cells = (facts.get("per_code", ""), facts["registers"], facts["spills"], facts["shared"])
                print(f"{name:<36}{target:<9}{cells[0]:>9}{cells[1]:>6}{cells[2]:>8}{cells[3]:>8}"
                      f"{facts.get('mma', ''):>6}{seconds:>7.1f}  {facts.get('copies', '')}", flush=True)  # fmt: skip
    if "--json" in arguments:
        print(json.dumps(found))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    main(sys.argv[1:])
