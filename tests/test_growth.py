"""Room for pages: where they lie in memory, and how much is reserved."""

import torch
from models import prompt, tiny

from hf_seqkv import SeqKVCache
from hf_seqkv.integration.compat import CACHE_NAME


def pages_while(model, cache, ids, steps):
    """Address and capacity of layer 0's pages after each of `steps` single tokens behind a prefill of `ids`."""
    seen = []
    with torch.no_grad():
        model(ids, **{CACHE_NAME: cache})
        for _ in range(steps):
            model(ids[:, :1], **{CACHE_NAME: cache})
            seen.append((cache.layers[0].pages.data_ptr(), cache.layers[0].pages.shape[1], cache.layers[0].counts[0]))
    return seen


def test_pages_stay_where_they_are_between_growths():
    model, ids = tiny("llama"), prompt(1, 60)[0]
    seen = pages_while(model, SeqKVCache(config=model.config, page_size=8, residual_length=8), ids, 200)
    places = list(dict.fromkeys(address for address, _, _ in seen))
    assert len(places) <= 4  # 5 pages after the prefill, doubled and doubled again
    assert [capacity for _, capacity, _ in seen] == sorted(capacity for _, capacity, _ in seen)
    assert all(count <= capacity <= 2 * count for _, capacity, count in seen)


def test_an_expected_length_bounds_the_room():
    model, ids = tiny("llama"), prompt(1, 60)[0]
    cache = SeqKVCache(config=model.config, page_size=8, residual_length=8)
    cache.expected_length = 60 + 40
    seen = pages_while(model, cache, ids, 40)
    assert len({address for address, _, _ in seen}) == 1
    assert seen[-1][1] == seen[-1][2] == (100 - 4 - 8) // 8


def test_generate_reserves_what_it_will_need():
    model, ids = tiny("llama"), prompt(1, 60)[0]
    cache = SeqKVCache(config=model.config, page_size=8, residual_length=8)
    out = model.generate(ids, **{CACHE_NAME: cache}, max_new_tokens=40, min_new_tokens=40, do_sample=False)
    assert out.shape[1] == 100
    assert cache.expected_length == 100
    assert cache.memory()["slack"] <= cache.layers[0].codec.page_bytes * len(cache.layers)
