"""Weights of models whose parts were put together anew: a Parameter in two places, and Cells in place of others."""
import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from local_attention import LocalTransformer, export_torch_weights, load_torch_weights

TOKENS = Tensor(np.arange(8).reshape(1, 8).astype(np.int32))


def model(tied=False):
    made = LocalTransformer(num_tokens=11, max_seq_len=16, dim=8, depth=2, heads=2, dim_head=4,
                            local_attn_window_size=4)
    if tied:
        made.to_logits[1].weight = made.token_emb.embedding_table
    return made


def test_tied_embeddings_have_both_names_in_an_export_and_load_from_both():
    there, here = model(tied=True), model(tied=True)
    weights = export_torch_weights(there)
    assert set(weights) == set(export_torch_weights(model()))
    np.testing.assert_array_equal(weights["token_emb.weight"], weights["to_logits.1.weight"])
    assert load_torch_weights(here, weights) == []
    np.testing.assert_array_equal(here(TOKENS).asnumpy(), there(TOKENS).asnumpy())
    assert here.to_logits[1].weight is here.token_emb.embedding_table
    one = {name: value for name, value in weights.items() if name != "token_emb.weight"}
    assert load_torch_weights(model(tied=True), one) == []


def test_unequal_values_of_one_parameter_are_refused_and_change_nothing():
    here = model(tied=True)
    before, weights = export_torch_weights(here), export_torch_weights(model())
    with pytest.raises(ValueError, match="'to_logits.1.weight' differs from 'token_emb.weight', which is the same"):
        load_torch_weights(here, weights)
    for name, value in export_torch_weights(here).items():
        np.testing.assert_array_equal(value, before[name])
    assert load_torch_weights(here, {f"module.{name}": value for name, value in weights.items()}, strict=False) == [
        "module.to_logits.1.weight"]
    np.testing.assert_array_equal(export_torch_weights(here)["to_logits.1.weight"], weights["token_emb.weight"])


@pytest.mark.parametrize("broken", ["token_emb.weight", "to_logits.1.weight"])
def test_of_two_names_the_one_that_fits_is_loaded(broken):
    there, here = model(tied=True), model(tied=True)
    weights = {**export_torch_weights(there), broken: np.ones((3, 3))}
    assert load_torch_weights(here, weights, strict=False) == [broken]
    np.testing.assert_array_equal(here(TOKENS).asnumpy(), there(TOKENS).asnumpy())


def test_a_layer_that_is_in_two_places_has_the_names_of_both():
    there, here = model(), model()
    for one in (there, here):
        one.layers[1] = one.layers[0]
    weights = export_torch_weights(there)
    assert set(weights) == set(export_torch_weights(model()))
    assert load_torch_weights(here, weights) == []
    np.testing.assert_array_equal(here(TOKENS).asnumpy(), there(TOKENS).asnumpy())


class Adapter(nn.Cell):
    def __init__(self, dense):
        super().__init__()
        self.dense, self.down = dense, ms.Parameter(ops.zeros((8, 2), ms.float32), name="down")

    def construct(self, x):
        return self.dense(x)


def test_cells_in_place_of_others_are_named():
    here = model()
    here.layers[1][0].to_qkv = Adapter(here.layers[1][0].to_qkv)
    names = ["layers.1.0.to_qkv.dense.weight", "layers.1.0.to_qkv.down"]
    with pytest.raises(ValueError, match="For 'export_torch_weights', 'cell' must be .*, but got one with ") as error:
        export_torch_weights(here)
    assert all(name in str(error.value) for name in names)
    left_out = load_torch_weights(here, export_torch_weights(model()), strict=False)
    assert sorted(left_out) == ["layers.1.0.branch.to_qkv.weight", *names]
