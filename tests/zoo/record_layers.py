"""Record what tiny models of Hugging Face transformers hand to their masks and layers, and what eager attention makes
of it. Run it in an environment with PyTorch 2.13 and transformers 4.57.1, and in one with 5.24.0:

    python record_layers.py FOLDER

It writes FOLDER/zoo_VERSION.npz, which tests/test_zoo_layers.py reads from tests/reference.
"""
import inspect
import json
import os
import sys

import numpy as np
import torch
import transformers
from transformers import masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

W, N = 4, 14
PARTS = {"name": "recorder", "calls": [], "arrays": {}, "masks": {}}
KEPT = ("batch_size", "kv_length", "kv_offset", "q_length", "q_offset", "allow_is_causal_skip",
        "allow_is_bidirectional_skip", "local_size", "use_vmap")


def keep(array):
    """Keep the values of an array; return where they are among those of its dtype, and its shape."""
    array = array.detach().numpy() if isinstance(array, torch.Tensor) else array
    array = array.astype(dict(f="float32", i="int32", b="uint8", u="uint8")[array.dtype.kind])
    parts = PARTS["arrays"].setdefault(str(array.dtype), [])
    start = sum(part.size for part in parts)
    parts.append(array.reshape(-1))
    return [str(array.dtype), start, list(array.shape)]


def mask(**options):
    """The entry of the table of masks: eager's mask, and the mask function at all pairs of positions."""
    made = masking_utils.eager_mask(**options)
    end = options["kv_offset"] + options["kv_length"]
    first = options["cache_position"] if "cache_position" in options else options["q_offset"] + torch.arange(
        options["q_length"])
    rows, queries, keys = torch.meshgrid(torch.arange(options["batch_size"]), torch.arange(max(end, first[-1] + 1)),
                                         torch.arange(end), indexing="ij")
    shown = options["mask_function"](rows, rows * 0, queries, keys)
    kept = {name: int(options[name]) for name in KEPT if options.get(name) is not None}
    kept["shown"] = keep(np.packbits(torch.broadcast_to(shown, rows.shape).numpy(), axis=-1))
    kept["shape"] = list(rows.shape)
    for name in ("cache_position", "attention_mask"):
        if options.get(name) is not None:
            kept[name] = keep(options[name])
    PARTS["masks"][id(made)] = made, kept
    return made


def attention(module, query, key, value, attention_mask, **options):
    """The entry of the table of attentions: the model's own eager attention."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    out, weights = eager(module, query, key, value, attention_mask, **options)
    call = dict(case=PARTS["case"], q=keep(query), k=keep(key), v=keep(value), out=keep(out), numbers={})
    if attention_mask is not None:
        known = PARTS["masks"].get(id(attention_mask))
        call.update(dict(made=known[1]) if known else dict(mask=keep(attention_mask)))
    for name, given in options.items():
        if isinstance(given, torch.Tensor) and name in ("s_aux", "position_bias", "sinks", "position_ids"):
            call[name] = keep(given)
        elif isinstance(given, (int, float, bool)) or given is None:
            call["numbers"][name] = given
    fields = {name: getattr(module, name) for name in ("layer_idx", "is_causal", "sliding_window")
              if isinstance(getattr(module, name, ()), (int, type(None)))}
    config = module.config
    settings = {name: getattr(config, name) for name in ("sliding_window", "layer_types", "attention_chunk_size")
                if hasattr(config, name)}
    PARTS["calls"].append(dict(call, fields=fields, config=settings))
    return out, weights


def tiny(name, **settings):
    common = dict(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
                  num_key_value_heads=1, head_dim=4, sliding_window=W, max_position_embeddings=64, pad_token_id=0,
                  bos_token_id=1, eos_token_id=2)
    return getattr(transformers, name)(**dict(common, **settings))


def model(name, config, cls):
    PARTS["case"] = name
    torch.manual_seed(0)
    made = getattr(transformers, cls)(config).eval()
    for one in made.parameters():
        if one.dim() >= 2:
            torch.nn.init.normal_(one, std=.5)
    made.set_attn_implementation(PARTS["name"])
    return made


IDS = torch.from_numpy(np.random.RandomState(0).randint(3, 32, (2, N)))
LEFT = torch.ones((2, N), dtype=torch.int64)
LEFT[1, :3] = 0
LOCAL = ["sliding_attention", "full_attention"]


def mistral():
    one = model("Mistral", tiny("MistralConfig", num_hidden_layers=1), "MistralForCausalLM")
    one(IDS, use_cache=False)
    one(IDS, attention_mask=LEFT, use_cache=False)
    one(IDS[:1], position_ids=torch.arange(N)[None] % 9, use_cache=False)
    past = one(IDS[:, :8], attention_mask=LEFT[:, :8], use_cache=True).past_key_values
    past = one(IDS[:, 8:13], attention_mask=LEFT[:, :13], use_cache=True, past_key_values=past).past_key_values
    one(IDS[:, 13:], attention_mask=LEFT, use_cache=True, past_key_values=past)


def mistral_static():
    one = model("Mistral, static cache", tiny("MistralConfig", num_hidden_layers=1), "MistralForCausalLM")
    one.generate(IDS[:, :6], attention_mask=LEFT[:, :6], max_new_tokens=3, do_sample=False,
                 cache_implementation="static", disable_compile=True)


def gemma3_both_ways():
    one = model("Gemma 3, both ways", tiny("Gemma3TextConfig", layer_types=LOCAL, sliding_window=6,
                                           use_bidirectional_attention=True), "Gemma3TextModel")
    one(IDS, attention_mask=LEFT)


def gemma3_images():
    text = tiny("Gemma3TextConfig", layer_types=LOCAL)
    one = model("Gemma 3, images", text, "Gemma3TextModel")
    from transformers.models.gemma3 import modeling_gemma3
    config = transformers.Gemma3Config(text_config=text.to_dict())
    config._attn_implementation = config.text_config._attn_implementation = PARTS["name"]
    embedded = one.get_input_embeddings()(IDS)
    long = [[0] * 3 + [1] * 7 + [0] * 4, [0] * 4 + [1] * 6 + [0] * 4]
    short = [[1] * 3 + [0] * 4 + [1] * 4 + [0] * 3] * 2
    for kinds in (long, short):
        kinds = torch.tensor(kinds)
        options = dict(config=config, attention_mask=LEFT, past_key_values=None, position_ids=None,
                       token_type_ids=kinds)
        makes = modeling_gemma3.Gemma3ForConditionalGeneration.create_masks_for_generate
        known = inspect.signature(makes).parameters
        options.update({name: given for name, given in dict(
            input_embeds=embedded, inputs_embeds=embedded, cache_position=torch.arange(N), cache=None,
            is_first_iteration=True).items() if name in known})
        masks = makes(**{name: given for name, given in options.items() if name in known or "kwargs" in known})
        one(inputs_embeds=embedded, attention_mask=masks, use_cache=False, position_ids=torch.arange(N)[None])


def paligemma():
    text = tiny("GemmaConfig", num_hidden_layers=1)
    del text.sliding_window
    one = model("PaliGemma, a prefix", text, "GemmaModel")
    from transformers.models.paligemma import modeling_paligemma
    kinds = torch.tensor([[0] * 9 + [1] * 5, [0] * 6 + [1] * 8])
    embedded = one.get_input_embeddings()(IDS)
    if transformers.__version__ >= "5":
        mask = masking_utils.create_causal_mask(one.config, embedded, LEFT, None, None,
                                                block_sequence_ids=torch.where(kinds == 0, 0, -1))
    else:
        owner = type("Owner", (), dict(config=one.config, text_config_dtype=torch.float32, dtype=torch.float32))()
        one.config.text_config = one.config
        mask = modeling_paligemma.PaliGemmaModel._update_causal_mask(
            owner, LEFT, kinds, None, torch.arange(N), embedded, True)
    one(inputs_embeds=embedded, attention_mask=mask, use_cache=False, position_ids=torch.arange(N)[None])


def t5gemma():
    part = dict(num_hidden_layers=1, layer_types=LOCAL[:1])
    module = {name: tiny("T5GemmaModuleConfig", **part).to_dict() for name in ("encoder", "decoder")}
    one = model("T5Gemma", transformers.T5GemmaConfig(**module, vocab_size=32), "T5GemmaForConditionalGeneration")
    one(input_ids=IDS, attention_mask=LEFT, decoder_input_ids=IDS[:, :5], use_cache=False)
    one(input_ids=IDS[:, :6], attention_mask=LEFT[:, :6], decoder_input_ids=IDS, use_cache=False)
    one.generate(input_ids=IDS, max_new_tokens=3, do_sample=False)  # padded, eager hides the wrong ones of its cache


def bart():
    config = transformers.BartConfig(vocab_size=32, d_model=8, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8,
                                     decoder_ffn_dim=8, encoder_attention_heads=2, decoder_attention_heads=2,
                                     max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                                     decoder_start_token_id=2)
    one = model("BART", config, "BartForConditionalGeneration")
    one(input_ids=IDS[:, :6], attention_mask=LEFT[:, :6], decoder_input_ids=IDS, use_cache=False)
    one.generate(input_ids=IDS, attention_mask=LEFT, max_new_tokens=3, do_sample=False, num_beams=1)


def whisper():
    config = transformers.WhisperConfig(
        vocab_size=32, d_model=8, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8, decoder_ffn_dim=8,
        encoder_attention_heads=2, decoder_attention_heads=2, num_mel_bins=4, max_source_positions=6,
        max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2)
    one = model("Whisper", config, "WhisperForConditionalGeneration")
    sound = torch.randn((2, 4, 12))
    one(input_features=sound, decoder_input_ids=IDS, use_cache=False)
    past = one(input_features=sound, decoder_input_ids=IDS[:, :3], use_cache=True).past_key_values
    one(input_features=sound, decoder_input_ids=IDS[:, 3:4], past_key_values=past, use_cache=True)


def clip():
    config = transformers.CLIPTextConfig(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                         num_attention_heads=2, max_position_embeddings=32, eos_token_id=2)
    one = model("CLIP's text model", config, "CLIPTextModel")
    one(IDS)
    one(IDS, attention_mask=LEFT.flip(1))


def deepseek():
    config = transformers.DeepseekV3Config(
        vocab_size=32, hidden_size=8, intermediate_size=8, moe_intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=2, num_experts_per_tok=1, n_group=1,
        topk_group=1, q_lora_rank=4, kv_lora_rank=4, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=3,
        first_k_dense_replace=1, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    one = model("DeepSeek-V3", config, "DeepseekV3ForCausalLM")
    one(IDS, attention_mask=LEFT, use_cache=False)
    one.generate(IDS, attention_mask=LEFT, max_new_tokens=2, do_sample=False)


def modernbert():
    config = tiny("ModernBertConfig", local_attention=6, global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2)
    model("ModernBERT", config, "ModernBertModel")(IDS, attention_mask=LEFT)


def llama4():
    config = tiny("Llama4TextConfig", attention_chunk_size=W, num_local_experts=2, num_experts_per_tok=1,
                  intermediate_size_mlp=8, no_rope_layers=[1, 0], layer_types=["chunked_attention", "full_attention"])
    one = model("Llama 4", config, "Llama4ForCausalLM")
    one(IDS, use_cache=False)
    one(IDS, attention_mask=LEFT, use_cache=False)


def main(folder):
    masking_utils.AttentionMaskInterface.register(PARTS["name"], mask)
    ALL_ATTENTION_FUNCTIONS.register(PARTS["name"], attention)
    with torch.no_grad():
        for case in (mistral, mistral_static, gemma3_both_ways, gemma3_images, paligemma, t5gemma, bart, whisper, clip,
                     deepseek, modernbert, llama4):
            try:
                case()
            except Exception as error:
                print(f"{case.__name__} not made: {type(error).__name__}: {str(error)[:300]}")
                if os.environ.get("TRACE"):
                    raise
    calls, version = PARTS["calls"], transformers.__version__
    for name in sorted({call["case"] for call in calls}):
        print(f"{name}: {sum(call['case'] == name for call in calls)} calls of layers")
    np.savez_compressed(os.path.join(folder, f"zoo_{version}.npz"), calls=json.dumps(calls),
                        **{dtype: np.concatenate(parts) for dtype, parts in PARTS["arrays"].items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
