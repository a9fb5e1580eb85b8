"""A sequence codec whose numbers are random, pages for it, and both ways: for its tests."""

import pytest
import torch

from hf_seqkv.codec.importance import LEVELS
from hf_seqkv.codec.sequence import SequenceCodec
from hf_seqkv.codec.sequence_part import CLASSES, INPUTS, LADDER, SIZES, Part, dct, size_codes, sources
from hf_seqkv.codec.symbol_tables import LIMIT, SymbolTables

HEADER = 44
PAGE, EMBEDDED, BASE = 8, 12, 0.05
SHAPES = ((2, 4, 6), (1, 8, 8), (3, 6, 4))  # KV heads, key dim and value dim of each layer
HEADS = [heads for heads, _, _ in SHAPES]
both = pytest.mark.parametrize("predict", [True, False], ids=["predicting", "plain"])


def widths():
    """Of every part in turn, and the layer it belongs to."""
    return [(heads * dim, layer) for layer, (heads, *dims) in enumerate(SHAPES) for dim in dims]


def inputs(index):
    """Widths of what a part is predicted from: all there is, but for the last layer's keys, which miss two."""
    sizes = [width for width, _ in widths()]
    found = [EMBEDDED, *(0 if n is None else sizes[n] for n in sources(index))]
    return tuple(0 if index == 4 and at in (0, 3) else width for at, width in enumerate(found))


def tables(symmetric_ratio=0.8):
    """By class: geometric, of the width that a class of sizes means."""
    deviation = 2.0 ** ((torch.arange(CLASSES, dtype=torch.float64) % SIZES - SIZES // 3) / 4)
    ratio = (-symmetric_ratio * 2**0.5 / deviation).exp()[:, None]
    return SymbolTables.fit(1e4 * ratio ** torch.arange(-LIMIT, LIMIT + 1).abs())


def make_codec(predict=True, step=0, refine=1.0, seed=0, quiet=0.3):
    """A valid codec whose numbers are random; `refine` moves the level of every token.

    Of the components of each part `quiet` are taken for mostly zero, whatever they are.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    parts = []
    for index, (width, layer) in enumerate(widths()):
        heads, key_dim, _ = SHAPES[layer]
        basis = torch.linalg.qr(normal(width, width))[0] * (2.0 ** (normal(width, 1) / 2))
        importance = torch.zeros(heads * key_dim + 4 * heads + 3)
        importance[0], importance[-1] = 1.5, refine
        codes = size_codes(2.0 ** normal(PAGE, width), BASE)
        codes[:, round((1 - quiet) * width) :] = 60
        refined = torch.full((LEVELS, width), size_codes(torch.tensor(BASE / 3), BASE).item(), dtype=torch.uint8)
        counts = inputs(index) if predict else (0,) * INPUTS
        predictor = normal(sum(counts), width) / max(1, sum(counts)) ** 0.5
        ladder = [x.expand(len(LADDER), *x.shape).contiguous() for x in (codes, refined)]
        parts.append(Part(normal(width), counts, predictor, basis, *ladder, importance, share=4))
    return SequenceCodec(parts, dct(PAGE), tables(), BASE, step)


def make_pages(count=3, seed=1):
    """Embeddings, and keys and values of every layer."""
    generator = torch.Generator().manual_seed(seed)
    embedded = torch.randn(count, PAGE, EMBEDDED, generator=generator)
    layers = [
        tuple(torch.randn(count, heads, PAGE, dim, generator=generator) for dim in dims) for heads, *dims in SHAPES
    ]
    return embedded, layers


def encode(codec, embedded, layers):
    """Stored pages, what the encoder says they decode to, and the encoder."""
    positions = torch.arange(len(embedded) * PAGE).view(-1, PAGE)
    encoder = codec.encoder(embedded if codec.predicts else None)
    held = [encoder.add(k, v, positions) for k, v in layers]
    return encoder.finish(), held, encoder


def decode(codec, pages, embedded):
    return list(codec.decode(pages, embedded if codec.predicts else None, HEADS))


def read(codec, pages):
    """What pages hold of each part, as an encoder says it."""
    levels, loud, active, fine = zip(*map(codec._read, pages), strict=True)
    quiet = torch.zeros(len(pages), len(codec.quiet.flags), codec.page_size, dtype=torch.int32)
    for n, (numbers, symbols) in enumerate(active):
        quiet[n, numbers] = symbols
    quiet = quiet.split([len(coder.flags) for coder in codec.coders], 1)
    loud, fine = map(torch.stack, zip(*loud, strict=True)), map(torch.cat, zip(*fine, strict=True))
    return list(zip(torch.stack(levels, 1), loud, quiet, fine, strict=True))


def flat(layers):
    return torch.cat([x.transpose(1, 2).flatten(2) for pair in layers for x in pair], -1)  # [N, P, all components]
