"""What holds for one architecture: its tiny model with this cache and with transformers' own."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
from architecture_models import VOCABULARY, build
from models import LOSSLESS, SMALL, prompt
from transformers import DynamicCache

from hf_seqkv import SeqKVCache
from hf_seqkv.errors import SeqKVWarning, UnsupportedModelError
from hf_seqkv.integration import attention, handle
from hf_seqkv.integration.compat import CACHE_NAME
from hf_seqkv.integration.direct import Arranged
from hf_seqkv.integration.handle import Handle
from hf_seqkv.integration.latent import Expanded
from hf_seqkv.integration.layer import SeqKVLayer

OURS = {"cache_implementation": "seqkv", "cache_config": LOSSLESS}
MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "lookup": {"prompt_lookup_num_tokens": 6},
    "chunks": {"prefill_chunk_size": 17},
    "turns": {"max_new_tokens": 12},
    "padding": {},
}
CLOSE = 1e-4  # scores where tokens part
ERROR = 0.1  # of teacher-forced logits with 8 bits; a wrong mask or position gives about 1
CONTEXT = 0.02  # change of the logits that other first tokens must make, or the model can show nothing


@dataclass
class Report:
    """What was found for one type.

    Args:
        not_built: Why no model could be made, or "".
        unsupported: Why nothing of it can be coded, or what transformers itself fails with, or "".
        coded, uncompressed: Layers with pages; those that keep something else, by class.
        modes: By name "same", "close", "n/a: ..." or "failed: ...".
        error: Relative error of the logits with pages of 8 bits, None where there are none.
        refused: Why there are none, or "".
        attended, rebuilt, multiplied: Calls of attention on codes; dense tensors rebuilt from codes; products with such
            tensors, of which a part is rebuilt at a time.
        reasons: Why they were rebuilt.
        context: Relative change of the logits by other first tokens.
        crash: Error of the check itself, or "".
    """

    name: str
    not_built: str = ""
    unsupported: str = ""
    coded: int = 0
    uncompressed: dict[str, int] = field(default_factory=dict)
    modes: dict[str, str] = field(default_factory=dict)
    error: float | None = None
    refused: str = ""
    attended: int = 0
    rebuilt: int = 0
    multiplied: int = 0
    reasons: list[str] = field(default_factory=list)
    context: float = 0.0
    crash: str = ""

    @property
    def attention(self) -> str:
        """What steps read: codes, `"fused"`; dense tensors, `"rebuilt"` or `"in parts"`; both, `"partly fused"`."""
        if self.not_built:
            return "not built"
        if self.unsupported:
            return "n/a"
        if self.attended:
            return "partly fused" if self.rebuilt or self.multiplied else "fused"
        return "rebuilt" if self.rebuilt else "in parts" if self.multiplied else "unknown"

    def failures(self) -> list[str]:
        """Everything that is wrong; nothing for a type that passes or is not applicable."""
        found = [f"{mode} {result}" for mode, result in self.modes.items() if result.startswith("failed")]
        if self.crash:
            found.append(f"crashed: {self.crash}")
        if self.error is not None and not 0 < self.error < ERROR:
            found.append(f"8 bits change the logits by {self.error:.3g}, which is not between 0 and {ERROR}")
        if self.modes and self.context < CONTEXT:
            found.append(f"other first tokens change its logits by {self.context:.2g}: it shows nothing")
        return found


def check(name: str) -> Report:
    """Build the model of a type and try everything with it; never raises."""
    report = Report(name)
    attention._say_why.cache_clear()
    handle._SAID.clear()
    with warnings.catch_warnings(record=True) as told, contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("always")
        try:
            model = build(name)
        except Exception as error:
            report.not_built = _said(error)
            return report
        try:
            _check(model, report)
        except UnsupportedModelError as error:
            report.unsupported = _said(error).removeprefix("UnsupportedModelError: ")
        except Exception as error:
            report.crash = _said(error)
    for warning in told:
        why = re.search("runs on rebuilt dense keys and values: (.*)[.] Correct", str(warning.message))
        if why and issubclass(warning.category, SeqKVWarning):
            report.reasons.insert(0, why[1])
    report.reasons = list(dict.fromkeys(report.reasons))
    return report


def _check(model, report: Report) -> None:
    try:
        plain = _generate(model, "greedy", {})
    except Exception as error:
        raise UnsupportedModelError(f"transformers' own generate fails: {_said(error)}") from error
    with _counted(report):
        ours = _generate(model, "greedy", OURS)
    cache = ours.get(CACHE_NAME)
    if not isinstance(cache, SeqKVCache):
        raise UnsupportedModelError(f"its own generate makes a {type(cache).__name__}, whatever is asked for")
    report.coded = sum(isinstance(layer, SeqKVLayer) and layer.length > 0 for layer in cache.layers)
    if not report.coded:
        raise UnsupportedModelError("the model leaves its cache empty")
    others = (type(layer).__name__ for layer in cache.layers if not isinstance(layer, SeqKVLayer))
    report.uncompressed = {name: count for name, count in Counter(others).items() if name != "DummyLayer"}
    report.context = _context(model)
    report.modes["greedy"] = _compare(plain, ours)
    for mode in list(MODES)[1:]:
        try:
            plain = _generate(model, mode, {})
        except Exception as error:
            report.modes[mode] = f"n/a: {_said(error)}"
            continue
        try:
            report.modes[mode] = _compare(plain, _generate(model, mode, OURS))
        except Exception as error:
            report.modes[mode] = f"failed: {_said(error)}"
        if mode == "padding" and report.modes[mode].startswith("failed"):
            other = _generate(model, mode, {}, pad=7)
            if not torch.equal(plain.sequences[:, 45:], other.sequences[:, 45:]):
                report.modes[mode] = "n/a: with DynamicCache too the tokens depend on what the padding holds"
    _eight_bits(model, report)


def _eight_bits(model, report: Report) -> None:
    for widths in ([1, 4] * 10, [1] * 20):  # some models take one token a step only
        try:
            dense = _logits(model, DynamicCache(config=model.config), widths)
            break
        except Exception as error:
            report.refused = f"steps fail with DynamicCache too: {_said(error)}"
    else:
        return
    try:
        report.refused, coded = "", SeqKVCache(config=model.config, key_bits=8, value_bits=8, **SMALL)
    except UnsupportedModelError as error:
        report.refused = str(error)
        return
    with _counted(report):
        report.error = _relative(_logits(model, coded, widths), dense)


def _said(error: Exception) -> str:
    """Type and message of an error, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _generate(model, mode: str, cache: dict, pad: int = 0):
    """Output of `generate` for one mode, with the options that choose the cache; `pad` is the token of padding."""
    ids, mask = prompt(3, 45, pads=(0, 29, 7)) if mode == "padding" else prompt()
    if mode == "lookup":
        ids = torch.cat([ids, ids[:, :20], ids[:, 5:25]], 1)  # repeats itself: candidates, right and wrong
        mask = torch.ones_like(ids)
    ids = ids.masked_fill(mask == 0, pad)
    options = {"do_sample": False, "max_new_tokens": 24, "output_scores": True, "return_dict_in_generate": True}
    options |= MODES[mode]
    out = model.generate(ids, attention_mask=mask, **options, **cache)
    if mode == "turns":
        for extra in (ids[:, :11], ids[:, 20:21]):
            turn = torch.cat([out.sequences, extra], 1)
            given = {"attention_mask": torch.ones_like(turn), CACHE_NAME: out.get(CACHE_NAME)}
            out = model.generate(turn, **given, **options)
    return out


def _compare(plain, ours) -> str:
    """`"same"` tokens; `"close"`: where they part, the same scores to `CLOSE`, so that either is right; or failed."""
    same = plain.sequences == ours.sequences
    if same.all():
        return "same"
    if getattr(plain, "sequences_scores", None) is not None:  # of whole beams
        apart = (plain.sequences_scores - ours.sequences_scores).abs().max().item()
        return "close" if apart <= CLOSE else f"failed: scores of beams differ by {apart:.3g}"
    before = plain.sequences.shape[1] - len(plain.scores)
    for row in (~same.all(1)).nonzero()[:, 0].tolist():
        at = same[row].int().argmin().item()
        if at < before:
            return f"failed: token {at} of row {row} differs"
        apart = (plain.scores[at - before][row] - ours.scores[at - before][row]).abs().max().item()
        if apart > CLOSE:
            return f"failed: token {at} of row {row} differs, its scores by {apart:.3g}"
    return "close"


def _logits(model, cache, widths: list[int]) -> torch.Tensor:
    """Teacher-forced over a cache after 40 tokens, in steps of several widths, `[2, sum(widths), V]`."""
    ids, parts = prompt(2, 40 + sum(widths))[0], []
    with torch.no_grad():
        model(ids[:, :40], **{CACHE_NAME: cache}, use_cache=True)
        for part in ids[:, 40:].split(widths, 1):
            parts.append(model(part, **{CACHE_NAME: cache}, use_cache=True).logits)
    return torch.cat(parts, 1)


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def _context(model) -> float:
    """How much the last 20 logits of 60 tokens depend on the first 20 tokens."""
    ids, _ = prompt(1, 60)
    other = torch.cat([ids[:, :20].sub(3).add(64).remainder(VOCABULARY - 3).add(3), ids[:, 20:]], 1)
    with torch.no_grad():
        return _relative(*(model(x).logits[:, -20:] for x in (other, ids)))


@contextlib.contextmanager
def _counted(report: Report):
    """Count how steps read a handle, and name the functions of transformers that read it as a dense tensor."""
    materialize, products = Handle.materialize, Arranged.products

    def counted(attend):
        def counted_attend(self, *args):
            report.attended += 1
            return attend(self, *args)

        return counted_attend

    def counted_materialize(self, *span):
        if span in ((), (0, None)):
            report.rebuilt += 1
            report.reasons.append(_reader(sys._getframe(1)))
        return materialize(self, *span)

    def counted_products(self, *args):
        report.multiplied += 1
        report.reasons.append(_reader(sys._getframe(1)))
        return products(self, *args)

    with (
        mock.patch.object(Handle, "attend", counted(Handle.attend)),
        mock.patch.object(Expanded, "attend", counted(Expanded.attend)),
        mock.patch.object(Handle, "materialize", counted_materialize),
        mock.patch.object(Arranged, "products", counted_products),
    ):
        yield


def _reader(frame) -> str:
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if "transformers" in path.parts:
            return f"read by {path.stem}.{frame.f_code.co_name}"
        frame = frame.f_back
    return "read by something else"
