"""Models that are more than a decoder of equal layers: images before it, layers of several shapes, an encoder."""

import pytest
import torch
from models import CONFIGS, LOSSLESS, SMALL, prompt
from transformers import AutoModelForCausalLM

from hf_seqkv import SeqKVCache, calibrate
from hf_seqkv.errors import CalibrationMismatchError, UnsupportedModelError
from hf_seqkv.integration.compat import CACHE_NAME
from hf_seqkv.integration.model_facts import model_facts

OURS = {"cache_implementation": "seqkv", "cache_config": LOSSLESS}
NEW = {"max_new_tokens": 40, "do_sample": False}


def llava():
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    eye = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**eye, image_size=16, patch_size=4, projection_dim=32)
    config = LlavaConfig(
        vision_config=vision, text_config=CONFIGS["llama"](), image_token_index=130, vision_feature_layer=-1
    )
    ids = prompt(1, 40)[0].clamp_max(120)
    ids[:, 5:21] = 130
    return LlavaForConditionalGeneration(config), {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16)}


def gemma3():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, SiglipVisionConfig

    eye = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = SiglipVisionConfig(**eye, image_size=16, patch_size=4)
    config = Gemma3Config(
        text_config=CONFIGS["gemma3"](), vision_config=vision, mm_tokens_per_image=4, image_token_index=130
    )
    ids = prompt(1, 40)[0].clamp_max(120)
    ids[:, 5:9] = 130
    model = Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # zeros in a new model
    images = {"pixel_values": torch.randn(1, 3, 16, 16), "token_type_ids": (ids == 130).int()}
    return model, {"input_ids": ids, **images}


def qwen2_vl():
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    text = CONFIGS["qwen2"]().to_dict() | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    }
    config = Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=130, video_token_id=129, vision_start_token_id=128
    )
    ids = prompt(1, 40)[0].clamp_max(120)
    ids[:, 4], ids[:, 5:9] = 128, 130
    images = {"pixel_values": torch.randn(16, 96), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    return Qwen2VLForConditionalGeneration(config), {
        "input_ids": ids,
        **images,
        "mm_token_type_ids": (ids == 130).int(),
    }


@pytest.mark.parametrize("build", [llava, gemma3, qwen2_vl])
def test_images(build):
    """Through the text decoder, lossless; and with codes, constant parts of keys found behind RoPE of several axes."""
    torch.manual_seed(0)
    model, inputs = build()
    model.eval()
    with torch.no_grad():
        for parameter in model.model.language_model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10)  # scores that differ
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    asked = {"output_logits": True, "return_dict_in_generate": True}
    plain, ours = (model.generate(**inputs, **NEW, **asked, **cache) for cache in ({}, OURS))
    assert torch.equal(plain.sequences, ours.sequences)
    expected, found = (torch.stack(out.logits) for out in (plain, ours))
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)
    other = model.generate(**inputs | {"pixel_values": -inputs["pixel_values"]}, **NEW, **asked, **OURS)
    assert (torch.stack(other.logits)[0] - found[0]).abs().max() > 0.01  # the image is seen
    coded = model.generate(**inputs, **NEW, **asked, **OURS | {"cache_config": SMALL})[CACHE_NAME]
    assert all(layer.mean.abs().sum() > 0 for layer in coded.layers)
    assert all(coded.table(index).half == 8 for index in range(len(coded.layers)))
    assert coded.ids is None  # what they leave in the cache is no function of them


def numbers(text, **options):
    return {"input_ids": [int(word) % 128 + 3 for word in text.split()]}


numbers.bos_token_id = 1


def test_layers_of_several_shapes(tmp_path):
    """Gemma 4's layers of full attention have wider heads: such numbers are read by layer, or transformers raises."""
    from transformers import Gemma4TextConfig

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 32, "sliding_window": 24}
    sizes |= {"vocab_size": 131, "vocab_size_per_layer_input": 131, "hidden_size_per_layer_input": 8}
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    model = AutoModelForCausalLM.from_config(Gemma4TextConfig(**sizes, layer_types=kinds, eos_token_id=None)).eval()
    facts = model_facts(model.config)
    assert (facts["head_dim"], facts["num_key_value_heads"]) == ([16, 16, 32], 2)
    text = " ".join(str(i * i % 131 + i % 7) for i in range(800))
    made = calibrate(model, numbers, [text], tokens=512, window=128, sequence=False, progress=False)
    ids, ours = prompt(1, 60)[0], {"cache_implementation": "seqkv", "return_dict_in_generate": True}
    coded = model.generate(ids, **NEW, **ours, cache_config=SMALL | {"calibration": made})[CACHE_NAME]
    assert [layer.codec.key_dim for layer in coded.layers] == [16, 16, 32]
    plain = model.generate(ids, **NEW)
    for loaded in (False, True):
        out = model.generate(ids, **NEW, **ours, cache_config=LOSSLESS | {"prefix_store": str(tmp_path)})
        assert torch.equal(out.sequences, plain)
        assert (out[CACHE_NAME].prefixes.plan.load > 0) == loaded
        out[CACHE_NAME].prefixes.store.flush()
    with pytest.raises(CalibrationMismatchError, match=r"head_dim: calibration \[16, 16, 32\], model 16"):
        SeqKVCache(config=CONFIGS["gemma3"](), calibration=made, **SMALL)


def test_encoder_decoders_are_refused_by_name():
    """Their memory is the encoder's side, written once, which is no sequence that grows."""
    from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "vocab_size": 40, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    t5 = T5ForConditionalGeneration(T5Config(**sizes, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    layers = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    bart = BartForConditionalGeneration(
        BartConfig(**sizes, **layers, encoder_ffn_dim=16, decoder_ffn_dim=16, bos_token_id=2, forced_eos_token_id=None)
    )
    for model in (t5, bart):
        with pytest.raises(UnsupportedModelError, match=r"encoder-decoder model.*Use the default cache"):
            SeqKVCache(config=model.config)
        with pytest.raises(UnsupportedModelError, match="leave cache_implementation out for this model"):
            model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=3, **OURS)
        model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=3)
