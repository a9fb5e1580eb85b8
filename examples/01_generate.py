"""Generate with a compressed cache: two extra arguments, no other change.

    python examples/01_generate.py [MODEL]

MODEL is a directory or Hub repository; without one the demo's SmolLM2-135M-Instruct is used.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_seqkv  # noqa: F401  (makes "seqkv" a cache implementation)

PROMPT = "The history of computing is a history of running out of memory. " * 40 + "The lesson is that"


def load():
    if len(sys.argv) > 1:
        return AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
    from hf_seqkv.eval.smollm2 import load as load_demo_model

    return load_demo_model(torch.float32)[:2]


def main():
    model, tokenizer = load()
    inputs = tokenizer(PROMPT, return_tensors="pt")
    out = model.generate(
        **inputs,
        max_new_tokens=32,
        do_sample=False,
        cache_implementation="seqkv",
        return_dict_in_generate=True,
    )
    cache = out.past_key_values
    print(tokenizer.decode(out.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    print(f"{cache.get_seq_length()} tokens, {cache.bits_per_value():.2f} bits a value in pages")
    for part, size in cache.memory().items():
        print(f"  {part:18s} {size / 1e6:8.3f} MB")


if __name__ == "__main__":
    main()
