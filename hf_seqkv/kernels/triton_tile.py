"""A page's codes to tiles of levels, for matrix units that want bytes, by PTX byte permutes.

Codes are looked up four at a time with `prmt.b32`, which picks from eight table bytes by the low three bits of each
half-byte of its selector: levels are signed bytes `u`. Codes of all widths are brought into the order that bytes of
4-bit codes have (`token_of`), which every per-token tensor follows. So components of different widths go into one
product. What levels are multiplied with are numbers of two bytes (`triton_bytes`).

A *piece* is a run of components of one width: `(bits, first, size, word, free)`, `size` 16 or 32, `word` the offset of
its codes from the head's, in int32; `free` tells 5-bit levels of any kind from symmetric ones, which take fewer steps.

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

# Of all that is done to a code most goes to the units of logic, half as many as there are lanes. To join two words is
# left to the multipliers: a 1 that the compiler cannot see keeps it from turning that back.

# Eight 4-bit codes of $2 to bytes, tables $4 $5 (codes 0 to 7) and $6 $7 (8 to 15). A selector with its high bit set
# repeats the sign of the byte it picks, which is 0: each half of the codes is silent in the other's table.
_LOOKUP_4 = tl.constexpr("""{
.reg .b32 s, x, y;
xor.b32 x, $2, 0x88888888;
shr.u32 s, $2, 16;
shr.u32 y, x, 16;
prmt.b32 $0, $4, $5, $2;
prmt.b32 x, $6, $7, x;
mad.lo.u32 $0, $0, $3, x;
prmt.b32 $1, $4, $5, s;
prmt.b32 y, $6, $7, y;
mad.lo.u32 $1, $1, $3, y;
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

# Eight 5-bit codes, tables $5 to $12: low bits in $2, high bits in $3, $4 says which. Codes below 16 are negative.
_LOOKUP_FREE = tl.constexpr("""{
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
lop3.b32 x, t, 0x80808080, x, 0xAE;
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
lop3.b32 x, t, 0x80808080, x, 0xAE;
or.b32 $1, x, y;
}""")

# The same of symmetric levels, tables $5 $6 (magnitudes 0 to 7) and $7 $8 (8 to 15). Codes below 16 are negative: those
# of the others turned about, bit by bit, and so are their bytes.
_LOOKUP_5 = tl.constexpr("""{
.reg .b32 s, v, w, x, y, m, t, b;
shr.u32 m, $3, $4;
lop3.b32 m, m, 0x11111111, 0, 0x0C;
mul.lo.u32 s, m, 15;
xor.b32 s, s, $2;
xor.b32 v, s, 0x88888888;
mov.b32 b, 0xFF00;
prmt.b32 t, b, 0, m;
prmt.b32 x, $5, $6, s;
prmt.b32 y, $7, $8, v;
lop3.b32 $0, x, y, t, 0x56;
shr.u32 m, m, 16;
shr.u32 w, s, 16;
shr.u32 v, v, 16;
prmt.b32 t, b, 0, m;
prmt.b32 x, $5, $6, w;
prmt.b32 y, $7, $8, v;
lop3.b32 $1, x, y, t, 0x56;
}""")

# Bytes of four tokens each, of four components, to bytes of four components each, one of four tokens.
_TURN = tl.constexpr("""{
.reg .b32 a, b, c, d;
prmt.b32 a, $4, $5, 0x5140;
prmt.b32 b, $4, $5, 0x7362;
prmt.b32 c, $6, $7, 0x5140;
prmt.b32 d, $6, $7, 0x7362;
prmt.b32 $0, a, c, 0x5410;
prmt.b32 $1, a, c, 0x7632;
prmt.b32 $2, b, d, 0x5410;
prmt.b32 $3, b, d, 0x7632;
}""")


@triton.jit
def vector(x):
    """`x` unchanged, in vector registers."""
    return tl.inline_asm_elementwise(_VECTOR, "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def load_tables(tables, BITS: tl.constexpr, FREE: tl.constexpr):
    """Table bytes of a width, of a head's `tables [8, 8]`: as many words `[1, 1]` as its lookup takes.

    Loads, not arithmetic: only above loads does the compiler move a change of layout.
    """
    at = tables + BITS * 8 + tl.zeros([1, 1], tl.int32)
    words = (vector(tl.load(at)),)
    for i in tl.static_range(1, 4 if BITS == 5 and not FREE else 1 << max(BITS - 2, 0)):
        words += (vector(tl.load(at + i)),)
    return words


@triton.jit
def load_shifts(tables):
    """Which codes of a word belong to each of eight words of 4-bit codes, `[1, 8]`: of 2-bit, 1-bit, turned 1-bit.

    And a 1, `[1, 1]`.
    """
    at = tables + tl.arange(0, 8)[None, :]
    return tl.load(at), tl.load(at + 48), tl.load(at + 56), vector(tl.load(tables + 15 + tl.zeros([1, 1], tl.int32)))


@triton.jit
def load_field(codes, ROWS: tl.constexpr, STRIDE: tl.constexpr, N: tl.constexpr):
    """`N` words of each of `ROWS` components `STRIDE` words apart, repeated to `[ROWS, 8]`.

    The loads are flat, or the compiler would copy them word by word to suit their use.
    """
    place = tl.arange(0, ROWS * N)
    words = tl.reshape(tl.load(codes + place // N * STRIDE + place % N), (ROWS, 1, N))
    return tl.reshape(tl.broadcast_to(words, (ROWS, 8 // N, N)), (ROWS, 8))


@triton.jit
def lookup(codes, tables, shifts, ROWS: tl.constexpr, BITS: tl.constexpr, FREE: tl.constexpr):
    """Bytes of `ROWS` components' codes, which `codes` points to: two tensors `[ROWS, 8]` of four each."""
    pairs, bits, turns, one = shifts
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
            _LOOKUP_4, "=&r,=&r,r,r,r,r,r,r", (low, one) + tables, dtype=(tl.int32,) * 2, is_pure=True, pack=1
        )
    elif FREE:
        x, y = tl.inline_asm_elementwise(
            _LOOKUP_FREE, "=&r,=&r,r,r,r,r,r,r,r,r,r,r,r", (low, high, bits) + tables,
            dtype=(tl.int32,) * 2, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        x, y = tl.inline_asm_elementwise(
            _LOOKUP_5, "=&r,=&r,r,r,r,r,r,r,r", (low, high, bits) + tables,
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
    """Component, from its piece's first on, at place `i` of 32 of the keys' contraction; those from `SIZE` on are none.

    The order that lets a warp read its words of 32 components from 32 banks of shared memory.
    """
    return i // 4 % 2 * (4 if SIZE == 32 else 16) + i % 4 * (SIZE // 4) + i // 8


@triton.jit
def bytes_of(z):
    """Four bytes in int32 `[...]` to int8 `[..., 2, 2]`; free, a register is four."""
    return tl.join(tl.join(z, z >> 16), tl.join(z >> 8, z >> 24)).to(tl.int8)


@triton.jit
def turned(x, SIZE: tl.constexpr):
    """Bytes of four tokens `[SIZE, 8]` to bytes of four components: four tensors `[SIZE / 4, 8]`, one of each token."""
    x = tl.permute(tl.reshape(x, (2, 2, SIZE // 4, 8)), (2, 3, 0, 1))
    even, odd = tl.split(x)
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return tl.inline_asm_elementwise(
        _TURN, "=&r,=&r,=&r,=&r,r,r,r,r", [a, b, c, d], dtype=(tl.int32,) * 4, is_pure=True, pack=1
    )


@triton.jit
def key_tile(codes, tables, shifts, SIZE: tl.constexpr, BITS: tl.constexpr, FREE: tl.constexpr):
    """Tile `[64, 32]` int8: tokens in the order of `token_of`, components of `component_of`, from `SIZE` on zeros."""
    x, y = lookup(codes, tables, shifts, SIZE, BITS, FREE)
    x0, x1, x2, x3 = turned(x, SIZE)
    y0, y1, y2, y3 = turned(y, SIZE)
    even = tl.join(tl.join(x0, y0), tl.join(x2, y2))
    odd = tl.join(tl.join(x1, y1), tl.join(x3, y3))
    tile = bytes_of(tl.join(even, odd))  # [SIZE / 4, 8 words, 2, 2, 2, 2, 2]
    if SIZE == 32:
        tile = tl.permute(tl.reshape(tile, (2, 4, 8, 8, 4)), (3, 2, 1, 0, 4))
    else:
        tile = tl.permute(tl.reshape(tile, (4, 8, 8, 4)), (2, 1, 0, 3))
        tile = tl.permute(tl.join(tile, tl.zeros_like(tile)), (0, 1, 2, 4, 3))
    return tl.reshape(tile, (64, 32))


@triton.jit
def value_tile(codes, tables, shifts, SIZE: tl.constexpr, BITS: tl.constexpr, FREE: tl.constexpr):
    """Tile `[SIZE, 64]` int8, tokens in the order that `reorder` gives."""
    x, y = lookup(codes, tables, shifts, SIZE, BITS, FREE)
    tile = tl.reshape(bytes_of(tl.join(x, y)), (SIZE, 8, 2, 4))  # words, halves, bytes
    return tl.reshape(tl.permute(tile, (0, 2, 1, 3)), (SIZE, 64))


@triton.jit
def reorder(x, R: tl.constexpr):
    """Rows `[64, R]` from the order of `key_tile`'s tokens to that of `value_tile`'s."""
    return tl.reshape(tl.permute(tl.reshape(x, (2, 4, 8, R)), (0, 2, 1, 3)), (64, R))
