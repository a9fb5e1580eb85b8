"""Levels of 32 codes at a time with AVX2, whose registers hold 16 words.

`vpshufb` looks up 32 bytes in a table of 16: two tables give both bytes of a level, and unpacking joins these. It works
within each half of a register, so codes are laid out for what it makes of them. Where a code has more than 4 bits, the
upper ones lie at the top of a byte, where they choose between tables.
"""

from __future__ import annotations

from llvmlite import ir

from .simd import WORDS, call, element, field_bytes, load, shuffle

NAME = "AVX2"
VNNI = "avxvnni"  # the feature that fuses products with their sum
# Tokens of the four vectors that a page's scores are summed up in: the halves of a register are 16 tokens apart, which
# codes of all widths come in without crossing them.
ORDER = [first + at + i for first in (0, 8, 32, 40) for at in (0, 16, 4, 20) for i in range(4)]
# What is summed up at once, so that sums, 4 rows of 2 registers, fit beside tables in 16 registers: which of a page's
# vectors of scores, and how many components of values.
GROUPS, BLOCK = [[v] for v in range(4)], 1
_I8, _I16, _I32, _I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
_BYTES, _QUARTERS = ir.VectorType(_I8, 32), ir.VectorType(_I32, 8)
_SPREAD = [*range(8), *range(16, 24), *range(8, 16), *range(24, 32)]  # lanes as `levels` takes them; its own inverse


def _shifted(b, data, counts):
    """Bytes moved up by `counts`, equal in every four; what was below or above comes in beside them."""
    counts = counts[::4]
    up = max(counts) > 0
    assert min(counts) >= 0 if up else max(counts) <= 0, counts
    amount = ir.Constant(_QUARTERS, [abs(count) for count in counts])
    data = b.bitcast(data, _QUARTERS)
    return b.bitcast(b.shl(data, amount) if up else b.lshr(data, amount), _BYTES)


def _places(width):
    """Fields of a code, lowest first, and the bit of a byte where each is put."""
    fields = [field for field in (4, 2, 1) if width & field]
    return list(zip(fields, (0, 3 if width < 4 else 8 - fields[-1]), strict=False))


def table(b, address, width):
    """A codebook of `2**width` levels as tables of their lower and of their upper bytes, for 16 codes each."""
    run = ir.VectorType(_I16, 1 << width)
    data = b.bitcast(load(b, element(b, address, _I64(0), 2, run), 2), ir.VectorType(_I8, 2 << width))
    if width < 4:  # the third bit of three is put one higher
        books = [[(i & 3 | i >> 3 << 2) % (1 << width) for i in range(16)]]
    else:
        books = [range(first, first + 16) for first in range(0, 1 << width, 16)]
    return [[shuffle(b, data, None, [2 * i + byte for i in book] * 2) for byte in (0, 1)] for book in books]


def _codes(b, address, width, lanes):
    """Codes of lanes: what a table is asked for, and, in the sign of each byte, which table."""
    index, select, at = None, None, 0
    for field, place in _places(width):
        size = 8 * field
        data = field_bytes(b, b.add(address, _I64(at)), 8 * width, size, lanes)
        data = _shifted(b, data, [place - field * (token // size) for _, token in lanes])
        if place > 3:
            select = data
        else:
            data = b.and_(data, ir.Constant(_BYTES, [((1 << field) - 1) << place] * 32))
            index = data if index is None else b.or_(index, data)
        at += size
    return index, select


def levels(b, table, address, width, lanes):
    """Levels of lanes, from the codes at an address."""
    index, select = _codes(b, address, width, [lanes[i] for i in _SPREAD])
    found = [[call(b, "llvm.x86.avx2.pshuf.b", _BYTES, part, index) for part in parts] for parts in table]
    for bit in range(12 - width, 8):
        sign = b.shl(select, ir.Constant(_BYTES, [7 - bit] * 32)) if bit < 7 else select
        upper = b.icmp_signed("<", sign, ir.Constant(_BYTES, [0] * 32))
        found = [
            [b.select(upper, *parts) for parts in zip(high, low, strict=True)]
            for low, high in zip(found[::2], found[1::2], strict=True)
        ]
    joined = shuffle(b, *found[0], [byte for i in _SPREAD for byte in (i, 32 + i)])
    return b.bitcast(joined, WORDS)


def add_products(b, total, first, second):
    """A sum, and products of words, neighbours added."""
    sums, halves = ir.VectorType(_I32, 8), [list(range(16)), list(range(16, 32))]
    parts = [[shuffle(b, x, None, half) for x in (first, second)] for half in halves]
    products = (call(b, "llvm.x86.avx2.pmadd.wd", sums, *part) for part in parts)
    return b.add(total, shuffle(b, *products, list(range(16))))
