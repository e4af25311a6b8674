"""EfficientNet-Lite0 against the numbers of the PyTorch package (tests/parity/record.py)."""

import hashlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskvec import models, tree as trees
from taskvec.io.torch_checkpoint import load_state_dict
from taskvec.models import efficientnet

RECORDED = pathlib.Path(__file__).parent / "recorded" / "efficientnet.npz"


@pytest.fixture(scope="module")
def loaded(efficientnet_file):
    return models.load(efficientnet_file)


@pytest.mark.parametrize(("seed", "name"), [(0, "square"), (1, "wide"), (2, "odd")])
def test_features_equal_pytorchs(loaded, seed, name):
    model, params = loaded
    with np.load(RECORDED) as file:
        size, total, features = (file[f"{name}_{what}"] for what in ("size", "sum", "features"))
    image = np.random.default_rng(seed).integers(0, 256, (3, *size, 3), np.uint8)
    assert image.sum(dtype=np.int64) == total, "numpy draws other images than when the numbers were recorded"
    mine = jax.jit(model.apply)(params, {"image": image})["features"]
    np.testing.assert_allclose(mine, features, rtol=1e-4, atol=1e-5 * float(np.abs(features).max()))


def test_params_are_98_tensors_and_floats_in_unit_range_mean_the_same(loaded):
    model, params = loaded
    assert len(trees.tensors(params)) == 98
    assert sum(x.size for x in jax.tree.leaves(params)) == 3_350_000
    image = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
    apply = jax.jit(model.apply)
    a = apply(params, {"image": image})["features"]
    b = apply(params, {"image": image.astype(np.float32) / 255})["features"]
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(("k", "stride", "size"), [(3, 1, (7, 6)), (3, 2, (7, 6)), (5, 2, (8, 3)), (5, 1, (2, 1))])
def test_depthwise_is_the_grouped_convolution(k, stride, size):
    keys = jax.random.split(jax.random.key(k), 3)
    x, kernel = jax.random.normal(keys[0], (2, *size, 4)), jax.random.normal(keys[1], (k, k, 4))
    weights = {"kernel": kernel, "bias": jax.random.normal(keys[2], (4,))}
    axes = ("NHWC", "HWIO", "NHWC")
    expected = jax.lax.conv_general_dilated(
        x, kernel[:, :, None], (stride, stride), "SAME", dimension_numbers=axes, feature_group_count=4
    )
    np.testing.assert_allclose(efficientnet._depthwise(weights, x, stride), expected + weights["bias"], atol=1e-5)


def test_what_it_refuses(loaded):
    model, params = loaded
    with pytest.raises(ValueError, match="not scanned"):
        model.apply(params, {"image": jnp.zeros((1, 32, 32, 3))}, layer_params=lambda x: x)
    with pytest.raises(ValueError, match=r"no tensor _blocks\.0\._bn1\.weight"):
        efficientnet.fold({"a": np.zeros(3)})


def test_the_real_file_reads_as_torch_reads_it(efficientnet_file):
    """Checksums recorded from what ``torch.load`` gives."""
    found = load_state_dict(efficientnet_file)
    assert len(found) == 296
    digest = hashlib.sha256()
    for name, x in found.items():
        digest.update(f"{name}{x.dtype}{x.shape}".encode() + x.tobytes())
    assert digest.hexdigest() == "623410201e6869bde89bd8a151dc60434dfeb598965ff44f3c6ebe720b56804e"
