"""What the zoos themselves cannot do: by zoo, family and check the reason; "all" is every check of a family.

Seen with the zoo's eager attention too, or before any attention is asked for.
"""
OWN_TABLE = "its attentions are in a table of the model's own, which has no entry but the zoo's"
CACHED = "generate with a cache differs from the zoo's own argmax without one, with its eager attention too"
KNOWN = {
    "mindnlp": {
        "qwen2_moe": dict(model=OWN_TABLE),
        "phimoe": dict(model=OWN_TABLE),
        "gpt_neo": dict(model=OWN_TABLE),
        "modernbert": dict(all=OWN_TABLE),
        "longformer": dict(all="does not ask a table; its own attention gives these logits"),
        "gpt_oss": dict(gradient="the gradient is wrong with eager attention too"),
        "cohere2": dict(gradient="the gradient is wrong with eager attention too, by 0.99"),
        "modernbert_decoder": dict(padded="3.3e-05, rounding"),
        "llama4": dict(all="its router calls zeros with a dtype that mindtorch takes for an int"),
    },
    "mindone": {
        "qwen3": dict(model="its constructor raises where there is a window"),
        "gpt_oss": dict(model="is not there"),
        "qwen2_moe": dict(model=OWN_TABLE),
        "phimoe": dict(model=OWN_TABLE),
        "gpt_neo": dict(model=OWN_TABLE),
        "modernbert": dict(all=OWN_TABLE),
        "longformer": dict(all="does not ask a table; Im2ColExt has no CPU kernel"),
        "phi3": dict(packed="its attention does not hand position_ids on", chunks="calls get_usable_length of a cache "
                     "that has none", generate="the model has no generate"),
        "gemma2": dict(chunks="its first call with a cache makes a mask of 8 columns for 23 keys"),
        "mixtral": dict(generate=CACHED),
        "qwen3_moe": dict(generate=CACHED),
        "starcoder2": dict(generate=CACHED),
        "dots1": dict(generate="a product of shapes that do not fit"),
        "llama4": dict(all="logits differ by 5.7 with eager attention too; complex numbers have no gradient"),
    },
}
