"""Frozen heads against their formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskvec.training import heads


def test_class_means_and_logits():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(20, 5)), rng.permutation(np.arange(20) % 3)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    means = np.stack([unit[labels == c].mean(0) for c in range(3)])
    expected = (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    kernel = heads.class_means(features, labels, 3)
    np.testing.assert_allclose(kernel, expected, rtol=1e-5, atol=1e-6)
    made = heads.make_heads([kernel, kernel[:, :2]], scale=20.0)
    assert made.kernel.shape == (2, 5, 3) and made.class_mask.tolist() == [[True] * 3, [True, True, False]]
    logits = heads.all_logits(made, jnp.asarray(np.stack([features, features]), jnp.float32))
    np.testing.assert_allclose(logits[0], 20 * unit @ expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(logits[1, :, :2], 20 * unit @ expected[:, :2], rtol=1e-4, atol=1e-4)
    assert (logits[1, :, 2] == -1e9).all()
    bias = rng.normal(size=(2, 3)).astype(np.float32)
    biased = heads.all_logits(made._replace(bias=bias), jnp.asarray(np.stack([features, features]), jnp.float32))
    np.testing.assert_allclose(biased[1, :, :2], 20 * unit @ expected[:, :2] + bias[1, :2], rtol=1e-4, atol=1e-4)
    assert (biased[1, :, 2] == -1e9).all()
    one = heads.task_logits(made._replace(bias=bias), 1, jnp.asarray(features, jnp.float32))
    np.testing.assert_allclose(one, biased[1], rtol=1e-6)


def test_a_zero_feature_has_finite_logits_and_gradient():
    kernel, mask = jnp.ones((4, 2)), jnp.array([True, False])
    grad = jax.grad(lambda z: heads.logits(kernel, mask, 20.0, z)[:, 0].sum())(jnp.zeros((1, 4)))
    assert jnp.isfinite(grad).all()


def test_every_class_needs_a_row():
    with pytest.raises(ValueError, match=r"0\.\.2 .* none for \[1\]"):
        heads.class_means(np.ones((2, 3)), np.array([0, 2]), 3)
    with pytest.raises(ValueError, match=r"0\.\.1 .* up to 2"):
        heads.class_means(np.ones((3, 3)), np.array([0, 1, 2]), 2)


def test_zero_shot_is_the_formula_of_the_published_heads():
    """Normalise each prompt's feature, mean over templates, normalise; the same for any batch size."""
    table = np.random.default_rng(0).normal(size=(128, 6)).astype(np.float32)
    seen = []

    def tokenize(texts):
        seen.append(len(texts))
        return {"ids": np.array([[ord(c) % 128 for c in text.ljust(30)] for text in texts])}

    encode = lambda batch: jnp.asarray(table)[batch["ids"]].sum(1)
    classes, templates = ("cat", "dog {x}", "fish"), ("a photo of a {}.", "{}!")
    kernel = heads.zero_shot(encode, tokenize, classes, templates, batch_size=4)
    assert kernel.shape == (6, 3) and seen == [4, 4]
    for c, name in enumerate(classes):
        z = np.array(
            [table[[ord(ch) % 128 for ch in t.replace("{}", name).ljust(30)]].sum(0) for t in templates], np.float64
        )
        mean = (z / np.linalg.norm(z, axis=1, keepdims=True)).mean(0)
        np.testing.assert_allclose(kernel[:, c], mean / np.linalg.norm(mean), atol=1e-6)
    np.testing.assert_allclose(heads.zero_shot(encode, tokenize, classes, templates), kernel, atol=1e-6)
    with pytest.raises(ValueError, match=r"one \{\} each"):
        heads.zero_shot(encode, tokenize, classes, ("a photo",))
