"""What `explain` and `explain_attention` say, on any device, without a tensor."""
import mindspore as ms
import pytest

from local_attention import LocalAttention, WindowSpec, explain_attention
from local_attention.explanation import OPTIONS

SPEC = WindowSpec.from_sliding_window(256)


@pytest.mark.parametrize("device, dtype, first", [
    ("Ascend", ms.float16, "ascend"), ("Ascend", ms.float32, "blocked"), ("GPU", ms.float32, "blocked")])
def test_a_device_that_is_not_there(device, dtype, first):
    text = explain_attention((1, 8, 4096, 64), SPEC, dtype=dtype, device=device)
    assert text.startswith(f"{first}: runs this\n") and "native: runs on CPU alone" in text
    text = LocalAttention(128, causal=True, dim=64).explain(1024, dtype, device=device)
    assert text.startswith(f"{first}: runs this\n")
    assert "\nthese numbers are for 1 head of one row\n" in text


def test_the_whole_call_is_counted():
    one = explain_attention((1, 1, 512, 64), SPEC, device="GPU").splitlines()
    many = explain_attention((2, 3, 512, 64), SPEC, device="GPU").splitlines()
    count = [int(line.split(": ")[1].split()[0].replace(",", "")) for lines in (one, many) for line in lines
             if line.startswith("multiply-adds")]
    assert count[1] == 6 * count[0] and "these numbers are for all heads of all rows: 2 x 3" in many


def test_every_option_is_named():
    options = [name for name in OPTIONS if name not in ("order", "cu_seqlens")]  # those exclude two of the others
    text = explain_attention((2, 8, 100, 64), WindowSpec(1, 9, 0, True), k_shape=(2, 2, 200, 64), options=options)
    options = next(line for line in text.splitlines() if line.startswith("options: "))
    for words in ("4 query heads to a key head", "a key mask", "documents", "a bias", "sinks", "softcap", "dropout",
                  "the log-sum-exp"):
        assert words in options


@pytest.mark.parametrize("change, error, message", [
    (dict(q_shape=(1, 8, 64)), ValueError, "'q_shape' must be of four axes, (batch, heads, n, d), but got (1, 8, 64)."),
    (dict(q_shape=8), TypeError, "'q_shape' must be a tuple of four ints, but got 8"),
    (dict(q_shape=(1, 8, 0, 64)), ValueError, "'q_shape' must be a positive int, but got 0."),
    (dict(spec=7), TypeError, "'spec' must be a WindowSpec, but got 7"),
    (dict(k_shape=(1, 3, 4096, 64)), ValueError, "'k_shape' must be (1, h_kv, n_k, 64), h_kv a divisor of 8"),
    (dict(q_shape=(1, 1, 8, 64), k_shape=(1, 4096, 2, 64)), ValueError,
     "'k_shape' must be (1, h_kv, n_k, 64), h_kv a divisor of 1 and n_k at least 8 (heads stand before tokens; here"),
    (dict(v_width=0), ValueError, "'v_width' must be a positive int, but got 0."),
    (dict(dtype="float16"), TypeError, "'dtype' must be None or MindSpore's float32, float16 or bfloat16"),
    (dict(device="TPU"), ValueError, "'device' must be None, 'CPU', 'GPU' or 'Ascend', but got 'TPU'."),
    (dict(options=("masks",)), ValueError, "'options' must be names of mask, segment_ids"),
    (dict(options=("attn_bias",), spec=WindowSpec(1, 2, 0, True, 2)), ValueError,
     "'attn_bias' and 'a prefix of 'spec'' cannot go together"),
    (dict(options=("attn_bias",), spec=WindowSpec.from_flash(-1)), ValueError, "'options' must be without 'attn_bias'"),
    (dict(options="mask"), TypeError, "'options' must be a tuple of names, but got 'mask'")])
def test_bad_arguments(change, error, message):
    with pytest.raises(error) as raised:
        explain_attention(**{**dict(q_shape=(1, 8, 4096, 64), spec=SPEC), **change})
    assert "For 'explain_attention', " + message in str(raised.value)
