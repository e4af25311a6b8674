"""Exact order statistics against np.partition, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import taskvec as tv
from taskvec.transforms.order import kth_magnitude


@pytest.mark.parametrize("n", [1, 2, 7, 1000, 65_537])
@pytest.mark.parametrize("kind", ["normal", "ties", "zeros", "tiny", "bf16"])
def test_kth_magnitude_is_exact(n, kind):
    rng = np.random.default_rng(n)
    x = rng.standard_normal(n).astype(np.float32)
    x = {
        "normal": x,
        "ties": np.round(x * 2) / 2,
        "zeros": x * (rng.random(n) < 0.1),
        "tiny": x * np.float32(1e-30),
        "bf16": np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32),
    }[kind]
    for rank in sorted({1, n, n // 2 + 1, n - n // 5}):
        if 1 <= rank <= n:
            expected = np.partition(np.abs(x), rank - 1)[rank - 1]
            assert np.asarray(jax.jit(kth_magnitude)(x, rank)) == expected


def test_kept_counts_of_both_rules():
    """n = 1000 without ties keeps 200 by the paper's rule and 201 by the released code's."""
    x = np.random.default_rng(0).permutation(np.linspace(1, 2, 1000)).astype(np.float32).reshape(1, 20, 50)
    for rule, kept in [("paper", 200), ("released", 201)]:
        out = tv.transform_task_vectors(tv.trim(0.2, rule=rule), {"w": x[0]}, {"w": x})["w"]
        assert int((out != 0).sum()) == kept


def test_frozen_entries_may_count_in_the_density():
    """Counted, 400 of 500 + 500 entries are kept at density 0.4; all of them lie in the half that takes part."""
    x = np.random.default_rng(0).permutation(np.linspace(1, 2, 500)).astype(np.float32)[None]
    model, tau = {"a": x[0], "frozen": np.zeros(500, np.float32)}, {"a": x, "frozen": np.zeros((1, 500), np.float32)}
    for counted, kept in [(False, 200), (True, 400)]:
        policy = tv.LeafPolicy(include="^a$", count_excluded=counted)
        out = tv.transform_task_vectors(tv.trim(0.4), model, tau, policy=policy)
        assert int((out["a"] != 0).sum()) == kept
