#!/usr/bin/env bash
# jax.nn.dot_product_attention: a query that sees no key gets the mean of all values. Values outside of its window and
# values of later positions are among them. Exits with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cd "$folder"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'END'
import jax
import jax.numpy as jnp
import numpy as np

# 5 tokens, one head. The value of each key is its place, one-hot, so that a row of the output has its weights.
q = k = jnp.zeros((1, 5, 1, 5))
v = jnp.eye(5)[None, :, None]
mask = np.ones((1, 1, 5, 5), bool)
mask[..., 0] = False                                    # key 0 is padding; query 0 sees nothing else when causal
out = jax.nn.dot_product_attention(q, k, v, mask=jnp.asarray(mask), is_causal=True, local_window_size=1)
weights = np.asarray(out)[0, :, 0]

print("jax", jax.__version__)
print("Weights, a row for each query: causal, local_window_size=1, key 0 hidden by the mask.")
print(weights)
print("Query 0 sees no key. Its weights:", weights[0], "- a good guess is zeros; here it sees the future.")
assert (weights[0] == np.float32(.2)).all(), "query 0 no longer gets the mean of all values"
assert (weights[1:, 0] == 0).all() and (weights[2] == [0, .5, .5, 0, 0]).all(), "other rows have changed"
END
