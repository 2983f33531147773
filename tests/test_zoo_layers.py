"""Layers of tiny models of transformers 4.57.1 and 5.24.0, as tests/zoo/record_layers.py recorded them: their mask
functions and their arguments, handed to the zoo's two entries, must give what eager attention made of them."""
import functools
import json
import os
import types

import numpy as np
import pytest
from mindspore import Tensor

from local_attention.zoo import translation

REFERENCE = os.path.join(os.path.dirname(__file__), "reference")
CASES = ["Mistral", "Mistral, static cache", "Gemma 3, both ways", "Gemma 3, images", "PaliGemma, a prefix", "T5Gemma",
         "BART", "Whisper", "CLIP's text model", "DeepSeek-V3", "ModernBERT", "Llama 4"]


@functools.lru_cache
def recorded(version):
    with np.load(os.path.join(REFERENCE, f"zoo_{version}.npz")) as file:
        arrays = dict(file)

    def taken(value):
        if isinstance(value, dict):
            return {name: taken(one) for name, one in value.items()}
        if isinstance(value, list) and value and value[0] in arrays:
            dtype, start, shape = value
            return arrays[dtype][start:start + int(np.prod(shape))].reshape(shape)
        return value
    return [taken(call) for call in json.loads(str(arrays["calls"]))]


def masks(made):
    """Return our mask for what a mask function was recorded with, and the n² mask that it shows."""
    shape = made["shape"]
    shown = np.unpackbits(made["shown"], axis=-1)[..., :shape[2]].astype(bool)
    kept = {name: given for name, given in made.items() if name not in ("shown", "shape")}
    first = kept["cache_position"][0] if "cache_position" in kept else kept["q_offset"]
    n_q = len(kept["cache_position"]) if "cache_position" in kept else kept["q_length"]
    seen = shown[:, first:first + n_q, kept["kv_offset"]:kept["kv_offset"] + kept["kv_length"]]
    if "attention_mask" in kept:
        real = kept["attention_mask"] > 0
        end = kept["kv_offset"] + kept["kv_length"]
        real = np.pad(real, ((0, 0), (0, max(0, end - real.shape[1]))))
        seen = seen & real[:, None, kept["kv_offset"]:end]
    function = Tensor(shown)
    kept = {name: Tensor(given) if isinstance(given, np.ndarray) else given for name, given in kept.items()}
    return translation.positions(**kept, mask_function=lambda b, h, q, k: function[b, q, k]), seen


@pytest.mark.parametrize("version", ["4.57.1", "5.24.0"])
@pytest.mark.parametrize("case", CASES)
def test_a_layer_equals_eager_attention(version, case):
    calls = [call for call in recorded(version) if call["case"] == case]
    assert calls or (version, case) == ("4.57.1", "ModernBERT")  # it has a table of its own there
    for number, call in enumerate(calls):
        mask, seen = None, np.ones((len(call["q"]), call["q"].shape[2], call["k"].shape[2]), bool)
        if "made" in call:
            mask, seen = masks(call["made"])
        elif "mask" in call:
            mask, seen = Tensor(call["mask"]), call["mask"][:, 0, :, :seen.shape[2]] > -1e4
        module = types.SimpleNamespace(**call["fields"], config=types.SimpleNamespace(**call["config"]))
        tensors = {name: Tensor(call[name]) for name in ("s_aux", "position_bias", "sinks", "position_ids")
                   if name in call}
        got, _ = translation.attention(module, *(Tensor(call[name]) for name in "qkv"), mask, **tensors,
                                       **call["numbers"])
        rows = np.broadcast_to(seen.any(-1), got.shape[:2]).copy()
        if seen.shape[1] == seen.shape[2]:
            rows &= seen[:, range(seen.shape[1]), range(seen.shape[1])]  # not those of padding
        assert rows.any()
        np.testing.assert_allclose(got.asnumpy()[rows], call["out"][rows], atol=5e-6, rtol=0, err_msg=f"{number}")
