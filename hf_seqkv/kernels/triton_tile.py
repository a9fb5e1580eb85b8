"""A page's codes to tiles of levels, for matrix units that want fp16 pairs, by PTX byte permutes.

Codes are looked up four at a time with `prmt.b32`, which picks from eight table bytes by the low three bits of each
half-byte of its selector: levels are bytes `u`, and `1024 + u` is an fp16 number whose low byte is `u`. Codes of all
widths are brought into the order that bytes of 4-bit codes have (`token_of`), which every per-token tensor follows. So
components of different widths go into one product.

A *piece* is a run of components of one width: `(bits, first, size, word)`, `size` a power of two of at least 16, `word`
the offset of its codes from the head's, in int32.

All of it is for pages of 64 tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

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

# Eight codes of 1 or 2 bits, table $4: $3 says which of the word's. The mask is for 2.
_LOOKUP_FEW = """{
.reg .b32 s;
shr.u32 s, $2, $3;
and.b32 s, s, 0x33333333;
prmt.b32 $0, $4, 0, s;
shr.u32 s, s, 16;
prmt.b32 $1, $4, 0, s;
}"""
_LOOKUP_2 = tl.constexpr(_LOOKUP_FEW)
_LOOKUP_1 = tl.constexpr(_LOOKUP_FEW.replace("0x33333333", "0x11111111"))

# Eight 3-bit codes, table $6 $7: low bits in $2, high bits in $3, $4 and $5 say which.
_LOOKUP_3 = tl.constexpr("""{
.reg .b32 s, x;
shf.l.wrap.b32 x, $3, $3, $5;
and.b32 x, x, 0x44444444;
shr.u32 s, $2, $4;
lop3.b32 s, s, 0x33333333, x, 0xEA;
prmt.b32 $0, $6, $7, s;
shr.u32 s, s, 16;
prmt.b32 $1, $6, $7, s;
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
    """Table bytes of a width, of a head's `tables [8, 8]`: as many words `[1, 1]` as its lookup takes.

    Loads, not arithmetic: only above loads does the compiler move a change of layout.
    """
    at = tables + BITS * 8 + tl.zeros([1, 1], tl.int32)
    words = (vector(tl.load(at)),)
    for i in tl.static_range(1, 8 if BITS == 5 else 1 << max(BITS - 2, 0)):
        words += (vector(tl.load(at + i)),)
    return words


@triton.jit
def load_shifts(tables):
    """Which codes of a word belong to each of eight words of 4-bit codes, `[1, 8]`: of 2-bit, 1-bit, turned 1-bit."""
    at = tables + tl.arange(0, 8)[None, :]
    return tl.load(at), tl.load(at + 48), tl.load(at + 56)


@triton.jit
def load_field(codes, ROWS: tl.constexpr, STRIDE: tl.constexpr, N: tl.constexpr):
    """`N` words of each of `ROWS` components `STRIDE` words apart, repeated to `[ROWS, 8]`.

    The loads are flat, or the compiler would copy them word by word to suit their use.
    """
    place = tl.arange(0, ROWS * N)
    words = tl.reshape(tl.load(codes + place // N * STRIDE + place % N), (ROWS, 1, N))
    return tl.reshape(tl.broadcast_to(words, (ROWS, 8 // N, N)), (ROWS, 8))


@triton.jit
def lookup(codes, tables, shifts, ROWS: tl.constexpr, BITS: tl.constexpr):
    """Bytes of `ROWS` components' codes, which `codes` points to: two tensors `[ROWS, 8]` of four each."""
    pairs, bits, turns = shifts
    if BITS > 1:
        low = load_field(codes, ROWS, 2 * BITS, 8 if BITS > 3 else 4)
    if BITS % 2:
        high = load_field(codes + 2 * (BITS - 1), ROWS, 2 * BITS, 2)
    if BITS == 1:
        x, y = tl.inline_asm_elementwise(
            _LOOKUP_1, "=&r,=&r,r,r,r", (high, bits) + tables, dtype=(tl.int32,) * 2, is_pure=True, pack=1
        )
    elif BITS == 2:
        x, y = tl.inline_asm_elementwise(
            _LOOKUP_2, "=&r,=&r,r,r,r", (low, pairs) + tables, dtype=(tl.int32,) * 2, is_pure=True, pack=1
        )
    elif BITS == 3:
        x, y = tl.inline_asm_elementwise(
            _LOOKUP_3, "=&r,=&r,r,r,r,r,r,r", (low, high, pairs, turns) + tables,
            dtype=(tl.int32,) * 2, is_pure=True, pack=1,
        )  # fmt: skip
    elif BITS == 4:
        x, y = tl.inline_asm_elementwise(
            _LOOKUP_4, "=&r,=&r,r,r,r,r,r", (low,) + tables, dtype=(tl.int32,) * 2, is_pure=True, pack=1
        )
    else:
        x, y = tl.inline_asm_elementwise(
            _LOOKUP_5, "=&r,=&r,r,r,r,r,r,r,r,r,r,r,r", (low, high, bits) + tables,
            dtype=(tl.int32,) * 2, is_pure=True, pack=1,
        )  # fmt: skip
    return x, y


@triton.jit
def token_of(i):
    """Token at place `i = 8 * n + w` of a tile, code `n` of word `w`."""
    n, w = i // 8, i % 8
    return 4 * w + n // 2 + 32 * (n % 2)


@triton.jit
def component_of(i, SIZE: tl.constexpr):
    """Component, from its piece's first on, at place `i` of the keys' contraction."""
    return (i % 2) * (SIZE // 2) + (i // 2) % 2 * (SIZE // 4) + i // 4


@triton.jit
def halves(z):
    """fp16 pairs in int32 `[...]` to `[..., 2]`; free, a register is a pair."""
    low = (z & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    high = ((z >> 16) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    return tl.join(low, high)


@triton.jit
def key_tile(codes, tables, shifts, SIZE: tl.constexpr, BITS: tl.constexpr):
    """Tile `[64, SIZE]` fp16 of `1024 + u`: tokens in the order of `token_of`, components of `component_of`."""
    ROWS: tl.constexpr = SIZE // 2
    a0, a1 = lookup(codes, tables, shifts, ROWS, BITS)
    b0, b1 = lookup(codes + ROWS * 2 * BITS, tables, shifts, ROWS, BITS)
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
    return tl.reshape(tl.permute(tile, (3, 2, 1, 0, 4)), (64, SIZE))


@triton.jit
def value_tile(codes, tables, shifts, SIZE: tl.constexpr, BITS: tl.constexpr):
    """Tile `[SIZE, 64]` fp16 of `1024 + u`, tokens in the order that `reorder` gives."""
    a, b = lookup(codes, tables, shifts, SIZE, BITS)
    z0, z1 = tl.inline_asm_elementwise(_SPREAD, "=&r,=&r,r", [a], dtype=(tl.int32,) * 2, is_pure=True, pack=1)
    z2, z3 = tl.inline_asm_elementwise(_SPREAD, "=&r,=&r,r", [b], dtype=(tl.int32,) * 2, is_pure=True, pack=1)
    tile = halves(tl.join(tl.join(z0, z2), tl.join(z1, z3)))  # [SIZE, 8 words, 2, 2, 2]
    tile = tl.permute(tl.reshape(tile, (SIZE, 8, 4, 2)), (0, 2, 1, 3))
    return tl.reshape(tile, (SIZE, 64))
