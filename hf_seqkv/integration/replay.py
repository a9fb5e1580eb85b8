"""Replay: a sequence kept as its token ids alone, the smallest form there is; restoring its cache is a prefill.

Ids are coded in one of two ways. `static`, by `codec/token_contexts.py`: nothing else is needed to read them, and a
cache is restored by one prefill. `model`, under the model's own next-token distribution: a token takes what the model
is surprised by it. To read token `t` one needs the logits after the tokens before it, the very same bits that the
writer had: both run the model one token a step, on a `DynamicCache`. The cache that the reader's steps fill is the
restored one. Logits are the same on the machine that wrote them, with the same libraries, number of threads, dtype and
kind of attention; nobody promises more. Where they differ a checksum says so. Only `static` is fit for other machines.

Stored, little-endian:

| part        | bytes | content                                                          |
|-------------|-------|------------------------------------------------------------------|
| magic       | 4     | `SKVT`                                                           |
| version     | 2     | u16, 1                                                           |
| coder       | 2     | u16, 0 static, 1 model                                           |
| tokens      | 4     | u32, their number                                                |
| ids' check  | 4     | CRC-32 of the ids as u32                                         |
| check       | 4     | CRC-32 of everything, this field zero                            |
| fingerprint | 32    | `weights_fingerprint` of the model; of coder 1 only              |
| stream      | rest  | `token_contexts.encode_ids`, or `token_coder.encode`             |

Under a model, a token's interval is that of `token_coder.frequencies` of the logits after those before it; the first
token's is that of equal logits.
"""

from __future__ import annotations

import struct
import warnings
import zlib

import numpy as np
import torch
from transformers import DynamicCache

from ..codec.token_coder import IntervalReader, encode, frequencies
from ..codec.token_contexts import MAX_WIDTH, decode_ids, encode_ids
from ..errors import ConfigError, FormatError, SeqKVWarning
from .compat import CACHE_NAME
from .model_facts import weights_fingerprint
from .placement import module_device

MAGIC, VERSION = b"SKVT", 1
STATIC, MODEL = 0, 1
_HEADER = struct.Struct("<4sHHIII")
_FINGERPRINT = 32  # bytes
MODEL_HEADER_BYTES = _HEADER.size + _FINGERPRINT  # what is stored of coder 1 besides its stream


class _Steps:
    """A model that reads one token a step.

    Attributes:
        cache: Holds the tokens read.
        lengths: Intervals of the next one, see `frequencies`.
    """

    def __init__(self, model):
        self._model, self.cache = model, DynamicCache(config=model.config)
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        self.lengths = frequencies(torch.zeros(vocabulary, device=module_device(model)))

    @torch.no_grad()
    def read(self, token: int) -> None:
        ids = torch.tensor([[token]], device=module_device(self._model))
        self.lengths = frequencies(self._model(ids, **{CACHE_NAME: self.cache}).logits[0, -1])


def pack(ids: torch.Tensor, model=None, verify: bool = True) -> bytes:
    """Token ids as bytes.

    Args:
        ids: `[T]` int64, each from 0 to `2**32 - 1`.
        model: A causal LM in evaluation mode to code them under, at one step of it a token; None for the static coder.
        verify: Read what was written, at as many steps again. If that fails, the static coder is used, with a
            `SeqKVWarning`.

    Raises:
        ConfigError: Ids are of another shape, dtype or range, or not in the model's vocabulary.
        NonFiniteError: The model predicts NaN.
    """
    if ids.ndim != 1 or ids.dtype != torch.int64:
        raise ConfigError(f"ids are {ids.dtype} {list(ids.shape)}, must be torch.int64 [T]; pass a row of input_ids")
    tokens = ids.cpu().numpy()
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < 1 << MAX_WIDTH:
        raise ConfigError(f"ids are from {tokens.min()} to {tokens.max()}, must be from 0 to {(1 << MAX_WIDTH) - 1}")
    if model is not None:
        data = _closed(MODEL, tokens, bytes.fromhex(weights_fingerprint(model)) + _encode(tokens.tolist(), model))
        if not verify or _reads(data, model):
            return data
        warnings.warn(
            "this model's logits are not the same when it runs again (is it in evaluation mode, are its kernels "
            "deterministic?): ids are coded without it, at about twice the bytes",
            SeqKVWarning,
            stacklevel=2,
        )
    return _closed(STATIC, tokens, encode_ids(tokens))


def unpack(data: bytes, model=None) -> torch.Tensor:
    """Token ids `[T]` int64 of `pack`.

    Args:
        model: The one they were coded under, at one step a token; not used if they were coded without.

    Raises:
        ConfigError: They were coded under a model and none is given.
        FormatError: Bytes are truncated, damaged, foreign or of another version, were coded under another model, or
            the model's logits are not what they were.
        NonFiniteError: The model predicts NaN.
    """
    return _read(data, model)[0]


def restore(data: bytes, model, cache=None) -> tuple[torch.Tensor, DynamicCache]:
    """Token ids `[T]` int64 of `pack`, and the cache of all of them but the last.

    `model.generate(ids[None], ...)` goes on from there if it is passed that cache: it runs the last token itself.

    Args:
        cache: Any transformers cache for this model, empty, to fill by a prefill. None for a `DynamicCache`, which
            needs none where ids were coded under the model: the steps that read them fill it.

    Raises:
        ConfigError: The cache is not empty.
        FormatError: As `unpack`; the cache is then as it was.
        NonFiniteError: The model predicts NaN.
    """
    if cache is not None and cache.get_seq_length():
        raise ConfigError(f"the cache already holds {cache.get_seq_length()} tokens; restore into an empty one")
    ids, stepped = _read(data, model)
    if cache is None and stepped is not None:
        return ids, stepped
    cache = DynamicCache(config=model.config) if cache is None else cache
    if len(ids) > 1:
        with torch.no_grad():
            model(ids[None, :-1].to(module_device(model)), **{CACHE_NAME: cache}, logits_to_keep=1)
    return ids, cache


def _encode(tokens: list[int], model) -> bytes:
    steps = _Steps(model)
    vocabulary = len(steps.lengths)
    if tokens and max(tokens) >= vocabulary:
        raise ConfigError(f"token id {max(tokens)} is not in the model's vocabulary of {vocabulary}; pass model=None")
    starts, lengths = np.empty((2, len(tokens)), np.int64)
    for i, token in enumerate(tokens):
        if i:
            steps.read(tokens[i - 1])
        starts[i], lengths[i] = steps.lengths[:token].sum().item(), steps.lengths[token].item()
    return encode(starts, lengths)


def _decode(stream: bytes, count: int, model) -> tuple[list[int], DynamicCache]:
    """Tokens, and the cache of all but the last."""
    steps, reader, tokens = _Steps(model), IntervalReader(stream), []
    for i in range(count):
        if i:
            steps.read(tokens[-1])
        tokens.append(reader.take(steps.lengths))
    reader.close()
    return tokens, steps.cache


def _reads(data: bytes, model) -> bool:
    try:
        _read(data, model)
    except FormatError:
        return False
    return True


def _check(tokens: np.ndarray) -> int:
    return zlib.crc32(tokens.astype("<u4").tobytes())


def _closed(coder: int, tokens: np.ndarray, body: bytes) -> bytes:
    """A stored sequence of a header and this body."""
    facts = (MAGIC, VERSION, coder, len(tokens), _check(tokens))
    return _HEADER.pack(*facts, zlib.crc32(body, zlib.crc32(_HEADER.pack(*facts, 0)))) + body


def _read(data: bytes, model) -> tuple[torch.Tensor, DynamicCache | None]:
    """Ids, and the cache that was filled to read them."""
    if len(data) < _HEADER.size:
        raise FormatError(f"stored sequence of {len(data)} bytes is shorter than its {_HEADER.size}-byte header")
    *facts, crc = _HEADER.unpack_from(data)
    magic, version, coder, count, check = facts
    body = data[_HEADER.size :]
    if magic != MAGIC:
        raise FormatError(f"not a stored sequence: magic is {magic!r}, must be {MAGIC!r}")
    if version != VERSION:
        raise FormatError(f"stored sequence of format version {version}; this hf_seqkv reads {VERSION}: upgrade it")
    if zlib.crc32(body, zlib.crc32(_HEADER.pack(*facts, 0))) != crc:
        raise FormatError("checksum of the stored sequence does not match: the bytes are damaged; drop them")
    if coder == STATIC:
        tokens, cache = decode_ids(body, count), None
    elif coder == MODEL:
        tokens, cache = _decode(_for(body, model), count, model)
        tokens = np.array(tokens, np.int64)
    else:
        raise FormatError(f"stored sequence of coder {coder}; this hf_seqkv knows {STATIC} and {MODEL}: upgrade it")
    if _check(tokens) != check:
        raise FormatError(
            "checksum of the token ids does not match: the model's logits are not those they were coded under; read "
            "them with the same dtype, attention, libraries, threads and machine, or drop them"
        )
    return torch.from_numpy(tokens), cache


def _for(body: bytes, model) -> bytes:
    """The stream, of this model."""
    if model is None:
        raise ConfigError("these tokens were coded under a model; pass it as model=")
    stored, ours = body[:_FINGERPRINT], bytes.fromhex(weights_fingerprint(model))
    if stored != ours:
        raise FormatError(
            f"tokens were coded under the model with fingerprint {stored.hex()[:16]}..., this one's is "
            f"{ours.hex()[:16]}...; load the model they were coded under"
        )
    return body[_FINGERPRINT:]
