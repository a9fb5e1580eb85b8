"""Run a model over texts and gather what a calibration is fitted to.

For the hot pages keys are centred as a cache centres them, by the mean of the window's first page before RoPE; running
sums and a small sample are kept. For the sequence codec keys are taken before RoPE, with gradients; a sample of whole
pages, bounded by the tokens asked for, is kept in memory and never written anywhere.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from tqdm.auto import tqdm

from ..calibration.artifact import SIDES
from ..calibration.fit import Moments
from ..calibration.sensitivity import Sensitivity
from ..calibration.sequence_fit import Sample
from ..codec.center import rotate
from ..errors import ConfigError, SeqKVWarning, UnsupportedModelError
from .cache import SeqKVCache
from .latent import refuse_calibration
from .shards import shard_of
from .tap import Tap, embed, run_window

SINKS = 4  # first tokens of a window: kept dense by a cache, and unlike all others
SAMPLES = 2048  # vectors a layer kept for the codebooks


def token_windows(tokenizer, texts: list[str], tokens: int, window: int, seed: int) -> torch.Tensor:
    """Windows of token ids, `[N, window]`, drawn without overlap from all texts.

    Raises:
        ConfigError: The texts hold less than one window.
    """
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    body = window - len(first)
    if len(ids) < body:
        raise ConfigError(f"the texts hold {len(ids)} tokens, a calibration window needs {body}; give more text")
    order = torch.randperm(len(ids) // body, generator=torch.Generator().manual_seed(seed))
    starts = order[: max(1, tokens // window)].sort().values
    if len(starts) * window < tokens:
        warnings.warn(
            f"the texts hold {len(ids)} tokens, {tokens} were asked for; more text makes a better calibration",
            SeqKVWarning,
            stacklevel=2,
        )
    return torch.tensor([first + ids[at * body : (at + 1) * body] for at in starts.tolist()])


class Gathered:
    """Statistics of all windows so far, by layer.

    Args:
        sliding: Tokens that a query of each layer sees, itself included; None for all.
        windows: Token ids, `[N, T]`, of all windows that will be added.
        bits: Of keys and of values in hot pages.
    """

    def __init__(self, sliding: list[int | None], page: int, windows: torch.Tensor, bits: tuple[float, float]):
        self.page, self.windows, self.keep_vectors = page, windows, -(-SAMPLES // len(windows))
        self.sliding, layers = sliding, len(sliding)
        self.sides: dict[tuple[int, str], Moments] = {}
        self.layouts: list[list] = [[0, False]] * layers
        self.sensitivities = [Sensitivity(bits) for _ in range(layers)]
        self.pages: list[list[list[torch.Tensor]]] = [[[], []] for _ in range(layers)]
        self.embedded: list[torch.Tensor] = []
        self.rows: list[
            torch.Tensor
        ] = []  # of each layer, those of a window's pages, `[n, P, 2 * half]`: all are alike

    def add(self, taps: list[Tap], first: int) -> None:
        """Take a window; `first` is the length of its first part."""
        for index, tap in enumerate(taps):
            self.layouts[index] = [tap.rows.shape[1] // 2, tap.interleaved]
            for side, x in zip(SIDES, (_centred(tap, self.page), tap.values), strict=True):
                if (index, side) not in self.sides:
                    self.sides[index, side] = Moments(x.shape[0], x.shape[2], SAMPLES, x.device)
                self.sides[index, side].add(x[:, SINKS:], self.keep_vectors)
            if tap.gradients is None:
                continue
            # Tokens near the second part are dense when it attends to them.
            total, count = tap.keys.shape[1], tap.gradients[0].shape[1]
            window = self.sliding[index] or total
            margin = min(self.page, window // 2)
            begin, end = max(SINKS, first - count), first - margin
            at = slice(begin - first + count, end - first + count)
            x = [t[:, begin:end].transpose(0, 1) for t in (tap.plain_keys(), tap.values)]
            gradients = [t[:, at].transpose(0, 1) for t in tap.plain_gradients(first)]
            positions = torch.arange(begin, end, device=x[0].device)
            queries = ((positions + window).clamp(max=total) - first).clamp_min(0)
            self.sensitivities[index].add(x, gradients, positions, queries, min(end - begin, window - margin))

    def keep(self, taps: list[Tap], embedded: torch.Tensor) -> None:
        """Keep a window's whole pages, and its tokens' embeddings `[T, d]`."""
        count = (len(embedded) - SINKS) // self.page
        span = slice(SINKS, SINKS + count * self.page)
        self.rows = self.rows or [tap.rows[span].unflatten(0, (count, self.page)).cpu() for tap in taps]
        for tap, kept in zip(taps, self.pages, strict=True):
            for pages, x in zip(kept, (tap.plain_keys(), tap.values), strict=True):
                pages.append(x[:, span].unflatten(1, (count, self.page)).transpose(0, 1).to("cpu", torch.float16))
        self.embedded.append(embedded[span].unflatten(0, (count, self.page)))

    def sample(self) -> Sample:
        counts = [len(x) for x in self.embedded]
        positions = [SINKS + torch.arange(n * self.page).unflatten(0, (n, self.page)) for n in counts]
        keys, values = ([torch.cat(kept[i]) for kept in self.pages] for i in range(2))
        return Sample(keys, values, torch.cat(self.embedded), torch.cat(positions))


def _centred(tap: Tap, page: int) -> torch.Tensor:
    """Keys without their constant part, the mean of the first page before RoPE; `[H, T, D]` fp32."""
    plain = tap.plain_keys()
    mean = plain[:, SINKS : SINKS + page].mean(1, keepdim=True)
    return tap.keys - rotate(mean, tap.rows, tap.interleaved)


def gather(
    model,
    windows: torch.Tensor,
    bits: tuple[float, float],
    gradients: bool,
    seed: int,
    progress: bool,
    plain: bool = True,
) -> Gathered:
    """Run windows of token ids `[N, T]`.

    Args:
        bits: Of keys and of values in hot pages.
        gradients: Whether to take what the sequence codec and held tokens need.
        seed: Of the labels that losses are taken of.
        plain: Whether keys are turned back to what they were before RoPE.

    Raises:
        ConfigError: Windows too short for gradients.
        UnsupportedModelError: A model whose layers cannot be coded, or one that several processes share.
    """
    ranks = shard_of(model).ranks
    if ranks > 1:
        raise UnsupportedModelError(
            f"{ranks} processes share this model (tensor parallelism), each sees some of its KV heads; calibrate it "
            "in one process (device_map='auto' spreads it over devices): any number of ranks can use the calibration"
        )
    config = model.config.get_text_config(decoder=True)
    probe = SeqKVCache(config=config, method="turboquant")  # refuses what cannot be coded
    if probe.latent_shapes:
        refuse_calibration(config.model_type)
    coded = [layer.index for layer in probe._coded()]
    if len(coded) != config.num_hidden_layers:
        raise UnsupportedModelError(
            f"{config.model_type}: {len(coded)} of {config.num_hidden_layers} layers keep keys and values; "
            "calibration needs all. Use method='turboquant'"
        )
    first, page = windows.shape[1] // 2, probe.seqkv_config.page_size
    if gradients and first < SINKS + 2 * page:
        raise ConfigError(
            f"windows of {2 * first} tokens are too short for gradients, which need {2 * (SINKS + 2 * page)}: ask for "
            "longer windows, or calibrate without the sequence codec"
        )
    gathered = Gathered([probe.layers[index].sliding_window for index in coded], page, windows, bits)
    generator = torch.Generator().manual_seed(seed) if gradients else None
    for ids in tqdm(windows, desc="calibrate: run", unit="window", disable=not progress):
        taps = run_window(model, ids, coded, first, generator)
        if not plain:
            taps = [replace(tap, rows=tap.rows[:, :0]) for tap in taps]
        gathered.add(taps, first)
        if gradients:
            gathered.keep(taps, embed(model, ids))
    return gathered
