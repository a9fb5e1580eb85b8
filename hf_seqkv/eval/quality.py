"""How close caches stay to dense on real text: methods by name, windows of text, one run for all of them.

Every method is the real cache, with the same dense tokens beside its pages, on the same windows; see `perplexity.py`
for what is measured. A method is a row of `METHODS`: how its cache is made, and what says its bits a value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from tqdm.auto import tqdm
from transformers import DynamicCache

from ..calibration.artifact import SeqKVCalibration
from ..calibration.overlap import LENGTH, TENSOR, overlap, shingles
from ..config import SeqKVConfig
from ..errors import ConfigError
from ..integration.cache import SeqKVCache
from ..integration.codecs import calibration_of
from ..integration.sequence_cache import SequenceCache
from .peers import PEERS, PeerCache
from .perplexity import lockstep, pooled

MOST_SHARED = 0.01  # of a text's shingles in a calibration's texts: stock phrases, not passages


@dataclass(frozen=True)
class Plan:
    """What is run, and which tokens stay dense; the same for every method.

    Args:
        windows: Windows a text.
        window: Tokens a window, the tokenizer's first token (BOS) included where it has one.
        prefill: Tokens of the first forward; those after it are scored.
        n_sink, residual_length, page_size: As in `SeqKVConfig`.

    Raises:
        ConfigError: No tokens to score, or windows too short for a page.
    """

    windows: int = 2
    window: int = 2048
    prefill: int = 256
    n_sink: int = 4
    residual_length: int = 64
    page_size: int = 64

    def __post_init__(self):
        SeqKVConfig(**self.kept)
        if not 0 < self.prefill <= self.window - 2:
            raise ConfigError(
                f"a prefill of {self.prefill} tokens leaves less than 2 of a window's {self.window} to score; ask for "
                "fewer, or for a longer window"
            )
        need = sum(self.kept.values()) + 1
        if self.window < need:
            raise ConfigError(
                f"a window of {self.window} tokens holds no page: {self.n_sink} sinks, {self.residual_length} recent "
                f"tokens, a page of {self.page_size} and the last token, which is only predicted, need {need}"
            )

    @property
    def kept(self) -> dict[str, int]:
        """Options of the cache."""
        return {name: getattr(self, name) for name in ("n_sink", "residual_length", "page_size")}


@dataclass(frozen=True)
class Method:
    """A way to keep keys and values.

    Args:
        make: From the model's config and `Plan.kept`: an empty cache with `memory()`, and a function that says its bits
            a value once it is full, all bytes of compressed tokens counted.
        calibration: What it uses that was fitted on texts.
    """

    make: Callable[[object, dict], tuple[SeqKVCache, Callable[[], float]]]
    calibration: SeqKVCalibration | None = None


def seqkv(**options) -> Method:
    """This cache, with fields of `SeqKVConfig`.

    Raises:
        ConfigError: An option is invalid, or one that all methods share.
        CalibrationNotFoundError, FormatError: See `SeqKVCalibration`.
    """
    shared = sorted(set(options) & set(Plan().kept))
    if shared:
        raise ConfigError(f"{', '.join(shared)}: the same for every method; set it for all of them")
    if "calibration" in options:
        options = options | {"calibration": calibration_of(options["calibration"])}
    SeqKVConfig.from_dict(options)

    def make(config, kept):
        cache = SeqKVCache(config=config, **options, **kept)
        return cache, cache.bits_per_value

    return Method(make, options.get("calibration"))


def sequence(calibration: SeqKVCalibration, profile: str = "full", step: int | str = 0, **options) -> Method:
    """A calibration's sequence codec, its decoded tokens in dense pages; `options` of `SequenceCache`.

    Raises:
        ConfigError: The calibration has no such codec.
    """
    calibration.sequence_codec(profile, step)

    def make(config, kept):
        cache = SequenceCache(config, calibration, profile, step, **options, **kept)
        return cache, cache.stored_bits_per_value

    return Method(make, calibration)


def _published(bits: int) -> Method:
    options = SeqKVConfig.published_turboquant(bits).to_dict()
    return seqkv(**{name: value for name, value in options.items() if name not in Plan().kept})


def _peer(name: str) -> Method:
    def make(config, kept):
        cache = PeerCache(config, name, **kept)
        return cache, cache.bits_per_value

    return Method(make)


METHODS: dict[str, Method] = {
    **{f"turboquant-{bits}": _published(bits) for bits in (2, 3, 4)},
    "default": seqkv(),
    **{name: _peer(name) for name in PEERS},
}


def cut(text: str, ids: list[int], first: list[int], count: int, length: int) -> torch.Tensor:
    """Windows that do not overlap, in the middles of `count` equal parts of a text.

    Args:
        text: Its name, for a message.
        ids: Its tokens.
        first: Tokens that every window begins with.

    Returns:
        `[count, length]` int64.

    Raises:
        ConfigError: The text is too short.
    """
    body = length - len(first)
    if len(ids) < count * body:
        raise ConfigError(
            f"{text} has {len(ids)} tokens, {count} windows need {count * body}; give a longer text, or ask for fewer "
            "or shorter windows"
        )
    parts = [(i * len(ids) // count, (i + 1) * len(ids) // count) for i in range(count)]
    begins = [begin + (end - begin - body) // 2 for begin, end in parts]
    return torch.tensor([first + ids[at : at + body] for at in begins])


def check_overlap(name: str, method: Method, text: str, ids: list[int], windows: torch.Tensor) -> str | None:
    """See that a method was not fitted on a text it is to be judged on.

    Returns:
        A line to show where that cannot be known, else None.

    Raises:
        ConfigError: The calibration's texts hold more than `MOST_SHARED` of the text or of its windows.
    """
    if method.calibration is None:
        return None
    known = method.calibration.tensors.get(TENSOR)
    if known is None:
        return f"{name}: {method.calibration.source} does not say what it was fitted on; it may have seen these texts"
    seen = torch.cat([shingles(window) for window in windows]).unique()
    share = max(overlap(known, shingles(ids)), overlap(known, seen))
    if share > MOST_SHARED:
        raise ConfigError(
            f"{name}: {method.calibration.source} was fitted on {share:.1%} of {text} (sampled runs of {LENGTH} "
            f"tokens), at most {MOST_SHARED:.0%} may be shared; measure on another text, or calibrate without this one"
        )
    return None


def measure(model, tokenizer, texts: dict[str, str], methods: dict[str, Method], plan: Plan, progress=True) -> dict:
    """Every method on every window of every text.

    Args:
        model: A transformers causal LM.
        texts: By name.

    Returns:
        JSON types: `plan`, `notes`, `dense_bytes` (of the dense cache, a window), and for each of `texts` and for
        `all` of them, by method: `Quality`'s fields, `bits_per_value` and `memory` (bytes by part, see
        `SeqKVCache.memory`), means over the windows as they end.

    Raises:
        ConfigError: A text that is too short or was calibrated on, or windows longer than the model's context.
    """
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and plan.window > limit:
        raise ConfigError(f"windows of {plan.window} tokens exceed the model's {limit}; ask for shorter ones")
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    windows, notes = {}, []
    for text, content in texts.items():
        ids = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"]
        windows[text] = cut(text, ids, first, plan.windows, plan.window)
        found = (check_overlap(name, method, text, ids, windows[text]) for name, method in methods.items())
        notes += [note for note in found if note is not None and note not in notes]
    runs: dict[str, list[dict]] = {text: [] for text in texts}
    total = len(texts) * plan.windows * (plan.window - 1) * (len(methods) + 1)
    with tqdm(total=total, unit="token", disable=not progress, leave=False) as bar:
        for text, rows in windows.items():
            bar.set_description(text)
            for row in rows:
                dense = DynamicCache(config=model.config)
                made = {name: method.make(model.config, plan.kept) for name, method in methods.items()}
                caches = {name: cache for name, (cache, _) in made.items()}
                scores = lockstep(model, row[None].to(model.device), dense, caches, plan.prefill, bar.update)
                runs[text].append(
                    {name: (scores[name], bits(), cache.memory()) for name, (cache, bits) in made.items()}
                )
    return {
        "plan": asdict(plan),
        "notes": notes,
        "dense_bytes": sum(
            x.nbytes for layer in dense.layers for x in vars(layer).values() if isinstance(x, torch.Tensor)
        ),
        "texts": {text: _summary(found) for text, found in runs.items()},
        "all": _summary([window for found in runs.values() for window in found]),
    }


def _summary(windows: list[dict]) -> dict[str, dict]:
    """By method, over windows of `(scores, bits a value, memory)` by method."""
    result = {}
    for name in windows[0]:
        scores, bits, memory = zip(*(window[name] for window in windows), strict=True)
        mean = {part: sum(held[part] for held in memory) / len(memory) for part in memory[0]}
        result[name] = {"bits_per_value": sum(bits) / len(bits), "memory": mean, **pooled(list(scores)).to_dict()}
    return result
