"""The parametrisations of aTLAS x K, LoraHub and Self Positioning: merged in the scan = merged whole."""

import jax
import jax.numpy as jnp
import numpy as np

from taskvec import tree as trees
from taskvec.adaptive.atlas_parts import free_coefficients
from taskvec.adaptive.coefficients import coefficients
from taskvec.adaptive.learn import Problem
from taskvec.adaptive.lorahub import composed
from taskvec.adaptive.merged import merged_apply
from taskvec.adaptive.parametrisation import LowRank
from taskvec.adaptive.self_positioning import scaled
from tests.adaptive import toy_models as toy

TASKS = 2


def test_scanned_equals_whole():
    (theta0, tau), batch, rng = toy.model(0, TASKS), toy.batch(1, 4), np.random.default_rng(2)
    factor = lambda *shape: jnp.asarray(rng.normal(0, 0.3, shape), jnp.float32)
    tau["blocks"]["mlp"]["up"] = LowRank(
        factor(toy.LAYERS, TASKS, toy.WIDTH, 2), factor(toy.LAYERS, TASKS, 2, toy.HIDDEN)
    )
    groups = trees.groups(theta0, "task")
    for made in (
        scaled(composed(coefficients(groups, TASKS, 0.0, "softmax")), 0.7),
        free_coefficients(Problem(toy.apply, theta0, tau, None, True), "tensor", 3, "matrices"),
    ):
        learnables = jax.tree.map(lambda x: jnp.asarray(rng.normal(0.3, 0.2, x.shape), x.dtype), made.init())
        lazy = lambda path, shape: path == "embeddings/word"
        encoders = [merged_apply(toy.apply, made, scanned=scanned, lazy=lazy) for scanned in (True, False)]

        def both(learnables, weights, batch, encoders=encoders):
            return [encode(learnables, weights, batch)["features"] for encode in encoders]

        found, expected = jax.jit(both)(learnables, (theta0, tau), batch)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
        assert np.abs(np.asarray(found) - toy.apply(theta0, batch)["features"]).max() > 0.01
