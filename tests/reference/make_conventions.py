"""Record which keys a query sees in other libraries, for tests/test_conventions.py.

    python tests/reference/make_conventions.py FOLDER [environment ...]

FOLDER gets an environment for each entry of ENVIRONMENTS, with the pinned packages, and the masks of each as
NAME.npz. PyTorch's CPU build is enough. conventions.npz, beside this script, has the masks of all of them: each
environment that is named (else each) is recorded anew, and the others stay as they are. This package is not used.

A case is an array `<environment>/<case>`. Most are bool: whether the query of a row sees the key of a column. It is
read from what the library computes, not from its text: outputs for one-hot values, weights that it returns, the mask
that it makes, or gradients of each output with respect to each input. Cases `…/hidden` are the weights (floats) of a
query that sees none of 5 keys. `<environment>/versions` is JSON text.
"""
import importlib.metadata
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np

ENVIRONMENTS = {
    "jax": ["jax==0.10.2"],
    "onnxruntime": ["onnxruntime==1.32.0", "onnx==1.23.2"],
    "onnxruntime-1.23": ["onnxruntime==1.23.2", "onnx==1.23.2"],
    "torch": ["torch==2.13.0", "numpy"],
    "mlx": ["mlx[cpu]==0.32.4", "mlx-lm==0.32.2", "numpy"],
    "keras": ["keras==3.15.1", "jax==0.10.2"],
    "transformers": ["torch==2.13.0", "transformers==5.24.0", "numpy"],
    "transformers-4.57": ["torch==2.13.0", "transformers==4.57.6", "numpy"],
    "torchaudio": ["torch==2.13.0", "torchaudio==2.11.1", "numpy"],
}
N, FEW = 23, 3                                                   # keys, and queries where they are fewer
HIDDEN = np.array([[True] * 5, [False] * 5, [True] * 5])         # its second query sees no key


def seen(weights):
    return np.asarray(weights) > 0


def record_jax():
    import jax
    import jax.numpy as jnp

    def weights(queries=N, keys=N, **options):
        q, k, v = jnp.zeros((1, queries, 1, keys)), jnp.zeros((1, keys, 1, keys)), jnp.eye(keys)[None, :, None]
        return np.asarray(jax.nn.dot_product_attention(q, k, v, **options))[0, :, 0]
    return {
        "window": seen(weights(local_window_size=5)),
        "window, causal": seen(weights(local_window_size=5, is_causal=True)),
        "pair": seen(weights(local_window_size=(4, 2))),
        "fewer": seen(weights(FEW, local_window_size=5, is_causal=True)),
        "hidden": weights(3, 5, mask=jnp.asarray(HIDDEN))[1],
        # every key that the window has is hidden by the mask: what lies outside of the window counts too
        "hidden in a window": weights(3, 5, mask=jnp.asarray(HIDDEN), local_window_size=1)[1],
    }


class Onnx:
    """One node as a model, run on CPU. Vectors have `width` numbers, and values are one-hot."""
    width = 32

    def run(self, op, inputs, attributes, opsets):
        import onnxruntime
        from onnx import TensorProto, helper
        kinds = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32, "bool": TensorProto.BOOL}
        domain = "com.microsoft" if "com.microsoft" in opsets else ""
        names = ["out"] + ["keys", "values"] * bool(domain)
        node = helper.make_node(op, list(inputs), names, domain=domain, **attributes)
        given = [helper.make_tensor_value_info(name, kinds[str(x.dtype)], x.shape) for name, x in inputs.items()]
        made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
        model = helper.make_model(helper.make_graph([node], "one", given, made), ir_version=11 if not domain else 8,
                                  opset_imports=[helper.make_opsetid(name, number) for name, number in opsets.items()])
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        return session.run(["out"], inputs)[0]

    def grouped(self, queries, past=0, **attributes):
        zeros, eye = np.zeros((1, 1, past + queries, self.width), np.float32), np.eye(self.width, dtype=np.float32)
        new = zeros[0, :, past:]
        inputs = dict(q=new, k=new, v=eye[None, past:past + queries], past_k=zeros[:, :, :past],
                      past_v=eye[None, None, :past], last=np.array([past + queries - 1], np.int32),
                      total=np.array([past + queries], np.int32))
        attributes = dict(num_heads=1, kv_num_heads=1, **attributes)
        out = self.run("GroupQueryAttention", inputs, attributes, {"": 17, "com.microsoft": 1})
        return out[0, :, :past + queries]

    def attention(self, queries, keys, mask=None, opset=25, **attributes):
        zeros = np.zeros((1, 1, keys, self.width), np.float32)
        inputs = dict(q=zeros[:, :, :queries], k=zeros, v=np.eye(self.width, dtype=np.float32)[None, None, :keys])
        if mask is not None:
            inputs["mask"] = mask
        return self.run("Attention", inputs, attributes, {"": opset})[0, 0, :, :keys]


def record_onnxruntime_1_23():
    node = Onnx()
    return {"grouped": seen(node.grouped(N, local_window_size=5)),
            "grouped, past": seen(node.grouped(1, past=N - 1, local_window_size=5))}


def record_onnxruntime():
    node = Onnx()
    return {
        **record_onnxruntime_1_23(),
        "grouped, past, fewer": seen(node.grouped(FEW, past=N - FEW, local_window_size=5)),
        "pair": seen(node.attention(N, N, left_window_size=4, right_window_size=2)),
        "left alone": seen(node.attention(N, N, left_window_size=4)),
        "fewer": seen(node.attention(FEW, N, left_window_size=4, is_causal=1)),
        "hidden": node.attention(3, 5, mask=HIDDEN)[1],
    }


def record_torch():
    import torch
    from torch.nn.attention.bias import causal_lower_right
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    plain = torch.nn.functional.scaled_dot_product_attention

    def one_hot(queries, keys):
        return torch.zeros(1, 1, queries, keys), torch.zeros(1, 1, keys, keys), torch.eye(keys)[None, None]

    def flex(rule, queries=N, keys=N):
        block_mask = create_block_mask(lambda b, h, q, k: rule(q, k), None, None, queries, keys, device="cpu")
        return flex_attention(*one_hot(queries, keys), block_mask=block_mask)[0, 0].numpy()
    hidden, lowest = torch.from_numpy(HIDDEN), torch.finfo(torch.float32).min
    layer, tokens = torch.nn.MultiheadAttention(4, 1, batch_first=True), torch.ones(1, 5, 4)
    _, weights = layer(tokens, tokens, tokens, key_padding_mask=torch.ones(1, 5, dtype=bool))
    return {
        "flex": seen(flex(lambda q, k: q - k <= 5)),
        "flex, causal": seen(flex(lambda q, k: (q >= k) & (q - k <= 5))),
        "flex, fewer": seen(flex(lambda q, k: (q >= k) & (q - k <= 5), FEW)),
        "is_causal, fewer": seen(plain(*one_hot(FEW, N), is_causal=True)[0, 0]),
        "causal_lower_right, fewer": seen(plain(*one_hot(FEW, N), attn_mask=causal_lower_right(FEW, N))[0, 0]),
        "flex/hidden": flex(lambda q, k: q != 1, 3, 5)[1],
        "bool/hidden": plain(*one_hot(3, 5), attn_mask=hidden)[0, 0, 1].numpy(),
        "lowest number/hidden": plain(*one_hot(3, 5), attn_mask=torch.where(hidden, 0., lowest))[0, 0, 1].numpy(),
        "MultiheadAttention/hidden": weights[0, 1].detach().numpy(),
    }


def record_mlx():
    import mlx.core as mx
    from mlx_lm.models.base import create_causal_mask
    from mlx_lm.models.cache import RotatingKVCache
    cache, window, kept = RotatingKVCache(max_size=9, keep=4), 9, np.zeros((N, N), bool)
    for place in range(N):                                       # one token at a time; a key's value is its place
        keys, _ = cache.update_and_fetch(mx.full((1, 1, 1, 1), place), mx.full((1, 1, 1, 1), place))
        kept[place, np.array(keys).ravel()[:min(place + 1, window)].astype(int)] = True
    q, k, v = mx.zeros((1, 1, 3, 5)), mx.zeros((1, 1, 5, 5)), mx.eye(5)[None, None]
    weights = mx.fast.scaled_dot_product_attention(q, k, v, scale=1., mask=mx.array(HIDDEN))
    return {"window": np.array(create_causal_mask(N, window_size=5)),
            "fewer": np.array(create_causal_mask(FEW, offset=N - FEW, window_size=5)),
            "rotating": kept,
            "hidden": np.array(weights)[0, 0, 1]}


def record_keras():
    import os
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    def weights(**options):
        layer = keras.layers.MultiHeadAttention(1, 4, sliding_window=5)
        x = np.random.default_rng(0).standard_normal((1, N, 4)).astype(np.float32)
        return np.asarray(layer(x, x, return_attention_scores=True, **options)[1])[0, 0]
    return {"window": seen(weights()), "window, causal": seen(weights(use_causal_mask=True))}


def gradients(model, inputs):
    """Return whether each output of a model, `(tokens, d)`, depends on each of the inputs, `(tokens, d)`."""
    import torch
    torch.manual_seed(0)
    inputs = inputs.clone().requires_grad_()
    outputs = model(inputs)
    return np.array([torch.autograd.grad((row * torch.randn_like(row)).sum(), inputs, retain_graph=True)[0]
                     .abs().sum(1).numpy() > 0 for row in outputs])


def model_of(name, config, part=lambda model: model, **settings):
    """Return what a model of one layer of transformers shows; its config is `config` with small sizes and settings."""
    import torch
    import transformers
    torch.manual_seed(0)
    sizes = dict(vocab_size=11, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                 num_key_value_heads=1, head_dim=8, max_position_embeddings=64, pad_token_id=0)
    config = (getattr(transformers, config) if isinstance(config, str) else config)(**{**sizes, **settings})
    config._attn_implementation = "eager"
    made = getattr(transformers, name) if isinstance(name, str) else name
    model = part(made(config)).eval()
    return gradients(lambda x: model(inputs_embeds=x[None]).last_hidden_state[0, :N], torch.randn(N, 16))


def record_transformers_4_57():
    import torch
    import transformers
    small = dict(vocab_size=11, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                 num_key_value_heads=1, head_dim=8)
    local = dict(sliding_window=6, layer_types=["sliding_attention"])
    t5gemma = transformers.T5GemmaModuleConfig(**small, **local)
    mistral = transformers.MistralConfig(**small, sliding_window=6, attn_implementation="eager")
    mistral = transformers.MistralModel(mistral)
    padded = dict(input_ids=torch.ones(1, 5, dtype=int), attention_mask=torch.tensor([[0, 1, 1, 1, 1]]))
    return {
        "Mistral": model_of("MistralModel", "MistralConfig", sliding_window=6),
        "T5Gemma": model_of("T5GemmaModel", "T5GemmaConfig", lambda model: model.encoder, encoder=t5gemma,
                            decoder=t5gemma),
        "Llama 4": model_of("Llama4TextModel", "Llama4TextConfig", attention_chunk_size=6, no_rope_layers=[1],
                            layer_types=["chunked_attention"], moe_layers=[], num_local_experts=1,
                            intermediate_size_mlp=16),
        # the first token is padding
        "eager/hidden": mistral(**padded, output_attentions=True).attentions[0][0, 0, 0].detach().numpy(),
    }


def record_transformers():
    from transformers.models.t5gemma2.configuration_t5gemma2 import T5Gemma2TextConfig
    from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2TextEncoder
    return {
        **record_transformers_4_57(),
        "Gemma 3": model_of("Gemma3TextModel", "Gemma3TextConfig", use_bidirectional_attention=True, sliding_window=6,
                            layer_types=["sliding_attention"]),
        "T5Gemma 2": model_of(T5Gemma2TextEncoder, T5Gemma2TextConfig, sliding_window=6, dropout_rate=0.,
                              layer_types=["sliding_attention"]),
        "UltraBERT": model_of("UltrabertModel", "UltrabertConfig", sliding_window=6, layer_types=["sliding_attention"]),
        "ModernBERT": model_of("ModernBertModel", "ModernBertConfig", local_attention=6,
                               layer_types=["sliding_attention"]),
        "Longformer": model_of("LongformerModel", "LongformerConfig", attention_window=6),
        "LongT5": model_of("LongT5EncoderModel", "LongT5Config", d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
                           local_radius=4),
    }


def record_torchaudio():
    # the file alone: importing torchaudio loads its library, which is built for one release of PyTorch
    from importlib.util import find_spec, module_from_spec, spec_from_file_location

    import torch
    path = Path(find_spec("torchaudio").origin).with_name("models") / "emformer.py"
    spec = spec_from_file_location("emformer", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    segment, left, right = 5, 10, 2
    torch.manual_seed(0)
    model = module.Emformer(16, 2, 16, 1, segment, left_context_length=left, right_context_length=right).eval()
    tokens = 20                                                  # whole segments; then `right` more
    inputs = torch.randn(tokens + right, 16)
    return {"Emformer": gradients(lambda x: model(x[None], torch.tensor([tokens]))[0][0], inputs)}


def save(path, arrays):
    """Save as np.savez_compressed does, but without the time of writing."""
    with zipfile.ZipFile(path, "w") as file:
        for key, array in sorted(arrays.items()):
            content = io.BytesIO()
            np.lib.format.write_array(content, np.asarray(array), allow_pickle=False)
            entry = zipfile.ZipInfo(key + ".npy", date_time=(1980, 1, 1, 0, 0, 0))
            file.writestr(entry, content.getvalue(), zipfile.ZIP_DEFLATED, compresslevel=9)


def record(name, path):
    """Run in the environment NAME: save its cases."""
    cases = globals()["record_" + name.replace("-", "_").replace(".", "_")]()
    packages = [requirement.split("==")[0].split("[")[0] for requirement in ENVIRONMENTS[name] if "==" in requirement]
    versions = {package: importlib.metadata.version(package).split("+")[0] for package in packages}
    save(path, {f"{name}/{case}": array for case, array in {**cases, "versions": json.dumps(versions)}.items()})


def main(folder, *names):
    folder = Path(folder).resolve()
    result = Path(__file__).with_name("conventions.npz")
    arrays = dict(np.load(result)) if result.exists() else {}
    for name in names or ENVIRONMENTS:
        home = folder / name
        if not home.exists():
            subprocess.run([sys.executable, "-m", "venv", home], check=True)
            subprocess.run([home / "bin" / "pip", "install", "-q", *ENVIRONMENTS[name]], check=True)
        path = folder / f"{name}.npz"
        subprocess.run([home / "bin" / "python", __file__, "--record", name, path], check=True)
        arrays = {key: array for key, array in arrays.items() if key.split("/")[0] != name} | dict(np.load(path))
    save(result, arrays)


if __name__ == "__main__":
    if sys.argv[1] == "--record":
        record(*sys.argv[2:])
    else:
        main(*sys.argv[1:])
