"""What the checks of the ranks that share a model have at hand (`rank_worker.py`)."""

from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from models import LOSSLESS, SMALL, prompt
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from hf_seqkv import SeqKVCache, SeqKVCalibration
from hf_seqkv.errors import SeqKVWarning
from hf_seqkv.integration.compat import CACHE_NAME
from hf_seqkv.store.planner import Rates
from hf_seqkv.store.prefix_store import PrefixStore

RANKS, SINKS, PAGE = 2, 4, SMALL["page_size"]
PADDED = (0, 5)
MODES = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 0.8},
}


def shared(folder, plan="auto"):
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_plan=plan)).eval()


def generated(model, rows=2, cache=None, mode="greedy", tokens=8, **options):
    """Tokens after a prompt of so many rows, the second left-padded; or all that `generate` returns."""
    ids, mask = prompt(rows, 61, PADDED[:rows])
    torch.manual_seed(7)
    if cache is not None:
        options[CACHE_NAME] = cache
    return model.generate(ids, attention_mask=mask, max_new_tokens=tokens, **MODES[mode], **options)


def prefilled(model, calibration=None, **options):
    """A cache after a prompt of one row."""
    options |= {} if calibration is None else {"calibration": calibration}
    cache = SeqKVCache(config=model.config, **SMALL | options)
    with torch.no_grad():
        model(prompt(1, 61)[0], **{CACHE_NAME: cache})
    return cache


def told(cache) -> list[dict]:
    """What a cache of one row holds, layer by layer."""
    return [
        {
            "keys": layer.keys,
            "values": layer.values,
            "codes": layer.codec.section(layer.pages[0, : layer.counts[0]], "key_codes"),
            "held": [] if layer.held is None else sorted(layer.held.slots[0, : layer.held.counts[0]].tolist()),
        }
        for layer in cache.layers
    ]


class Run:
    """What the checks of one rank have at hand."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.model = shared(folder / "model")
        self.calibration = SeqKVCalibration.from_pretrained(folder / "calibration")
        self.wanted = torch.load(folder / "wanted.pt")
        self.rank = dist.get_rank()

    @contextmanager
    def store(self, name, **options):
        """A store of the ranks; nothing that was measured decides what it loads."""
        with PrefixStore(self.folder / name, **options) as store:
            store.rates = lambda: Rates({}, None)
            yield store
            dist.barrier()

    def through(self, store, options=LOSSLESS, rows=1, **more):
        """Tokens, and pages that were loaded."""
        made = generated(
            self.model,
            rows,
            cache_implementation="seqkv",
            cache_config={**options, "prefix_store": store},
            return_dict_in_generate=True,
            **more,
        )
        store.flush()
        dist.barrier()
        prefixes = made[CACHE_NAME].prefixes
        return made, prefixes.plan.load if prefixes.loaded else 0

    def entries(self, store, options=LOSSLESS) -> list[Path]:
        """Files of this rank's pages of the prompt, in turn."""
        cache = SeqKVCache(config=self.model.config, prefix_store=store, **options)
        cache.bind(self.model)
        split = cache.prefixes._split(prompt(1, 61)[0][0].tolist())
        keys = store.find(cache.prefixes.scope, split)
        return [next((Path(store.url) / "objects").glob(f"*/{key.hex()}")) for key in keys]


def warned(expected, words):
    """Warnings are given that say this, or none."""
    return pytest.warns(SeqKVWarning, match=words) if expected else nullcontext()


def assert_like_one_process(run, cache, wanted, whole=False):
    """A rank's heads hold what those of one process do, but for the rounding of split sums."""
    for layer, mine, theirs in zip(cache.layers, told(cache), wanted, strict=True):
        heads = theirs["keys"].shape[1]
        at = slice(None) if whole else slice(run.rank * heads // RANKS, (run.rank + 1) * heads // RANKS)
        for name in ("keys", "values"):
            assert mine[name].shape == theirs[name][:, at].shape
            assert (mine[name] - theirs[name][:, at]).norm() < 5e-3 * theirs[name][:, at].norm(), name
        assert mine["held"] == theirs["held"]
        widths = layer.codec.key.widths
        if len(widths.unique()) == 1:  # codes of a head are one run of bytes
            own, codes = (x.unflatten(1, (-1, widths[0].sum() * PAGE // 8)) for x in (mine["codes"], theirs["codes"]))
            assert (own == codes[:, at]).float().mean() > 0.99
