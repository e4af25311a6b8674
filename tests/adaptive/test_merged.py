"""Merging inside the scan: same numbers as the whole merge, the gradient identity, and no whole merged model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taskvec import tree as trees
from taskvec.adaptive.coefficients import coefficients
from taskvec.adaptive.merged import LazyTable, merged_apply
from tests.adaptive import toy_models as toy

TASKS = 3
TABLE = lambda path, shape: path == "embeddings/word"


def losses(theta0):
    groups = trees.groups(theta0, "tensor")
    lam = np.random.default_rng(3).uniform(0.1, 0.9, (len(groups.names), TASKS))
    parametrisation = coefficients(groups, TASKS)

    def loss(scanned, **kwargs):
        encode = merged_apply(functools.partial(toy.apply, **kwargs), parametrisation, scanned=scanned, lazy=TABLE)
        return lambda learnables, weights, batch: jnp.sin(encode(learnables, weights, batch)["features"]).sum()

    return loss, parametrisation, {"lam": jnp.asarray(lam, theta0["norm"]["scale"].dtype)}


def test_scanned_equals_whole():
    weights, batch = toy.model(0, TASKS), toy.batch(1, 4)
    loss, _, learnables = losses(weights[0])
    value_and_grad = {s: jax.jit(jax.value_and_grad(loss(s)))(learnables, weights, batch) for s in (True, False)}
    np.testing.assert_allclose(value_and_grad[True][0], value_and_grad[False][0], rtol=1e-5)
    grads = [value_and_grad[s][1]["lam"] for s in (True, False)]
    np.testing.assert_allclose(*grads, rtol=1e-5, atol=1e-5 * np.abs(grads[1]).max())


def test_gradient_is_the_inner_product_of_weight_gradient_and_task_vector():
    with jax.enable_x64(True):
        weights, batch = toy.model(0, TASKS, jnp.float64), toy.batch(1, 4)
        loss, parametrisation, learnables = losses(weights[0])
        found = np.asarray(jax.jit(jax.grad(loss(True)))(learnables, weights, batch)["lam"])
        merged = jax.jit(parametrisation.merge)(*weights, learnables)
        grads = jax.jit(jax.grad(lambda p: jnp.sin(toy.apply(p, batch)["features"]).sum()))(merged)
        grads, tau = trees.flatten(grads), trees.flatten(weights[1])
        for g, name in enumerate(trees.groups(weights[0], "tensor").names):
            path, layer = trees.tensors(weights[0])[name]
            dl, vectors = np.asarray(grads[path]), np.asarray(tau[path])
            if layer is not None:
                dl, vectors = dl[layer], vectors[layer]
            expected = [np.sum(dl * vectors[t]) for t in range(TASKS)]
            np.testing.assert_allclose(found[g], expected, rtol=1e-6, atol=1e-12)


def shapes_made(jaxpr):
    """Shapes of everything that a program computes, inner programs included."""
    for eqn in jaxpr.eqns:
        yield from (tuple(var.aval.shape) for var in eqn.outvars)
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from shapes_made(inner)


def test_no_whole_merged_model_exists_in_the_scanned_gradient():
    weights, batch = toy.model(0, TASKS), toy.batch(1, 4)
    loss, _, learnables = losses(weights[0])
    stack, table = (toy.LAYERS, toy.WIDTH, toy.HIDDEN), (toy.VOCAB, toy.WIDTH)
    slices = (toy.LAYERS, TASKS, toy.WIDTH, toy.HIDDEN)

    def made(fn):
        return set(shapes_made(jax.make_jaxpr(jax.grad(fn))(learnables, weights, batch).jaxpr))

    assert not {stack, table, slices} & made(loss(True))
    assert {stack, table} <= made(loss(False))  # the same search does find them where they are
    # Where the model keeps all it computes, merged weights are among that; task vectors are not.
    assert not {table, slices} & made(loss(True, checkpoint=False))


def test_a_lazy_table_is_the_merged_table():
    (theta0, tau), ids = toy.model(0, TASKS), np.array([[3, 3], [49, 0]])
    parametrisation = coefficients(trees.groups(theta0, "task"), TASKS, 0.4)
    whole = parametrisation.merge(theta0, tau, parametrisation.init())["embeddings"]["word"]
    args = theta0["embeddings"]["word"], tau["embeddings"]["word"], jnp.full(TASKS, 0.4), parametrisation.merge_tensor
    table = LazyTable(*args)
    np.testing.assert_allclose(jax.jit(lambda t: t.take(ids, axis=0))(table), whole[ids], rtol=1e-6)
    np.testing.assert_allclose(jnp.dot(jnp.ones(toy.VOCAB), table), whole.sum(0), rtol=1e-5, atol=1e-5)
    assert table.shape == whole.shape and table.dtype == whole.dtype
    with pytest.raises(ValueError, match="axis 0"):
        table.take(ids, axis=1)


def test_an_unscanned_model_is_refused_with_the_remedy():
    theta0, tau = {"w": jnp.ones(2)}, {"w": jnp.ones((1, 2))}
    parametrisation = coefficients(trees.groups(theta0, "task"), 1)
    with pytest.raises(ValueError, match="scanned=False"):
        merged_apply(toy.apply, parametrisation, scanned=True)(parametrisation.init(), (theta0, tau), {})
