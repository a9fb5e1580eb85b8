"""Keep what a model has read: a store of prefixes that prompts share, a session on disk, and token ids alone.

    python examples/03_store_and_sleep.py OUT_DIR [MODEL]

The second prompt begins like the first and loads what that left in the store. The session wakes bit-identical. Token
ids are the smallest form; waking them runs the model again.
"""

import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_seqkv import PrefixStore, SeqKVCache  # makes "seqkv" a cache implementation
from hf_seqkv.integration import replay

TEXT = "The KV cache is one sequence, not a pile of unrelated vectors. " * 40


def main(out, model_name=None):
    if model_name:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(model_name), AutoTokenizer.from_pretrained(model_name)
    else:
        from hf_seqkv.eval.smollm2 import load

        model, tokenizer, _ = load(torch.float32)
    store = PrefixStore(Path(out) / "prefixes")  # or "s3://bucket/prefixes", shared by machines
    for question in ("What is it?", "What is it not?"):
        inputs = tokenizer(TEXT + question, return_tensors="pt")
        begun = time.perf_counter()
        made = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=8,
            do_sample=False,
            cache_implementation="seqkv",
            cache_config={"prefix_store": store},
            return_dict_in_generate=True,
        )
        cache, seconds = made.past_key_values, time.perf_counter() - begun
        print(f"{question} {cache.prefixes.loaded} tokens loaded, {seconds:.2f} s")
    store.flush()

    session = Path(out) / "session.seqkv"
    print(f"session of {cache.get_seq_length()} tokens: {cache.save(session)} bytes")
    woken = SeqKVCache.load(session, model)
    # or `cache=woken` from transformers 5.24 on, which warns of the older name
    more = model.generate(made.sequences, past_key_values=woken, max_new_tokens=8, do_sample=False)

    ids = replay.pack(more[0])
    _, again = replay.restore(ids, model)
    print(f"token ids alone: {len(ids)} bytes for {more.shape[1]} tokens; replayed: {again.get_seq_length()}")


if __name__ == "__main__":
    main(*sys.argv[1:])
