"""The words of the wider function in the native kernel, over several tiles and with poison behind what hides a key,
against the float64 oracle."""
import numpy as np
import pytest
from mindspore import Tensor

from local_attention import WindowSpec, sliding_window_attention, windowed_attention
from local_attention.backends.native import library
from test_wide import assert_equal, computed, draw, wanted

pytestmark = pytest.mark.skipif(library.load()[0] is None, reason="the kernel was not built")
B, H, D = 2, 4, 5
rng = np.random.default_rng(0)
ORDERS = {"positions": lambda n: np.arange(n), "backwards": lambda n: -np.arange(n),
          "blocks": lambda n: np.arange(n) // 11, "permuted": lambda n: rng.permutation(n),
          "one": lambda n: np.full(n, 7)}


def inputs(n_q, n_k, width, heads=2, **more):
    tensors = draw(n_q, q=(B, H, n_q, D), k=(B, heads, n_k, D), v=(B, heads, n_k, width), **more)
    return tensors, draw(n_q + 1, dout=(B, H, n_q, width), dlse=(B, H, n_q))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("spec", [WindowSpec(1, 40, 0, False), WindowSpec(16, 32, 16, False, prefix=3)])
def test_orders_over_several_tiles(order, spec):
    n_q, n_k = 83, 90
    numbers = np.stack([ORDERS[order](n_k), ORDERS[order](n_k)]).astype(np.int32)
    tensors, douts = inputs(n_q, n_k, 3)

    def call(**named):
        return windowed_attention(**named, spec=spec, order=Tensor(numbers), return_lse=True, backend="native")
    assert_equal(computed(call, tensors, **douts, mode="pynative"),
                 wanted(spec, tensors, **douts, order=numbers, offset=n_k - n_q))


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("shape", [(1, 1), (1, H), (B, 1), (B, H)])
def test_a_bias_of_each_query_over_several_chunks(shape, heads):
    """Its gradient is written where each group has a bias of its own, else summed: over heads, over the batch."""
    n, spec = 300, WindowSpec(1, 3, 2, False)
    tensors, douts = inputs(n, n, D, heads, attn_bias=(*shape, n, 6), sinks=(B, H, n))
    tensors["attn_bias"][..., 100, :] = -np.inf  # a query that sees nothing

    def call(**named):
        return windowed_attention(**named, spec=spec, return_lse=True, backend="native")
    got, want = computed(call, tensors, **douts, mode="pynative"), wanted(spec, tensors, **douts)
    assert_equal(got, want)
    assert not got["out"][:, :, 100].any() and not got["attn_bias"][..., 100, :].any()


@pytest.mark.parametrize("poison", [np.nan, 1e38, np.inf])
@pytest.mark.parametrize("hides", ["order", "bias", "mask"])
def test_keys_that_are_hidden_from_all_may_hold_anything(hides, poison):
    """Hidden are some keys that have no query of their own."""
    n_q, n_k, spec = 20, 70, WindowSpec(1, 60, 0, False)
    tensors, douts = inputs(n_q, n_k, 3)
    there, more = np.arange(n_k) % 3 != 0, {}
    there[n_k - n_q:] = True
    if hides == "order":
        order = np.where(there, np.arange(n_k), 1000)[None].repeat(B, 0).astype(np.int32)
        more["order"] = Tensor(order)
    elif hides == "mask":
        more["mask"] = Tensor(there[None].repeat(B, 0))
    else:
        columns = np.arange(n_q)[:, None] + n_k - n_q - 60 + np.arange(61)
        seen = (columns < 0) | there[np.clip(columns, 0, n_k - 1)]
        more["attn_bias"] = Tensor(np.where(seen, 0, -np.inf)[None, None].astype(np.float32))

    def call(**named):
        return windowed_attention(**named, spec=spec, return_lse=True, backend="native", **more)
    clean = computed(call, tensors, **douts, mode="pynative")
    for name in "kv":
        assert not clean[name][:, :, ~there].any()
        tensors[name][:, :, ~there] = poison
    for name, x in computed(call, tensors, **douts, mode="pynative").items():
        np.testing.assert_allclose(x, clean[name], atol=1e-6, rtol=1e-5, err_msg=name)


def test_queries_of_their_own_for_offsets_over_several_tiles():
    n = 150
    tensors, douts = inputs(n, n, 3, rel_pos_emb=(7, D), rel_pos_query=(B, H, n, D))

    def call(**named):
        return sliding_window_attention(**named, window_size_left=4, window_size_right=3, backend="native", softcap=2.,
                                        return_lse=True)
    assert_equal(computed(call, tensors, **douts, mode="pynative"),
                 wanted(WindowSpec(1, 4, 2, False), tensors, **douts, softcap=2.))
