"""Pictures: the weights in them are the definition's, the masks are `WindowSpec`'s."""
import doctest
import sys

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from local_attention import (
    LocalAttention,
    LocalSelfAttention,
    LocalTransformer,
    MultiHeadLocalAttention,
    WindowSpec,
    plot,
)
from local_attention.plot import attention_weights, plot_mask, plot_weights


def test_weights_are_those_of_the_softmax():
    attn = LocalAttention(5, causal=True, autopad=True, dropout=0.5).set_train()
    q, k, v = (Tensor(np.random.randn(2, 3, 23, 10).astype(np.float32)) for _ in range(3))
    mask = np.random.rand(2, 23) < .7
    weights, = attention_weights(attn, q, k, v, Tensor(mask))
    seen = attn.spec.visible(np.arange(23), np.arange(23)) & mask[:, None, None]
    scores = np.where(seen, q.asnumpy() @ k.asnumpy().swapaxes(2, 3) * 10 ** -0.5, -np.inf)
    wanted = np.exp(scores - np.maximum(scores.max(-1, keepdims=True), -1e9))
    wanted /= np.maximum(wanted.sum(-1, keepdims=True), 1e-30)
    np.testing.assert_allclose(weights, wanted, atol=1e-6)
    assert attn.training


@pytest.mark.parametrize("cls", [LocalSelfAttention, MultiHeadLocalAttention])
def test_weights_of_sliding_windows(cls):
    attn = cls(12, 3, qkv_features=6, window_size_left=3, window_size_right=2, dropout_rate=.5, use_rel_pos_emb=True)
    x, context = (Tensor(np.random.randn(2, 17, 12).astype(np.float32)) for _ in range(2))
    mask = np.random.rand(2, 17) < .7
    inputs = (x,) if cls is LocalSelfAttention else (x, context)
    weights, = attention_weights(attn.set_train(), *inputs, Tensor(mask))
    assert weights.shape == (2, 3, 17, 17) and attn.training
    seen = WindowSpec(1, 3, 1, False).visible(np.arange(17), np.arange(17)) & mask[:, None, None]
    assert (weights[~np.broadcast_to(seen, weights.shape)] == 0).all()
    np.testing.assert_allclose(weights.sum(-1), np.broadcast_to(seen.any(-1), (2, 3, 17)), atol=1e-5)
    values = attn.heads(attn.value(inputs[-1])).asnumpy()
    wanted = attn.out(Tensor((weights @ values).swapaxes(1, 2).reshape(2, 17, 6)))
    found = attn.set_train(False)(*inputs, Tensor(mask))
    np.testing.assert_allclose(found.asnumpy(), wanted.asnumpy(), atol=1e-5)


def test_a_model_s_weights_and_their_picture(tmp_path):
    model = LocalTransformer(num_tokens=23, max_seq_len=41, dim=12, depth=2, heads=3, dim_head=10,
                             local_attn_window_size=5, use_dynamic_pos_bias=True)
    x = Tensor(np.random.randint(0, 23, (2, 17)).astype(np.int32))
    before = model(x).asnumpy()
    weights = attention_weights(model, x)
    assert [each.shape for each in weights] == [(2, 3, 17, 17)] * 2
    for each in weights:
        np.testing.assert_allclose(each.sum(-1), 1, atol=1e-5)
        assert (each[..., ~model.layers[0][0].attn_fn.spec.visible(np.arange(17), np.arange(17))] == 0).all()
    figure = plot_weights(weights)
    drawn = [axes.images[0].get_array() for axes in figure.axes]
    np.testing.assert_array_equal(drawn[4], weights[1][0, 1])
    figure.savefig(tmp_path / "heads.png")
    assert (tmp_path / "heads.png").read_bytes().startswith(b"\x89PNG")

    def again(x):
        return model(x)
    np.testing.assert_allclose(ms.jit(again)(x).asnumpy(), before, atol=1e-5)  # no hook is left


def test_a_mask_s_picture():
    spec = WindowSpec(3, 3, 0, True)
    image, = plot_mask(spec, 10).images
    np.testing.assert_array_equal(image.get_array(), spec.visible(np.arange(10), np.arange(10)))


@pytest.mark.parametrize("call, error, message", [
    (lambda: plot_mask((3, 3), 5), TypeError, "For 'plot_mask', 'spec' must be a WindowSpec, but got (3, 3)"),
    (lambda: plot_mask(WindowSpec(3, 3, 0, True), 0), ValueError, "'n' must be a positive int, but got 0."),
    (lambda: attention_weights(nn.Dense(2, 3), ops.ones((2, 2))), ValueError,
     "For 'attention_weights', 'model' must be one with attention of this package, but got Dense."),
])
def test_misuse_is_named(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value)


def test_matplotlib_is_named_where_it_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # importing it raises ImportError
    with pytest.raises(ImportError, match="local_attention.plot needs matplotlib, which is not installed here."):
        plot_mask(WindowSpec(3, 3, 0, True), 5)


def test_examples():
    assert doctest.testmod(plot).failed == 0
