"""Every section of docs/recipes.md runs. Its `out` is what all n² scores give, with a mask in the method's words."""
import runpy

import mindspore as ms
import numpy as np
import pytest

from test_readme import RECIPES, with_shapes_asserted

ms.set_seed(3)


def attention(got, seen, bias=0., q=None, k=None, v=None):
    """Return attention of a section's q, k and v over the keys that are seen, from all scores, in float64."""
    q, k, v = (np.asarray(got[name].asnumpy() if x is None else x, np.float64) for name, x in zip("qkv", (q, k, v)))
    scores = np.where(seen, q @ k.swapaxes(-1, -2) * q.shape[-1] ** -.5 + bias, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


def places(n):
    return np.arange(n)[:, None], np.arange(n)[None]


def moving(n, before, after):
    i, j = places(n)
    return (i - before <= j) & (j <= i + after)


def in_order(got, before, after):
    order = got["order"].asnumpy()
    seen = moving(order.shape[1], before, after) & (order[:, None, :] <= order[:, :, None])
    return attention(got, seen[:, None])


def images(got):
    image, (i, j) = got["image"].asnumpy()[0], places(12)
    same = (image[:, None] == image) & (image > 0)
    return attention(got, moving(12, 5, 5) & ((j <= i) | same))


def prefix_lm(got):
    i, j = places(100)
    prompt = got["prompt"].asnumpy().reshape(2, 1, 1)
    return attention(got, (moving(100, 39, 39) & ((j <= i) | (i < prompt) & (j < prompt)))[:, None])


def alibi(got):
    i, j = places(100)
    slopes = np.array([1 / 4, 1 / 16, 1 / 64, 1 / 256]).reshape(4, 1, 1)
    return attention(got, moving(100, 31, 0), slopes * (j - i))


def transformer_xl(got):
    q, u, w, embeddings = (got[name].asnumpy().astype(np.float64) for name in ("q", "u", "w", "embeddings"))
    i, j = places(100)
    offsets = (q + w) @ embeddings.T * 32 ** -.5
    bias = np.take_along_axis(offsets, np.broadcast_to(np.clip(j - i + 8, 0, 16), (1, 4, 100, 100)), -1)
    return attention(got, moving(100, 8, 8), bias, q=q + u)


def swin(got):
    """Attention between patches of one window that also were neighbours before the picture was rolled."""
    y, x = (axis.reshape(2, 4, 2, 4).swapaxes(1, 2).reshape(-1) for axis in np.indices((8, 8)))
    window = y // 4 * 2 + x // 4
    rolled = (y >= 6) * 2 + (x >= 6)  # these came from the other side
    seen = (window[:, None] == window) & (rolled[:, None] == rolled)
    relative = got["relative"].asnumpy()[:, :, 0]
    return attention(got, seen, np.tile(relative, (1, 1, 4, 4)))


def streaming_llm(got):
    i, j = places(100)
    return attention(got, (j <= i) & ((j > i - 28) | (j < 4)))


def longformer(got):
    i, j = places(100)
    everywhere = np.isin(np.arange(100), [0, 41, 99])
    return attention(got, moving(100, 8, 8) | everywhere[:, None] | everywhere)


def streaming(got):
    i, j = places(100)
    return attention(got, (j >= i // 16 * 16 - 32) & (j <= i // 16 * 16 + 15 + 4))


def deepseek(got):
    i, j = np.arange(96)[:, None], np.arange(12)[None]
    seen = np.concatenate((moving(96, 23, 0), j < i // 8), 1)
    k, v = (np.concatenate((got[name].asnumpy(), got["short_" + name].asnumpy()), 2) for name in "kv")
    return attention(got, seen, k=k, v=v)


def dilation(got):
    i, j = places(96)
    return attention(got, (j <= i) & (j > i - 24) & ((i - j) % 4 == 0))


WANTED = {
    "MLA": lambda got: attention(got, moving(100, 23, 0)), "Prefix LM": prefix_lm, "Images in a causal row": images,
    "Block diffusion": lambda got: in_order(got, 32, 7), "XLNet": lambda got: in_order(got, 20, 20), "ALiBi": alibi,
    "Transformer-XL and Conformer": transformer_xl, "Swin": swin, "StreamingLLM": streaming_llm,
    "Longformer": longformer, "Chunked streaming audio": streaming, "DeepSeek-V4": deepseek, "Dilation": dilation,
    "Cross-attention": lambda got: attention(got, got["mask"].asnumpy()[:, None, None])}


def test_every_section_is_compared():
    assert set(WANTED) == {title for title, _ in RECIPES}


@pytest.mark.parametrize("title, code", RECIPES, ids=[title for title, _ in RECIPES])
def test_recipe(title, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "block.py").write_text(with_shapes_asserted(code), encoding="utf-8")
    got = runpy.run_path("block.py")
    np.testing.assert_allclose(got["out"].asnumpy(), WANTED[title](got), atol=2e-5, rtol=2e-5)
