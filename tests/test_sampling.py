"""What tokens are drawn from: the largest logits, and their softmax."""
import numpy as np
import pytest
from mindspore import Tensor, ops

from local_attention.generation import sample
from local_attention.transformer import top_k


def test_samples_are_of_the_softmax_of_what_is_kept():
    draws, temperature = 20000, 0.7
    logits = np.array([0.3, -1., 1.2, 0.9, -2.], np.float32)
    found = sample(np.tile(logits, (draws, 1)), temperature, 0.4)
    kept = np.sort(np.argsort(logits)[-3:])
    expected = np.exp(logits[kept] / temperature) / np.exp(logits[kept] / temperature).sum()
    assert set(found) == set(kept)
    frequencies = np.array([(found == token).mean() for token in kept])
    assert np.abs(frequencies - expected).max() < 4 * 0.5 / draws ** 0.5  # four times the largest standard deviation
    coldest = sample(np.tile(logits, (3, 1)), 1e-38, 0.)
    np.testing.assert_array_equal(coldest, [2, 2, 2])


@pytest.mark.parametrize("shape, thres, kept", [((2, 29), 0.9, 2), ((2, 7), 0.9, 1), ((29,), 0, 29), ((2, 3, 5), 1, 1)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_top_k(shape, thres, kept, dtype):
    logits = np.random.randn(*shape).astype(dtype)
    found = top_k(Tensor(logits), thres).asnumpy()
    assert found.dtype == dtype
    smallest = np.sort(logits, -1)[..., -kept, None]
    np.testing.assert_array_equal(found, np.where(logits >= smallest, logits, -np.inf))


def test_top_k_keeps_no_more_of_equal_logits():
    assert np.isfinite(top_k(ops.ones((3, 11)), 0.5).asnumpy()).sum(-1).tolist() == [5, 5, 5]
