"""Padding on the left shifts nothing: real tokens get what they get without the padding."""
import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops

from local_attention import LocalMHA, LocalTransformer

B, N, W, TOKENS = 3, 13, 3, 31
PADS = [0, 4, 9]
MODEL = dict(num_tokens=TOKENS, dim=20, depth=2, heads=2, dim_head=10, local_attn_window_size=W, max_seq_len=17)
# spans that move with their query, where only positions shift, and others
FREE = [dict(), dict(use_xpos=True), dict(causal=False, look_backward=2), dict(local_attn_window_size=(W, None))]
ALIGNED = [dict(exact_windowsize=False), dict(exact_windowsize=False, use_xpos=True), dict(prefix=2),
           dict(exact_windowsize=False, use_dynamic_pos_bias=True, causal=False),
           dict(global_attn_layer=LocalMHA(dim=20, heads=2, dim_head=10, window_size=5, causal=True,
                                           exact_windowsize=False))]


def inputs():
    x, mask = np.random.randint(0, TOKENS, (B, N)).astype(np.int32), np.arange(N) >= np.array(PADS)[:, None]
    mask[1, 7] = False  # a hole
    return x, mask


def alone(cell, x, mask, row, begin, end=N):
    return cell(Tensor(x[row:row + 1, begin:end]), mask=Tensor(mask[row:row + 1, begin:end]))


def assert_rows_as_alone(found, cell, x, mask):
    for row, pads in enumerate(PADS):
        np.testing.assert_allclose(found[row, pads:], alone(cell, x, mask, row, pads).asnumpy()[0], atol=1e-5)


@pytest.mark.parametrize("settings", FREE + ALIGNED, ids=lambda settings: ",".join(settings) or "exact")
def test_logits_of_a_padded_row_are_those_of_the_row_alone(settings):
    cell, (x, mask) = LocalTransformer(**{**MODEL, **settings}), inputs()
    assert_rows_as_alone(cell(Tensor(x), mask=Tensor(mask)).asnumpy(), cell, x, mask)


@pytest.mark.parametrize("settings", [FREE[0], ALIGNED[0]], ids=lambda settings: ",".join(settings) or "exact")
def test_gradients_of_a_padded_row_are_those_of_the_row_alone(settings):
    cell, (x, mask) = LocalTransformer(**MODEL, **settings), inputs()
    weights = Tensor(np.random.randn(B, N, TOKENS).astype(np.float32) * mask[..., None])

    def of_all(x, mask):
        return (cell(x, mask=mask) * weights).sum()

    def of_each():
        return sum((alone(cell, x, mask, row, pads) * weights[row:row + 1, pads:]).sum()
                   for row, pads in enumerate(PADS))
    parameters = cell.trainable_params()
    wanted = ms.grad(of_each, None, parameters)()
    step = ms.grad(of_all, None, parameters)

    @ms.jit
    def compiled(x, mask):
        return step(x, mask)
    for call in (step, compiled):
        for found, one in zip(call(Tensor(x), Tensor(mask)), wanted):
            np.testing.assert_allclose(found.asnumpy(), one.asnumpy(), atol=2e-4)
            assert np.abs(one.asnumpy()).max() > 0


@pytest.mark.parametrize("settings", [FREE[0], ALIGNED[0]], ids=lambda settings: ",".join(settings) or "exact")
def test_the_loss_is_of_the_same_labels_as_without_a_mask(settings):
    cell, (x, mask) = LocalTransformer(**MODEL, **settings), inputs()
    logits = cell(Tensor(x[:, :-1]), mask=Tensor(mask[:, :-1]))
    wanted = ops.cross_entropy(logits.reshape(-1, TOKENS), Tensor(x[:, 1:].reshape(-1))).asnumpy()
    found = cell(Tensor(x), mask=Tensor(mask), return_loss=True)
    np.testing.assert_allclose(found.asnumpy(), wanted, rtol=1e-5)


@pytest.mark.parametrize("settings", [FREE[0], ALIGNED[0]], ids=lambda settings: ",".join(settings) or "exact")
def test_in_a_graph_for_every_length(settings):
    (x, mask), (cell, compiled) = inputs(), (LocalTransformer(**MODEL, **settings) for _ in range(2))
    ms.load_param_into_net(compiled, cell.parameters_dict())
    compiled.set_inputs(Tensor(shape=[None, None], dtype=ms.int32), Tensor(shape=[None, None], dtype=ms.bool_))
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        found = compiled(Tensor(x), Tensor(mask)).asnumpy()
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)
    assert_rows_as_alone(found, cell, x, mask)


@pytest.mark.parametrize("settings", [FREE[0], ALIGNED[0], ALIGNED[2]],
                         ids=lambda settings: ",".join(settings) or "exact")
def test_documents_with_padding_on_the_left_of_each(settings):
    cell, (x, mask) = LocalTransformer(**MODEL, **settings), inputs()
    mask[:, 6:8] = [[False, False], [True, False], [False, True]]
    found = cell(Tensor(x), mask=Tensor(mask), segment_ids=Tensor(np.repeat([[4] * 6 + [2] * 7], B, 0), ms.int32))
    for row in range(B):
        for begin, end in ((0, 6), (6, N)):
            real = mask[row, begin:end]
            if real.any():
                begin += real.argmax()
                one = alone(cell, x, mask, row, begin, end).asnumpy()[0]
                np.testing.assert_allclose(found.asnumpy()[row, begin:end], one, atol=1e-5)


def test_the_likeliest_token_is_that_of_generate():
    cell, (x, mask) = LocalTransformer(**MODEL), inputs()
    mask[1, 7] = True
    first = cell.generate(Tensor(x), 1, temperature=0, mask=Tensor(mask)).asnumpy()[:, 0]
    np.testing.assert_array_equal(cell(Tensor(x), mask=Tensor(mask)).asnumpy()[:, -1].argmax(-1), first)
