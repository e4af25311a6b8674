"""Task vectors: differences in float32, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest

import taskvec as tv
from taskvec import tree as trees, vectors
from tests.models_for_tests import random_models


def test_layout_and_float32_differences():
    pretrained, finetuned = random_models(0, 2)
    half = lambda p: {**p, "embeddings": {"table": p["embeddings"]["table"].astype(jnp.bfloat16)}}
    tau = tv.task_vectors(half(pretrained), [half(f) for f in finetuned])
    assert tau["blocks"]["attention"]["kernel"].shape == (3, 2, 8, 8)
    assert tau["embeddings"]["table"].shape == (2, 37, 8) and tau["embeddings"]["table"].dtype == jnp.float32
    expected = np.asarray(half(finetuned[1])["embeddings"]["table"], np.float32) - np.asarray(
        half(pretrained)["embeddings"]["table"], np.float32
    )
    np.testing.assert_array_equal(tau["embeddings"]["table"][1], expected)
    assert vectors.num_tasks(tau) == 2


def test_vectors_in_half_precision():
    pretrained, finetuned = random_models(0, 2)
    half, whole = (tv.task_vectors(pretrained, finetuned, dtype) for dtype in (jnp.bfloat16, jnp.float32))
    for path, x in trees.flatten(half).items():
        exact = np.asarray(trees.flatten(whole)[path])
        assert x.dtype == jnp.bfloat16 and (np.abs(np.asarray(x, np.float32) - exact) <= np.abs(exact) / 256).all()


def test_negation_and_analogy():
    pretrained, (a, b, c) = random_models(0, 3)
    leaf = lambda p: np.asarray(p["blocks"]["mlp"]["down"], np.float64)
    np.testing.assert_allclose(
        leaf(vectors.negate(pretrained, a, 0.5)), leaf(pretrained) * 1.5 - leaf(a) * 0.5, atol=1e-6
    )
    np.testing.assert_allclose(leaf(vectors.analogy(pretrained, a, b, c)), leaf(c) + leaf(b) - leaf(a), atol=1e-6)
    merged = tv.merge("task_analogy", pretrained, [a, b, c])
    np.testing.assert_allclose(leaf(merged), leaf(c) + leaf(b) - leaf(a), atol=1e-6)


def test_models_that_do_not_match_are_refused():
    pretrained, (model,) = random_models(0, 1)
    missing = {k: v for k, v in model.items() if k != "stem"}
    with pytest.raises(ValueError, match="is missing stem/conv"):
        tv.merge("ties", pretrained, [missing])
    with pytest.raises(ValueError, match="has besides extra"):
        tv.merge("ties", pretrained, [model, {**model, "extra": jnp.zeros(2)}])
    with pytest.raises(ValueError, match=r"differs in shape head/bias: \(1,\) and \(4,\)"):
        tv.merge("ties", pretrained, [{**model, "head": {**model["head"], "bias": jnp.zeros(4)}}])
    with pytest.raises(ValueError, match="at least one fine-tuned model"):
        tv.merge("ties", pretrained, [])


def test_nan_is_named():
    pretrained, finetuned = random_models(0, 2)
    finetuned[1]["stem"]["conv"] = finetuned[1]["stem"]["conv"].at[0, 1, 1, 2].set(jnp.nan)
    with pytest.raises(ValueError, match="fine-tuned model 1 holds NaN or infinity in stem/conv"):
        tv.merge("weight_average", pretrained, finetuned)
