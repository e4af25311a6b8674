"""Running one block alone gives what the model's own scan gives there."""

import pathlib

import jax
import numpy as np
import pytest

from taskvec import models
from taskvec.adaptive import blocks

RECORDED = pathlib.Path(__file__).parent.parent / "models" / "recorded"


@pytest.mark.parametrize("folder", ["clip_tower", "vit_odd", "roberta_tiny"])
def test_block_by_block(folder):
    model, params = models.load(RECORDED / folder, **({"part": "body"} if folder == "vit_odd" else {}))
    rng = np.random.default_rng(0)
    if folder == "roberta_tiny":
        batch = {"ids": rng.integers(3, 20, (2, 6)).astype(np.int32), "mask": np.arange(6)[None] < [[6], [4]]}
    else:
        size = model.config.image_size
        batch = {"image": rng.normal(size=(2, size, size, 3)).astype(np.float32)}
    path = blocks.stack_of(params)
    outside, stack = blocks.replaced(params, path, {}), blocks.get(params, path)

    @jax.jit
    def both(params, outside, batch):
        wanted = model.apply(params, batch, capture=("block",))["block"]
        x = blocks.embedded(model.apply, outside, path, blocks.one_layer(stack, 0), batch)
        found = []
        for i in range(wanted.shape[0]):
            x = blocks.run_block(model.apply, outside, path, blocks.one_layer(stack, i), batch, x)
            found.append(x)
        return wanted, jax.numpy.stack(found), blocks.token_weights(x, batch)

    wanted, found, weights = both(params, outside, batch)
    assert wanted.shape[0] > 1 and np.abs(np.diff(wanted, axis=0)).max() > 1e-3
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    np.testing.assert_array_equal(weights, batch.get("mask", np.ones(found.shape[1:3])))


def test_errors():
    with pytest.raises(ValueError, match="the model has none"):
        blocks.stack_of({"blocks": {"0": {"w": np.ones(2)}}})
    with pytest.raises(ValueError, match="packed"):
        blocks.token_weights(np.ones((1, 2, 3)), {"sentence": 0})
