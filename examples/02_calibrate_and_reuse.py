"""Calibrate a model, save the result, and use it from the files: closer to the dense cache at the same rate.

    python examples/02_calibrate_and_reuse.py OUT_DIR TEXT_FILE [MODEL] [TOKENS]

`save_pretrained` writes the model card, too; `calibration.push_to_hub("you/model-seqkv")` shares it.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_seqkv import SeqKVCache, SeqKVCalibration, calibrate


def main(out, text_file, model_name=None, tokens="16384"):
    if model_name:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(model_name), AutoTokenizer.from_pretrained(model_name)
    else:
        from hf_seqkv.eval.smollm2 import load

        model, tokenizer, _ = load(torch.float32)
    with open(text_file, encoding="utf-8") as file:
        text = file.read()
    calibrate(model, tokenizer, [text], tokens=int(tokens)).save_pretrained(out)

    calibration = SeqKVCalibration.from_pretrained(out)
    cache = SeqKVCache(config=model.config, calibration=calibration)
    inputs = tokenizer(text[:4000], return_tensors="pt")
    # or `cache=cache` from transformers 5.24 on, which warns of the older name
    sequence = model.generate(**inputs, past_key_values=cache, max_new_tokens=32, do_sample=False)
    print(tokenizer.decode(sequence[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    print(f"{cache.get_seq_length()} tokens, {cache.bits_per_value():.2f} bits a value in pages, calibrated from {out}")


if __name__ == "__main__":
    main(*sys.argv[1:])
