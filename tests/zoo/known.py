"""Checks that fail because of the zoos: the reason, by zoo, family and check. "all" stands for every check of a family.

They also fail with the zoo's eager attention, or before the model requests any attention.
"""
OWN_TABLE = "the model has its own table of attentions, with the zoo's entries alone"
CACHED = "generate with a cache differs from the zoo's argmax without a cache, with eager attention too"
KNOWN = {
    "mindnlp": {
        "qwen2_moe": dict(model=OWN_TABLE),
        "phimoe": dict(model=OWN_TABLE),
        "gpt_neo": dict(model=OWN_TABLE),
        "modernbert": dict(all=OWN_TABLE),
        "longformer": dict(all="does not look attention up in a table; its own attention gives these logits"),
        "gpt_oss": dict(gradient="mindtorch's gradient of its rotary embedding is wrong; with Llama's: 3.9e-06"),
        "cohere2": dict(gradient="the gradient is wrong with eager attention too, by 0.99"),
        "modernbert_decoder": dict(padded="3.3e-05, rounding"),
        "llama4": dict(all="its router calls zeros with a dtype, which mindtorch takes for an int"),
    },
    "mindone": {
        "qwen3": dict(model="its constructor raises an error if there is a window"),
        "gpt_oss": dict(model="the zoo has no such model"),
        "qwen2_moe": dict(model=OWN_TABLE),
        "phimoe": dict(model=OWN_TABLE),
        "gpt_neo": dict(model=OWN_TABLE),
        "modernbert": dict(all=OWN_TABLE),
        "longformer": dict(all="does not look attention up in a table; Im2ColExt has no CPU kernel"),
        "phi3": dict(packed="its attention does not pass position_ids on", chunks="calls get_usable_length of a cache "
                     "that has no such method", generate="the model has no generate"),
        "gemma2": dict(chunks="its first call with a cache makes a mask of 8 columns for 23 keys"),
        "mixtral": dict(generate=CACHED),
        "qwen3_moe": dict(generate=CACHED),
        "starcoder2": dict(generate=CACHED),
        "dots1": dict(generate="multiplies matrices whose shapes do not fit"),
        "llama4": dict(all="logits differ by 5.7 with eager attention too; complex numbers have no gradient"),
    },
}
