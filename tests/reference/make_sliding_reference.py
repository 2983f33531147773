"""Save results of sliding windows by their formula, in JAX and float64, for tests/test_sliding_reference.py.

    pip install jax
    python tests/reference/make_sliding_reference.py

It follows the definition alone: every score of every query and key, with the invisible ones hidden, and gradients
derived by JAX. sliding_window.npz has for each case `<case>/settings` (JSON text), `<case>/mask` if there is one, and
results in float32: `<case>/out`, `<case>/grad_q`, … The cases of the function take as many of the first numbers of
`inputs/<name>` as their shapes need. Those of the Cells have their own `inputs_q`, `inputs_kv`, `cotangent` and
`weight/<parameter name>`. All of these are small binary fractions, exact in both float16 and float32, and short when
compressed. The same JAX on the same machine writes the same bytes.
"""
import io
import json
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_platforms", "cpu")

BATCH, HEADS, DIM_HEAD = 2, 3, 10
ZERO = 1e-12                            # a smaller value is exactly zero by the formula


def attention(q, k, v, left, right, mask=None, rel_pos_emb=None):
    """Attend to the keys i - left … i + right - 1; q, k, v `(..., n, d)`, rel_pos_emb `(left + right, d)`."""
    n, d = q.shape[-2:]
    i, j = jnp.arange(n)[:, None], jnp.arange(n)[None, :]
    visible = (i - left <= j) & (j <= i + right - 1)
    if mask is not None:
        visible = visible & mask[..., None, :]
    scores = jnp.einsum("...id,...jd->...ij", q, k) * d ** -0.5
    if rel_pos_emb is not None:
        of_offset = rel_pos_emb[jnp.clip(j - i + left, 0, left + right - 1)]
        scores = scores + jnp.einsum("...id,ijd->...ij", q, of_offset)
    weights = jax.nn.softmax(jnp.where(visible, scores, -1e30), axis=-1)
    weights = jnp.where(visible, weights, 0.)                       # a query that sees nothing gets zeros
    return jnp.einsum("...ij,...jd->...id", weights, v)


def multi_head(weights, inputs_q, inputs_kv, heads, left, right, mask=None):
    """Compute attention with projections; weights have the Cells' parameters' names and shapes, `(out, in)`."""
    def project(name, x):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.)

    def split(x):
        return jnp.moveaxis(x.reshape(*x.shape[:-1], heads, -1), -2, -3)

    q, k, v = split(project("query", inputs_q)), split(project("key", inputs_kv)), split(project("value", inputs_kv))
    out = attention(q, k, v, left, right, None if mask is None else mask[:, None], weights.get("rel_pos_emb"))
    out = jnp.moveaxis(out, -3, -2)
    return project("out", out.reshape(*out.shape[:-2], -1))


# The contents of the file


def save(path, arrays):
    """Save as np.savez_compressed does, but without the time of writing."""
    with zipfile.ZipFile(path, "w") as file:
        for key, array in arrays.items():
            content = io.BytesIO()
            np.lib.format.write_array(content, np.asarray(array), allow_pickle=False)
            entry = zipfile.ZipInfo(key + ".npy", date_time=(1980, 1, 1, 0, 0, 0))
            file.writestr(entry, content.getvalue(), zipfile.ZIP_DEFLATED, compresslevel=9)


def normal(rng, *shape, scale=1.):
    """Draw nearly normal numbers, in steps of a sixteenth of `scale` rounded to a power of two."""
    step = 2. ** np.round(np.log2(scale / 16))
    return (np.round(scale / step * rng.standard_normal(shape)) * step).astype(np.float16)


def add_results(arrays, name, settings, learned, cotangent, mask, forward):
    """Add a case: forward(learned, mask), the gradients of all learned arrays, and which of all these are zero."""
    learned = {key: jnp.asarray(value, jnp.float64) for key, value in learned.items()}

    def total(learned):
        out = forward(learned, mask)
        return (out * cotangent).sum(), out

    (_, out), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(learned)
    assert jnp.isfinite(out).all()
    found = {"out": out} | {f"grad_{key}": grad for key, grad in grads.items()}
    zero = sorted(key for key, value in found.items() if jnp.abs(value).max() < ZERO)
    arrays[f"{name}/settings"] = json.dumps(settings | {"zero": zero})
    if mask is not None:
        arrays[f"{name}/mask"] = mask
    arrays.update({f"{name}/{key}": np.asarray(value * (key not in zero), np.float32) for key, value in found.items()})


# The function. The first cases cover most. Lengths are around 7. With only one visible key, only v has a gradient.

FUNCTION = [
    # n, left, right, leading axes, the mask's axes, embeddings of offsets
    (23, 5, 3, [BATCH, HEADS], [BATCH, 1], True),
    (8, 5, 0, [BATCH, HEADS], [BATCH, HEADS], True),
    (61, 9, 4, [BATCH], [], True),
    (6, 13, 11, [BATCH, HEADS], None, True),
    (7, 0, 1, [HEADS], None, False),
    (8, 0, 4, [1, HEADS], [HEADS], False),
    (7, 7, 1, [HEADS], None, False),
    (23, 5, 0, [], None, False),
    (23, 3, 100, [], [], False),
    (61, 60, 61, [], None, False),
    (8, 0, 0, [HEADS], None, False),
    (1, 0, 1, [BATCH, HEADS], None, True),
    (1, 5, 0, [BATCH, HEADS], None, True),
    (1, 5, 3, [BATCH, HEADS], [BATCH, 1], True),
]


def add_functions(arrays, rng):
    inputs = {key: normal(rng, BATCH * HEADS * 23 * DIM_HEAD) for key in ("q", "k", "v", "cotangent")}
    inputs["rel_pos_emb"] = normal(rng, 24, DIM_HEAD, scale=DIM_HEAD ** -.5)
    arrays |= {f"inputs/{key}": value for key, value in inputs.items()}
    for number, (n, left, right, lead, mask_lead, has_emb) in enumerate(FUNCTION):
        shape = (*lead, n, DIM_HEAD)
        learned = {key: inputs[key][:int(np.prod(shape))].reshape(shape)
                   for key in ("q", "k", "v", "cotangent")}
        cotangent = learned.pop("cotangent")
        if has_emb:
            learned["rel_pos_emb"] = inputs["rel_pos_emb"][:left + right]
        mask = None if mask_lead is None else rng.random((*mask_lead, n)) < .7
        settings = {"n": n, "lead": lead, "left": left, "right": right}

        def forward(learned, mask, left=left, right=right):
            return attention(**learned, left=left, right=right, mask=mask)
        add_results(arrays, f"function{number:02}", settings, learned, cotangent, mask, forward)


# The Cells: no two axes have the same size

CELLS = {
    "self": ({"in_features": 11, "num_heads": HEADS, "qkv_features": 21, "out_features": 13, "window_size_left": 4,
              "window_size_right": 2, "use_rel_pos_emb": True}, 17, True),
    "cross": ({"in_features": 11, "num_heads": HEADS, "qkv_features": 21, "out_features": 13, "window_size_left": 5,
               "window_size_right": 0, "use_rel_pos_emb": True}, 17, True),
    "self_plain": ({"in_features": 15, "num_heads": HEADS, "window_size_left": 3, "window_size_right": 1,
                    "use_bias": False}, 8, False),
    "cross_plain": ({"in_features": 15, "num_heads": HEADS, "out_features": 7, "window_size_left": 0,
                     "window_size_right": 6}, 8, False),
}


def random_weights(rng, in_features, num_heads, window_size_left, window_size_right, qkv_features=None,
                   out_features=None, use_bias=True, use_rel_pos_emb=False):
    qkv, out = qkv_features or in_features, out_features or in_features
    weights = {}
    for name, rows, columns in (("query", qkv, in_features), ("key", qkv, in_features), ("value", qkv, in_features),
                                ("out", out, qkv)):
        weights[f"{name}.weight"] = normal(rng, rows, columns, scale=columns ** -.5)
        if use_bias:
            weights[f"{name}.bias"] = normal(rng, rows, scale=.2)
    if use_rel_pos_emb:
        weights["rel_pos_emb"] = normal(rng, window_size_left + window_size_right, qkv // num_heads, scale=.4)
    return weights


def add_cells(arrays, rng):
    for name, (args, n, has_mask) in CELLS.items():
        weights = random_weights(rng, **args)
        inputs = ["inputs_q", "inputs_kv"] if name.startswith("cross") else ["inputs_q"]
        inputs = {key: normal(rng, BATCH, n, args["in_features"]) for key in inputs}
        cotangent = normal(rng, BATCH, n, args.get("out_features") or args["in_features"])
        mask = rng.random((BATCH, n)) < .7 if has_mask else None
        arrays |= {f"{name}/{key}": value for key, value in (inputs | {"cotangent": cotangent}).items()}
        arrays |= {f"{name}/weight/{key}": value for key, value in weights.items()}

        def forward(learned, mask, args=args):
            inputs_q = learned["inputs_q"]
            return multi_head(learned, inputs_q, learned.get("inputs_kv", inputs_q), args["num_heads"],
                              args["window_size_left"], args["window_size_right"], mask)
        add_results(arrays, name, {"args": args}, inputs | weights, cotangent, mask, forward)


def main():
    arrays = {}
    add_functions(arrays, np.random.default_rng(23))
    add_cells(arrays, np.random.default_rng(29))
    save(Path(__file__).resolve().parent / "sliding_window.npz", arrays)


if __name__ == "__main__":
    main()
