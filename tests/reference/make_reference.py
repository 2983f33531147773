"""Save what the PyTorch package `local-attention` 1.11.2 computes, for tests/test_reference.py to compare with.

    pip install torch einops local-attention==1.11.2 hyper-connections
    python tests/reference/make_reference.py

Each .npz here holds, case by case, `<case>/settings` (JSON text), masks, and results: `<case>/out`, `<case>/grad_q`, …
The cases of a file share two things, stored once: `inputs/<name>`, of which a case takes a corner of the shape it
needs, and `weight/<state_dict name>`, of which it takes the names in `settings["state"]`. Inputs and weights are
float16 numbers, and computed with in float32: this takes half the space and loses nothing. The same torch on the same
machine writes the same bytes.

Where the two packages differ on purpose, upstream is called so that it returns what ours promises: if it would show
keys added by autopad, a mask of True (`settings["hidden"]`) hides them, and every query sees a key.
"""
import io
import json
import random
import sys
import zipfile
from functools import partial
from importlib import metadata, util
from pathlib import Path

import numpy as np
from choices import pairwise, random_mask, varied, visible

HERE = Path(__file__).resolve().parent
UPSTREAM = "1.11.2"

BATCH, HEADS, DIM_HEAD, WINDOW, LONGEST = 2, 3, 10, 7, 22
ZERO = 1e-6                             # a smaller gradient is zero up to rounding


def check_upstream():
    """Stop unless `import local_attention` is the PyTorch package, in the version that the tests are about."""
    try:
        package = metadata.distribution("local-attention")
        expected = Path(package.locate_file("local_attention/__init__.py")).resolve()
        found = Path(util.find_spec("local_attention").origin).resolve()
    except (metadata.PackageNotFoundError, AttributeError):
        sys.exit(f"This script needs the PyTorch package: pip install local-attention=={UPSTREAM}")
    if package.version != UPSTREAM:
        sys.exit(f"This script needs local-attention {UPSTREAM}, but {package.version} is installed.")
    if found != expected:
        sys.exit(f"`import local_attention` gives {found.parent}, not the PyTorch package in {expected.parent}: "
                 "keep the repository root off PYTHONPATH.")


check_upstream()

import torch  # noqa: E402
from local_attention import DynamicPositionBias, LocalAttention, LocalMHA, LocalTransformer  # noqa: E402
from local_attention.local_attention import look_around, pad_to_multiple  # noqa: E402
from local_attention.rotary import SinusoidalEmbeddings, apply_rotary_pos_emb, rotate_half  # noqa: E402
from local_attention.transformer import top_k  # noqa: E402


# The contents of the files


def save(name, arrays):
    """Save as np.savez_compressed does, but without the time of writing."""
    with zipfile.ZipFile(HERE / name, "w") as file:
        for key, array in arrays.items():
            content = io.BytesIO()
            np.lib.format.write_array(content, np.asarray(array), allow_pickle=False)
            entry = zipfile.ZipInfo(key + ".npy", date_time=(1980, 1, 1, 0, 0, 0))
            file.writestr(entry, content.getvalue(), zipfile.ZIP_DEFLATED, compresslevel=9)


def normal(rng, *shape, scale=1., mean=0.):
    return (mean + scale * rng.standard_normal(shape)).astype(np.float16)


def tensor(array):
    return torch.tensor(array.astype(np.float32) if array.dtype == np.float16 else array)


def gradients(total, tensors):
    """Return {name: gradient} of the scalar `total`, and the names of those that are zero up to rounding."""
    values = torch.autograd.grad(total, list(tensors.values()))
    values = {name: value.numpy() for name, value in zip(tensors, values)}
    return values, sorted(name for name, value in values.items() if np.abs(value).max() < ZERO)


def random_weights(rng, *modules):
    """Return a float16 array for every parameter of the modules, by name; buffers are unchanged."""
    weights = {}
    for module in modules:
        weights |= {name: buffer.numpy() for name, buffer in module.state_dict().items()}
        for name, parameter in module.named_parameters():
            if name.endswith("static_alpha"):               # initial values, which keep the streams apart, and noise
                weights[name] = parameter.detach().numpy().astype(np.float16) + normal(rng, *parameter.shape, scale=.2)
            elif name.endswith(".gamma"):
                weights[name] = normal(rng, *parameter.shape, scale=.2)
            elif parameter.ndim < 2:
                weights[name] = normal(rng, *parameter.shape, scale=.2, mean=0. if name.endswith("bias") else 1.)
            else:
                fan_in = 1 if "emb" in name else parameter.shape[-1]
                weights[name] = normal(rng, *parameter.shape, scale=fan_in ** -.5)
    return weights


def with_weights(module, weights):
    module.load_state_dict({name: tensor(weights[name]) for name in module.state_dict()})
    return module.eval()


# LocalAttention

POSITIONS = ({}, {"dim": DIM_HEAD}, {"rel_pos_emb_config": [DIM_HEAD, HEADS]},
             {"dim": DIM_HEAD, "use_rotary_pos_emb": False},
             {"dim": DIM_HEAD, "use_xpos": True},
             {"dim": DIM_HEAD, "use_xpos": True, "xpos_scale_base": 5})

ATTENTION = {
    "n": (6, 7, 8, 20, 21, 22), "window_size": (WINDOW, 2, 1), "call_window": (None, 5),
    "causal": (False, True), "look_backward": (0, 1, 2), "look_forward": (None, 0, 1, 2),
    "exact_windowsize": (False, True), "shared_qk": (False, True), "position": POSITIONS, "scale": (None, .5),
    "autopad": (False, True), "bias": (False, True), "mask": (None, "mask", "input_mask"),
    "lead": ([], [6], [2, 3], [2, 2, 3]),
}


# a single token has no choice
LONE = [dict(n=1, window_size=WINDOW, call_window=None, causal=causal, look_backward=1, exact_windowsize=exact,
             position=position, autopad=True, bias=True, mask=mask, lead=[2, 3])
        for causal, exact, mask, position in ((True, False, None, POSITIONS[4]), (False, True, None, POSITIONS[1]),
                                              (False, False, "mask", POSITIONS[1]), (False, False, None, POSITIONS[0]))]


def attention_possible(call_window, position, bias, mask, lead, **args):
    if call_window and (args["exact_windowsize"] or args["autopad"] or "use_xpos" not in position):
        return False                                        # upstream ignores it, or fails
    if args["window_size"] == 1 and "use_xpos" in position:
        return False                                        # upstream returns NaN
    if args["causal"] and args["look_forward"] or mask and not lead:
        return False
    if args["n"] > 8 and (args["window_size"] < WINDOW or len(lead) > 2):
        return False                                        # small windows and many axes only with short sequences
    args["window_size"] = call_window or args["window_size"]
    return (args["autopad"] or args["n"] % args["window_size"] == 0) and varied(**args)


def attention_cases(rng):
    inputs = {name: normal(rng, 2 * BATCH * HEADS, LONGEST, DIM_HEAD) for name in ("q", "k", "v", "cotangent")}
    inputs["attn_bias"] = normal(rng, HEADS, WINDOW, 5 * WINDOW)
    arrays = {f"inputs/{name}": value for name, value in inputs.items()}
    for number, case in enumerate(LONE + pairwise(ATTENTION, attention_possible, rng)):
        add_attention(arrays, f"case{number:02}", inputs, rng, **case)
    return arrays


def add_attention(arrays, name, inputs, rng, n, lead, position, bias, mask, call_window, **args):
    args = {key: value for key, value in args.items() if value is not None} | position
    window = call_window or args["window_size"]
    sees, windows = visible(n, **args | {"window_size": window})
    corner = {key: tensor(inputs[key][:int(np.prod(lead)), :n]).reshape(*lead, n, DIM_HEAD)
              for key in ("q", "k", "v", "cotangent")}
    if bias:
        corner["attn_bias"] = tensor(inputs["attn_bias"][:HEADS if lead else 1, :window, :window * windows])
    cotangent = corner.pop("cotangent")
    learned = {key: value.requires_grad_() for key, value in corner.items()}

    masks = {}
    if mask:
        arrays[f"{name}/{mask}"] = random_mask(rng, BATCH, sees)
        masks[mask] = tensor(arrays[f"{name}/{mask}"])
    hidden = not mask and not args["causal"] and n % window > 0
    if hidden:
        masks["mask"] = torch.ones(1, n, dtype=torch.bool)
    call = {"window_size": call_window} if call_window else {}
    out = LocalAttention(**args)(**learned, **masks, **call)
    grads, zero = gradients((out * cotangent).sum(), {f"grad_{key}": value for key, value in learned.items()})
    assert n == 1 or not zero, (name, zero)
    settings = {"args": args, "call": call, "lead": lead, "n": n, "hidden": hidden, "zero": zero}
    arrays |= {f"{name}/settings": json.dumps(settings), f"{name}/out": out.detach().numpy()}
    arrays.update({f"{name}/{key}": value for key, value in grads.items()})


# LocalMHA

MHA_SIZES = {"dim": 11, "heads": HEADS, "dim_head": DIM_HEAD, "window_size": 5}

MHA = {
    "n": (1, 9, 10, 11, 13), "causal": (False, True), "prenorm": (False, True), "gate_values_per_head": (False, True),
    "norm": ({}, {"qk_rmsnorm": True}, {"qk_rmsnorm": True, "qk_scale": 5}), "exact_windowsize": (None, True, False),
    "position": ({}, {"use_xpos": True}, {"use_xpos": True, "xpos_scale_base": 3}, {"use_rotary_pos_emb": False}),
    "mask": (False, True), "bias": (False, True), "look_backward": (None, 0, 2), "look_forward": (None, 0, 2),
    "shared_qk": (False, True),
}


def mha_args(norm, position, **args):
    return MHA_SIZES | {key: value for key, value in args.items() if value is not None} | norm | position


def mha_possible(n, bias, mask, **args):
    args = mha_args(**args)
    if args["causal"] and args.get("look_forward"):
        return False
    return n == 1 or varied(n, **{"exact_windowsize": True} | args)


def mha_cases(rng):
    inputs = {name: normal(rng, BATCH, 13, MHA_SIZES["dim"]) for name in ("x", "cotangent")}
    inputs["attn_bias"] = normal(rng, HEADS, 5, 25)
    weights = random_weights(rng, LocalMHA(**MHA_SIZES, prenorm=True, qk_rmsnorm=True, gate_values_per_head=True))
    arrays = {f"inputs/{name}": value for name, value in inputs.items()}
    arrays |= {f"weight/{name}": value for name, value in weights.items()}
    for number, case in enumerate(pairwise(MHA, mha_possible, rng)):
        add_mha(arrays, f"case{number:02}", inputs, weights, rng, **case)
    return arrays


def add_mha(arrays, name, inputs, weights, rng, n, mask, bias, **args):
    args = mha_args(**args)
    window = args["window_size"]
    sees, windows = visible(n, **{"exact_windowsize": True} | args)
    learned = {"x": tensor(inputs["x"][:, :n]).requires_grad_()}
    if bias:
        learned["attn_bias"] = tensor(inputs["attn_bias"][:, :window, :window * windows]).requires_grad_()
    masks = {}
    hidden = not mask and not args["causal"] and n % window > 0
    if mask:
        arrays[f"{name}/mask"] = random_mask(rng, BATCH, sees)
        masks["mask"] = tensor(arrays[f"{name}/mask"])
    elif hidden:
        masks["mask"] = torch.ones(BATCH, n, dtype=torch.bool)

    block = with_weights(LocalMHA(**args), weights)
    out = block(**learned, **masks)
    grads, zero = gradients((out * tensor(inputs["cotangent"][:, :n])).sum(),
                            {f"grad_{key}": value for key, value in learned.items()}
                            | {f"grad/{key}": value for key, value in block.named_parameters()})
    assert n == 1 or not zero, (name, zero)
    settings = {"args": args, "n": n, "hidden": hidden, "zero": zero, "state": list(block.state_dict())}
    arrays |= {f"{name}/settings": json.dumps(settings), f"{name}/out": out.detach().numpy()}
    arrays.update({f"{name}/{key}": value for key, value in grads.items()})


# LocalTransformer

MODEL = {"num_tokens": 31, "max_seq_len": 40, "dim": 20, "depth": 2, "heads": HEADS, "dim_head": DIM_HEAD, "ff_mult": 1,
         "local_attn_window_size": 5, "num_residual_streams": 1}

# name: (arguments, sequence length, with a mask, lengths of the primes of greedy generation)
MODELS = {
    "plain": ({}, 17, False, (1, 7)),
    "window_aligned": ({"exact_windowsize": False, "ignore_index": 3}, 20, True, (7,)),
    "xpos": ({"use_xpos": True, "look_backward": 2}, 21, False, (1, 7)),
    "xpos_base": ({"use_xpos": True, "xpos_scale_base": 3, "exact_windowsize": False, "depth": 1}, 12, True, ()),
    "dynamic_bias": ({"use_dynamic_pos_bias": True}, 16, False, (7,)),
    "dynamic_bias_aligned": ({"use_dynamic_pos_bias": True, "exact_windowsize": False, "depth": 1}, 15, True, ()),
    "rmsnorm_gates": ({"qk_rmsnorm": True, "qk_scale": 5, "gate_values_per_head": True, "depth": 1}, 11, True, (7,)),
    "shared_qk": ({"shared_qk": True, "depth": 1, "ignore_index": 3}, 13, False, (7,)),
    "both_ways": ({"causal": False, "exact_windowsize": False, "depth": 1}, 13, False, ()),
    "both_ways_masked": ({"causal": False, "look_forward": 2, "depth": 1}, 17, True, ()),
    "features": ({"num_tokens": None, "use_xpos": True, "depth": 1}, 14, True, ()),
}


# Residual streams and global layers: attention to all earlier tokens, and a Cell that is not of this package.
FULL = MHA_SIZES | {"dim": MODEL["dim"], "window_size": MODEL["max_seq_len"], "look_backward": 0,
                    "exact_windowsize": False, "causal": True, "prenorm": True}
STREAMS = {
    "streams": ({}, 17, False, (7,)),
    "streams_global_other": ({"global_attn_layer": "norm, linear", "depth": 1}, 13, True, ()),
    "streams_features": ({"num_tokens": None, "depth": 1}, 11, True, ()),
    "streams_masked": ({"causal": False, "depth": 1}, 13, True, ()),
    "streams_global": ({"global_attn_layer": FULL, "layers_insert_global_attn": [2]}, 17, False, (7,)),
    "global": ({"global_attn_layer": FULL, "num_residual_streams": 1}, 16, False, (7,)),
}


def transformer_cases(rng, models, all_weights, **sizes):
    """Return cases; `all_weights` are settings of models that together have every weight of any model in `models`."""
    sizes = MODEL | sizes
    weights = random_weights(rng, *(transformer(**sizes | settings) for settings in all_weights))
    arrays = {f"weight/{name}": value for name, value in weights.items()}
    for name, (args, n, mask, primes) in models.items():
        add_transformer(arrays, name, weights, rng, sizes | args, n, mask, primes)
    return arrays


def transformer(global_attn_layer=None, **args):
    if isinstance(global_attn_layer, dict):
        global_attn_layer = LocalMHA(**global_attn_layer)
    elif global_attn_layer:
        global_attn_layer = torch.nn.Sequential(torch.nn.LayerNorm(args["dim"]),
                                                torch.nn.Linear(args["dim"], args["dim"]))
    return LocalTransformer(global_attn_layer=global_attn_layer, **args)


def add_transformer(arrays, name, weights, rng, args, n, mask, primes):
    model = with_weights(transformer(**args), weights)
    spec = {"window_size": args["local_attn_window_size"], "causal": True, "exact_windowsize": True} | args
    causal, masks = spec["causal"], {}
    hidden = not mask and not causal
    if mask:
        masks["mask"] = random_mask(rng, BATCH, visible(n, **spec)[0])
        masks["mask"][:, :-1] |= ~(masks["mask"][:, :-1] @ visible(n - 1, **spec)[0].T)     # for the loss
        masks["mask"][:, 0] = True              # ours counts positions from the first real token
    elif hidden:
        masks["mask"] = np.ones((BATCH, n), bool)
    shown = {key: tensor(value) for key, value in masks.items()}
    shown_loss = {key: value[:, :-1] for key, value in shown.items()}

    results = {}
    if args["num_tokens"] is None:
        learned = {"grad_x": tensor(normal(rng, BATCH, n, args["dim"])).requires_grad_()}
        results["x"] = learned["grad_x"].detach().numpy().astype(np.float16)
        results["cotangent"] = normal(rng, BATCH, n, args["dim"])
        out = model(learned["grad_x"], **shown)
        total = (out * tensor(results["cotangent"])).sum()
    else:
        learned = {}
        results["x"] = rng.integers(args["num_tokens"], size=(BATCH, n))
        results["loss_x"] = ignored(results["x"], args.get("ignore_index", -1))
        out = model(tensor(results["x"]), **shown)
        total = model(tensor(results["loss_x"]), return_loss=True, **shown_loss)
        results["loss"] = total.detach().numpy()
    results["out"] = out.detach().numpy()

    grads, zero = gradients(total, learned | {f"grad/{key}": value for key, value in model.named_parameters()})
    assert set(zero) <= {"grad/dynamic_pos_bias.mlp.4.bias"}, (name, zero)      # the same for all keys of a head
    for length in primes:
        prime = rng.integers(args["num_tokens"], size=(BATCH, length))
        results |= {f"prime{length}": prime, f"greedy{length}": greedy(model, prime, args["max_seq_len"] + 4 - length)}
    if mask:
        results |= masks
    arrays[f"{name}/settings"] = json.dumps({"args": args, "n": n, "hidden": hidden, "zero": zero, "primes": primes,
                                             "state": list(model.state_dict())})
    arrays |= {f"{name}/{key}": value for key, value in (results | grads).items()}


def ignored(x, ignore_index):
    """Return the tokens with some targets ignored; -1 is no token, so it can only be the last."""
    x = x.copy()
    x[0, -1] = ignore_index
    if ignore_index >= 0:
        x[1, 2:5] = ignore_index
    return x


def greedy(model, prime, steps):
    """Return the tokens that upstream generates. No rounding could change them: the best logit leads by far."""
    tokens = model.generate(tensor(prime), steps, temperature=0., use_kv_cache=False).numpy()
    seen = np.concatenate([prime, tokens], axis=1)
    for end in range(prime.shape[1], seen.shape[1]):
        best = np.sort(model(tensor(seen[:, :end][:, -model.max_seq_len:]))[:, -1].detach().numpy(), axis=-1)[:, -2:]
        assert np.min(best[:, 1] - best[:, 0]) > 2e-4, "a near tie: choose another seed"
    assert len(np.unique(tokens)) > 10, "it repeats itself: choose another seed"
    return tokens


# The functions beside attention


def function_cases(rng):
    arrays = {}

    def add(name, settings, inputs, function):
        """Add results out0, out1, …; for functions of float32 tensors that return one, also the gradients."""
        tensors = {key: tensor(value).requires_grad_() for key, value in inputs.items()}
        outs = function(**tensors)
        arrays[f"{name}/settings"] = json.dumps(settings)
        arrays.update({f"{name}/{key}": value for key, value in inputs.items()})
        if isinstance(outs, tuple):
            arrays.update({f"{name}/out{i}": torch.as_tensor(out).detach().numpy() for i, out in enumerate(outs)})
            return
        cotangent = normal(rng, *outs.shape)
        grads, zero = gradients((outs * tensor(cotangent)).sum(), tensors)
        assert not zero, (name, zero)
        arrays.update({f"{name}/out": outs.detach().numpy(), f"{name}/cotangent": cotangent})
        arrays.update({f"{name}/grad_{key}": value for key, value in grads.items()})

    x = normal(rng, 2, 3, 5, 6)
    add("rotate_half", {}, {"x": x}, rotate_half)
    for kind, settings in (("rotary", {"dim": 6}), ("xpos", {"dim": 6, "use_xpos": True, "scale_base": 3})):
        embedding = SinusoidalEmbeddings(**settings)
        add(f"embedding_{kind}", settings, {"x": x}, embedding)
        rotated = partial(rotate, *embedding(tensor(x)))
        add(f"apply_{kind}", settings, {"q": x[..., :4, :], "k": x[:, ::-1].copy()}, rotated)
    for backward, forward, pad_value in ((1, 0, -1), (0, 2, 0), (2, 1, -1)):
        settings = {"backward": backward, "forward": forward, "pad_value": pad_value}
        add(f"look_around_{backward}{forward}", settings, {"x": x}, partial(look_around, **settings))
    for shape, dim, value in (((2, 14, 3), -2, 0), ((2, 15, 3), -2, 0), ((2, 13), -1, -3)):
        settings = {"multiple": 7, "dim": dim, "value": value}
        padded = partial(pad_to_multiple, **settings)
        add(f"pad_to_multiple_{shape[1]}", settings, {"tensor": normal(rng, *shape)}, padded)
    for thres in (.5, .9):
        add(f"top_k_{thres}", {"thres": thres}, {"logits": normal(rng, 3, 31)}, partial(kept, thres=thres))

    bias = DynamicPositionBias(dim=5, heads=HEADS)
    weights = random_weights(rng, bias)
    with_weights(bias, weights)
    arrays.update({f"weight/{name}": value for name, value in weights.items()})
    for i, j in ((1, 1), (1, 6), (3, 7), (7, 7), (5, 13)):
        out, name = bias(i, j), f"dynamic_position_bias_{i}_{j}"
        cotangent = normal(rng, *out.shape)
        grads, zero = gradients((out * tensor(cotangent)).sum(),
                                {f"grad/{key}": value for key, value in bias.named_parameters()})
        settings = {"i": i, "j": j, "zero": zero, "state": list(weights)}
        arrays |= {f"{name}/settings": json.dumps(settings), f"{name}/cotangent": cotangent,
                   f"{name}/out": out.detach().numpy()}
        arrays.update({f"{name}/{key}": value for key, value in grads.items()})
    return arrays


def rotate(freqs, scale, q, k):
    return torch.cat(apply_rotary_pos_emb(q, k, freqs, scale=scale), dim=-2)


def kept(logits, thres):
    return (top_k(logits, thres),)


def main():
    torch.set_num_threads(1)
    save("local_attention.npz", attention_cases(np.random.default_rng(7)))
    save("mha.npz", mha_cases(np.random.default_rng(11)))
    save("transformer.npz", transformer_cases(np.random.default_rng(13), MODELS, [
        {"qk_rmsnorm": True, "gate_values_per_head": True}, {"use_dynamic_pos_bias": True}]))
    save("functions.npz", function_cases(np.random.default_rng(17)))
    random.seed(19)                                         # hyper-connections draws its first stream from it
    save("transformer_streams.npz", transformer_cases(np.random.default_rng(19), STREAMS, [
        {"global_attn_layer": FULL}, {"global_attn_layer": "norm, linear", "depth": 1}], num_residual_streams=4))


if __name__ == "__main__":
    main()
