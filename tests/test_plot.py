"""Pictures show the weights of the definition, and the masks of `WindowSpec`."""
import doctest
import sys

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from local_attention import (
    LocalAttention,
    LocalMHA,
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
    values = attn._heads(attn.value(inputs[-1])).asnumpy()
    wanted = attn.out(Tensor((weights @ values).swapaxes(1, 2).reshape(2, 17, 6)))
    found = attn.set_train(False)(*inputs, Tensor(mask))
    np.testing.assert_allclose(found.asnumpy(), wanted.asnumpy(), atol=1e-5)


@pytest.fixture(params=[ms.PYNATIVE_MODE, ms.GRAPH_MODE], ids=["pynative", "graph"])
def mode(request):
    ms.set_context(mode=request.param)
    yield request.param
    ms.set_context(mode=ms.PYNATIVE_MODE)


@pytest.mark.parametrize("keywords", [False, True], ids=["by place", "by name"])
@pytest.mark.parametrize("cls", [LocalSelfAttention, MultiHeadLocalAttention])
def test_weights_are_those_of_documents(cls, keywords, mode):
    attn = cls(12, 3, window_size_left=5, window_size_right=2)
    x, ids = ops.randn((1, 10, 12)), Tensor([[0] * 4 + [1] * 6], ms.int32)
    inputs = (x,) if cls is LocalSelfAttention else (x, x)
    weights, = (attention_weights(attn, *inputs, segment_ids=ids) if keywords else
                attention_weights(attn, *inputs, None, None, ids))
    assert (weights[..., 4:, :4] == 0).all() and (weights[..., :4, 4:] == 0).all()
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    assert ms.get_context("mode") == mode


def test_weights_of_a_call_with_names_are_the_same_in_either_mode(mode):
    model = LocalTransformer(num_tokens=23, max_seq_len=41, dim=12, depth=2, heads=3, dim_head=10,
                             local_attn_window_size=5, causal=True)
    x, ids = Tensor(np.arange(10, dtype=np.int32)[None]), Tensor([[0] * 4 + [1] * 6], ms.int32)
    weights = attention_weights(model, x, segment_ids=ids, mask=Tensor(np.arange(10)[None] != 7))
    assert len(weights) == 2
    for each in weights:
        assert (each[..., 4:, :4] == 0).all() and (each[..., 7] == 0).all() and (each[..., 9, 4:7] > 0).all()


@pytest.mark.parametrize("loss", [False, True])
def test_weights_of_rows_with_padding_on_the_left(loss):
    """Windows count from a row's first real token, and the map has all tokens in their places."""
    model = LocalTransformer(num_tokens=23, max_seq_len=41, dim=12, depth=1, heads=3, dim_head=10,
                             local_attn_window_size=4, exact_windowsize=False)
    x, pads = Tensor(np.arange(22).reshape(2, 11).astype(np.int32)), (2, 5)
    weights, = attention_weights(model, x, return_loss=loss,
                                 mask=Tensor(np.arange(11) >= np.array(pads)[:, None]))
    for row, first in enumerate(pads):
        alone, = attention_weights(model, x[row:row + 1, first:], return_loss=loss)
        np.testing.assert_allclose(weights[row:row + 1, :, first:, first:], alone, atol=1e-6)
        assert (weights[row, :, first:, :first] == 0).all()


def test_a_call_without_attention_is_named():
    block = LocalMHA(dim=12, window_size=4, heads=2, dim_head=6, causal=True)
    x = ops.randn((1, 1, 12))
    _, cache = block(x, return_cache=True)
    assert attention_weights(block, x, return_cache=True)[0].shape == (1, 2, 1, 1)
    with pytest.raises(ValueError, match="'model' must be one that calls attention of this package, neither with a "
                                         "cache nor in a compiled method, but got LocalMHA."):
        attention_weights(block, x, cache=cache)


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
    *panels, bar = figure.axes
    hidden = ~model.layers[1][0].attn_fn.spec.visible(np.arange(17), np.arange(17))
    drawn = panels[4].images[0].get_array()
    np.testing.assert_array_equal(np.ma.getmaskarray(drawn), hidden)
    np.testing.assert_array_equal(drawn[~hidden], weights[1][0, 1][~hidden])
    assert panels[4].get_title() == "layer 2, head 2" and bar.get_ylabel() == "weight"
    assert panels[4].get_xlabel() == "key position" and panels[4].get_ylabel() == "query position"
    seen = [model.layers[1][0].attn_fn.spec.span(i) for i in range(17)]
    for edge, wanted in zip(panels[4].patches, zip(*seen)):
        values = np.clip(wanted, 0, 16) + (0.5 if wanted[0] == 0 and edge is panels[4].patches[1] else -0.5)
        np.testing.assert_array_equal(edge.get_data().values, values)
    small, large = panels[0].images[0].norm([0.01, 0.25])  # a weight of a hundredth is visible
    assert small == pytest.approx(large / 5)
    figure.draw_without_rendering()
    title, whole = figure._suptitle.get_window_extent(), figure.bbox
    assert whole.x0 < title.x0 and title.x1 < whole.x1
    figure.savefig(tmp_path / "heads.png")
    assert (tmp_path / "heads.png").read_bytes().startswith(b"\x89PNG")

    def again(x):
        return model(x)
    np.testing.assert_allclose(ms.jit(again)(x).asnumpy(), before, atol=1e-5)  # all hooks are removed


def test_pictures_of_calls_that_differ_in_heads_and_see_nothing_in_places():
    many, few = np.zeros((1, 3, 5, 5), np.float32), np.zeros((5, 5), np.float32)
    many[..., 2:, 1], few[0, 0] = 1, 1
    figure = plot_weights([many, few], names=["global", "local"])
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["global, head 1", "global, head 2", "global, head 3", "local, head 1", ""]
    first, last = figure.axes[0].patches
    np.testing.assert_array_equal(first.get_data().values, [np.nan, np.nan, .5, .5, .5])
    np.testing.assert_array_equal(last.get_data().values, [np.nan, np.nan, 1.5, 1.5, 1.5])


def test_a_mask_s_picture():
    spec = WindowSpec(3, 3, 0, True)
    image, = plot_mask(spec, 10).images
    np.testing.assert_array_equal(image.get_array(), spec.visible(np.arange(10), np.arange(10)))


@pytest.mark.parametrize("call, error, message", [
    (lambda: plot_mask((3, 3), 5), TypeError, "For 'plot_mask', 'spec' must be a WindowSpec, but got (3, 3)"),
    (lambda: plot_weights([np.ones((2, 2))], names="layer"), TypeError,
     "For 'plot_weights', 'names' must be None or a list, but got 'layer'"),
    (lambda: plot_weights([np.ones((2, 2))], names=[]), ValueError,
     "For 'plot_weights', 'names' must be as many as weights, 1, but got 0."),
    (lambda: plot_weights([]), ValueError,
     "For 'plot_weights', 'weights' must be a list of at least one array, but got []."),
    (lambda: plot_mask(WindowSpec(3, 3, 0, True), 0), ValueError, "'n' must be a positive int, but got 0."),
    (lambda: attention_weights(nn.Dense(2, 3), ops.ones((2, 2))), ValueError,
     "For 'attention_weights', 'model' must be one with attention of this package, but got Dense."),
])
def test_misuse_is_named(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value)


def test_matplotlib_is_named_where_it_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # an import of it raises ImportError
    with pytest.raises(ImportError, match="local_attention.plot needs matplotlib, which is not installed here."):
        plot_mask(WindowSpec(3, 3, 0, True), 5)


def test_examples():
    assert doctest.testmod(plot).failed == 0
