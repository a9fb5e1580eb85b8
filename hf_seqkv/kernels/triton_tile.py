"""Pieces of the Triton kernels: a page's codes to tiles of levels, for matrix units that want fp16 pairs.

Two ways to expand. `table_*` looks codes up four at a time with `prmt.b32`, a byte permute that picks from eight table
bytes by the low four bits of each half-byte of its selector: levels are bytes `u`, and `1024 + u` is an fp16 number
whose low byte is `u`. Tokens come out in the order the bytes hold them (`token_of`), which every per-token tensor
follows. `gather_tile` reads any widths from a table of fp16 levels, in plain Triton, tokens in their order.

All of it is for pages of 64 tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

PAGE = tl.constexpr(64)

# A number that is the same in every lane, told so that ptxas keeps it in vector registers: `prmt` reads no uniform
# ones, and would copy them at each use. (l * l + l is even.)
_VECTOR = tl.constexpr("""{
.reg .b32 l;
mov.u32 l, %laneid;
mad.lo.u32 l, l, l, l;
and.b32 l, l, 1;
or.b32 $0, $1, l;
}""")

# Eight 4-bit codes of $2 to bytes, tables $3 $4 (codes 0 to 7) and $5 $6 (8 to 15). A selector with its high bit set
# repeats the sign of the byte it picks, which is 0: each half of the codes is silent in the other's table.
_LOOKUP_4 = tl.constexpr("""{
.reg .b32 s, x, y;
xor.b32 x, $2, 0x88888888;
shr.u32 s, $2, 16;
shr.u32 y, x, 16;
prmt.b32 $0, $3, $4, $2;
prmt.b32 x, $5, $6, x;
or.b32 $0, $0, x;
prmt.b32 $1, $3, $4, s;
prmt.b32 y, $5, $6, y;
or.b32 $1, $1, y;
}""")

# Eight 2-bit codes, table $3.
_LOOKUP_2 = tl.constexpr("""{
.reg .b32 s;
and.b32 s, $2, 0x3333;
prmt.b32 $0, $3, 0, s;
shr.u32 s, $2, 2;
and.b32 s, s, 0x3333;
prmt.b32 $1, $3, 0, s;
}""")

# Eight 3-bit codes, table $5 $6: low bits in $2, high bits in $3, $4 says which.
_LOOKUP_3 = tl.constexpr("""{
.reg .b32 s, x, y;
shl.b32 x, $3, 2;
shr.u32 x, x, $4;
shr.u32 y, $3, $4;
and.b32 x, x, 0x4444;
and.b32 y, y, 0x4444;
lop3.b32 x, $2, 0x3333, x, 0xEA;
shr.u32 s, $2, 2;
lop3.b32 y, s, 0x3333, y, 0xEA;
prmt.b32 $0, $5, $6, x;
prmt.b32 $1, $5, $6, y;
}""")

# Eight 5-bit codes, tables $5 to $12: low bits in $2, high bits in $3, $4 says which. The byte's top bit is the code's.
_LOOKUP_5 = tl.constexpr("""{
.reg .b32 w, v, x, y, m, t, b;
xor.b32 v, $2, 0x88888888;
shr.u32 m, $3, $4;
and.b32 m, m, 0x11111111;
mov.b32 b, 0xFF00;
prmt.b32 t, b, 0, m;
prmt.b32 x, $5, $6, $2;
prmt.b32 w, $7, $8, v;
lop3.b32 x, x, w, t, 0x54;
prmt.b32 y, $9, $10, $2;
prmt.b32 w, $11, $12, v;
lop3.b32 y, y, w, t, 0xA8;
lop3.b32 x, t, 0x80808080, x, 0xEA;
or.b32 $0, x, y;
shr.u32 m, m, 16;
shr.u32 v, v, 16;
shr.u32 w, $2, 16;
prmt.b32 t, b, 0, m;
prmt.b32 x, $5, $6, w;
prmt.b32 y, $9, $10, w;
prmt.b32 w, $7, $8, v;
lop3.b32 x, x, w, t, 0x54;
prmt.b32 w, $11, $12, v;
lop3.b32 y, y, w, t, 0xA8;
lop3.b32 x, t, 0x80808080, x, 0xEA;
or.b32 $1, x, y;
}""")

# Four bytes of one component to two registers of fp16 pairs along tokens.
_SPREAD = tl.constexpr("""
prmt.b32 $0, $2, 0x64646464, 0x4140;
prmt.b32 $1, $2, 0x64646464, 0x4342;
""")

# Four bytes each of two components to four registers of fp16 pairs along components, one a token.
_PAIR = tl.constexpr("""{
.reg .b32 a, b;
prmt.b32 a, $4, $5, 0x5140;
prmt.b32 b, $4, $5, 0x7362;
prmt.b32 $0, a, 0x64646464, 0x4140;
prmt.b32 $1, a, 0x64646464, 0x4342;
prmt.b32 $2, b, 0x64646464, 0x4140;
prmt.b32 $3, b, 0x64646464, 0x4342;
}""")


@triton.jit
def vector(x):
    """`x` unchanged, in vector registers."""
    return tl.inline_asm_elementwise(_VECTOR, "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def load_tables(tables, BITS: tl.constexpr):
    """Table bytes of a head as four pairs of words `[1, 1]` (unused ones repeat the first) and shifts `[1, 8]`.

    Loads, not arithmetic: only above loads does the compiler move a change of layout.
    """
    at = tables + tl.zeros([1, 1], tl.int32)
    a = vector(tl.load(at))
    b, c, d, e, f, g, h = a, a, a, a, a, a, a
    if BITS > 2:
        b = vector(tl.load(at + 1))
    if BITS > 3:
        c, d = vector(tl.load(at + 2)), vector(tl.load(at + 3))
    if BITS > 4:
        e, f = vector(tl.load(at + 4)), vector(tl.load(at + 5))
        g, h = vector(tl.load(at + 6)), vector(tl.load(at + 7))
    shifts = tl.load(tables + 8 + tl.arange(0, 8))[None, :]
    return a, b, c, d, e, f, g, h, shifts


@triton.jit
def load_words(codes, first, D: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr):
    """Words of `ROWS` components from `first` on, `[ROWS, 8]` of eight codes each, and those of the high bits.

    `codes` points to int32. The loads are flat, or the compiler would copy them word by word to suit their use.
    Components from `D` on are zero.
    """
    place = tl.arange(0, ROWS * 8)
    stride = 2 * BITS
    if BITS < 4:
        codes = codes.to(tl.pointer_type(tl.int16))
        stride = 4 * BITS
    if first + ROWS > D:
        low = tl.load(codes + (first + place // 8) * stride + place % 8, mask=first + place // 8 < D, other=0)
    else:
        low = tl.load(codes + (first + place // 8) * stride + place % 8)
    low = tl.reshape(low, (ROWS, 8))
    if BITS < 4:
        low = low.to(tl.int32) & 0xFFFF
    high = low
    if BITS % 2:
        n: tl.constexpr = 4 if BITS == 3 else 2
        place = tl.arange(0, ROWS * n)
        if first + ROWS > D:
            high = tl.load(codes + (first + place // n) * stride + 8 + place % n, mask=first + place // n < D, other=0)
        else:
            high = tl.load(codes + (first + place // n) * stride + 8 + place % n)
        high = tl.reshape(tl.broadcast_to(tl.reshape(high, (ROWS, 1, n)), (ROWS, 8 // n, n)), (ROWS, 8))
        if BITS < 4:
            high = high.to(tl.int32) & 0xFFFF
    return low, high


@triton.jit
def token_of(i, BITS: tl.constexpr):
    """Token at place `i = 8 * n + w` of a table tile, code `n` of word `w`; `BITS` 0 is a gathered tile."""
    n, w = i // 8, i % 8
    if BITS == 0:
        return i
    if BITS < 4:
        return 2 * w + (n // 2) % 2 + 32 * (n % 2) + 16 * (n // 4)
    return 4 * w + n // 2 + 32 * (n % 2)


@triton.jit
def component_of(i, chunk, DP: tl.constexpr, BITS: tl.constexpr):
    """Component at place `i` of a chunk of the keys' contraction: half of them where tables expand, else all."""
    if BITS == 0:
        return i
    return (i % 2) * (DP // 2) + chunk * (DP // 4) + (i // 2) % 2 * (DP // 8) + i // 4


@triton.jit
def lookup(low, high, tables, BITS: tl.constexpr):
    """Bytes of eight codes, two words of four."""
    a, b, c, d, e, f, g, h, shifts = tables
    if BITS == 2:
        x, y = tl.inline_asm_elementwise(
            _LOOKUP_2, "=&r,=&r,r,r", [low, a], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )
    elif BITS == 3:
        x, y = tl.inline_asm_elementwise(
            _LOOKUP_3, "=&r,=&r,r,r,r,r,r", [low, high, shifts, a, b],
            dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    elif BITS == 4:
        x, y = tl.inline_asm_elementwise(
            _LOOKUP_4, "=&r,=&r,r,r,r,r,r", [low, a, b, c, d], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )
    else:
        x, y = tl.inline_asm_elementwise(
            _LOOKUP_5, "=&r,=&r,r,r,r,r,r,r,r,r,r,r,r", [low, high, shifts, a, b, c, d, e, f, g, h],
            dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    return x, y


@triton.jit
def halves(z):
    """fp16 pairs in int32 `[...]` to `[..., 2]`; free, a register is a pair."""
    low = (z & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    high = ((z >> 16) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    return tl.join(low, high)


@triton.jit
def table_keys(codes, tables, chunk, D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr):
    """Tile `[64, DP / 2]` fp16 of `1024 + u`: tokens in the order of `token_of`, components of `component_of`."""
    ROWS: tl.constexpr = DP // 4
    low, high = load_words(codes, chunk * ROWS, D, ROWS, BITS)
    a0, a1 = lookup(low, high, tables, BITS)
    low, high = load_words(codes, chunk * ROWS + DP // 2, D, ROWS, BITS)
    b0, b1 = lookup(low, high, tables, BITS)
    z0, z1, z2, z3 = tl.inline_asm_elementwise(
        _PAIR, "=&r,=&r,=&r,=&r,r,r", [a0, b0], dtype=(tl.int32,) * 4, is_pure=True, pack=1
    )
    z4, z5, z6, z7 = tl.inline_asm_elementwise(
        _PAIR, "=&r,=&r,=&r,=&r,r,r", [a1, b1], dtype=(tl.int32,) * 4, is_pure=True, pack=1
    )
    even = tl.join(tl.join(z0, z4), tl.join(z2, z6))
    odd = tl.join(tl.join(z1, z5), tl.join(z3, z7))
    tile = halves(tl.join(even, odd))  # [ROWS, 8 words, 2, 2, 2, 2]
    tile = tl.reshape(tile, (2, ROWS // 2, 8, 8, 2))
    return tl.reshape(tl.permute(tile, (3, 2, 1, 0, 4)), (64, DP // 2))


@triton.jit
def table_values(codes, tables, D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr):
    """Tile `[DP, 64]` fp16 of `1024 + u`, tokens in the order that `reorder` gives."""
    low, high = load_words(codes, 0, D, DP, BITS)
    a, b = lookup(low, high, tables, BITS)
    z0, z1 = tl.inline_asm_elementwise(_SPREAD, "=&r,=&r,r", [a], dtype=(tl.int32,) * 2, is_pure=True, pack=1)
    z2, z3 = tl.inline_asm_elementwise(_SPREAD, "=&r,=&r,r", [b], dtype=(tl.int32,) * 2, is_pure=True, pack=1)
    tile = halves(tl.join(tl.join(z0, z2), tl.join(z1, z3)))  # [DP, 8 words, 2, 2, 2]
    tile = tl.permute(tl.reshape(tile, (DP, 8, 4, 2)), (0, 2, 1, 3))
    return tl.reshape(tile, (DP, 64))


@triton.jit
def gather_codes(codes, d, token, width, at, UNIFORM: tl.constexpr):
    """Codes of components whose `width` bits of each token begin at byte `at`; all `[D, 64]`, see `codec.packing`.

    `UNIFORM` is the width where all components have the same, else 0.
    """
    result = tl.zeros_like(token + d)
    shift = tl.zeros_like(width)
    for i in tl.static_range(4):  # fields of 8, 4, 2 and 1 bits
        if UNIFORM == 0 or UNIFORM & (8 >> i):
            here = (width & (8 >> i)) != 0
            byte = tl.load(codes + at + tl.arange(0, 64 >> i)[None, :], mask=here, other=0).to(tl.int32)
            byte = tl.reshape(byte, (width.shape[0], 1, 64 >> i))
            part = (byte >> (tl.arange(0, 1 << i) * (8 >> i))[None, :, None]) & ((1 << (8 >> i)) - 1)
            result |= tl.reshape(part, (width.shape[0], 64)) << shift
            at += tl.where(here, 64 >> i, 0)
            shift += tl.where(here, 8 >> i, 0)
    return result


@triton.jit
def gather_tile(codes, h, levels, widths, offsets, D: tl.constexpr, DP: tl.constexpr, UNIFORM: tl.constexpr):
    """Tile `[DP, 64]` fp16 of head `h`: `codes` uint8, `levels [H, 9, 256]`, `widths` and `offsets [H, D]` int32.

    Components of 0 bits and from `D` on are 0.
    """
    d = tl.arange(0, DP)[:, None]
    token = tl.arange(0, 64)[None, :]
    if UNIFORM > 0:
        width = tl.where(d < D, UNIFORM, 0)
        at = (h * D + d) * (8 * UNIFORM)
    else:
        width = tl.load(widths + h * D + d, mask=d < D, other=0)
        at = tl.load(offsets + h * D + d, mask=d < D, other=0)
    code = gather_codes(codes, d, token, width, at, UNIFORM)
    return tl.load(levels + (h * 9 + width) * 256 + code)
