"""Merging by coefficients: formula, layouts, dtypes, constraints, errors."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import taskvec as tv
from taskvec import tree as trees
from taskvec.adaptive.coefficients import clip01, coefficients, effective
from taskvec.adaptive.parametrisation import LayerOf, weighted_sum
from taskvec.models import clip
from tests.models_for_tests import random_models


def oracle(theta0, experts, lam, mode, constraint, numbering):
    """Per-layer tensor by per-layer tensor, in float64, from the experts themselves."""
    c = lam.astype(np.float64)
    c = {"clip": np.clip(c, 0, 1), "identity": c, "tanh": np.tanh(c)}.get(constraint, np.exp(c))
    c = c / c.sum(-1, keepdims=True) if constraint == "softmax" else c
    flat0 = {k: np.asarray(v, np.float64) for k, v in trees.flatten(trees.unstack_layers(theta0)).items()}
    flat = [{k: np.asarray(v, np.float64) for k, v in trees.flatten(trees.unstack_layers(e)).items()} for e in experts]
    names, out = set(), {}
    for path, x in flat0.items():
        block = path.split("/")[:2] if path.startswith("blocks/") else ["outside"]
        name = {"task": "all", "tensor": path, "module": path.rpartition("/")[0] or path, "block": "/".join(block)}[
            mode
        ]
        names.add(name)
        out[path] = x + sum(c[numbering.index(name), t] * (e[path] - x) for t, e in enumerate(flat))
    return out, names


@pytest.mark.parametrize(
    "mode, constraint, tasks",
    [
        ("task", "clip", 3),
        ("block", "identity", 3),
        ("module", "tanh", 3),
        ("tensor", "softmax", 3),
        ("tensor", "clip", 40),
    ],
)
def test_merge_is_the_weighted_sum(mode, constraint, tasks):
    theta0, experts = random_models(0, tasks)
    groups = trees.groups(theta0, mode)
    lam = np.random.default_rng(1).normal(0.3, 0.5, (len(groups.names), tasks)).astype(np.float32)
    parametrisation = coefficients(groups, tasks, lam, constraint)
    merge = jax.jit(parametrisation.merge)
    merged = merge(theta0, tv.task_vectors(theta0, experts), parametrisation.init())
    expected, names = oracle(theta0, experts, lam, mode, constraint, groups.names)
    assert names == set(groups.names)
    for path, x in trees.flatten(trees.unstack_layers(merged)).items():
        if path == "position_ids":
            assert (x == theta0["position_ids"]).all() and x.dtype == theta0["position_ids"].dtype
        else:
            np.testing.assert_allclose(x, expected[path], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("tasks", [1, 2, 3, 5, 8, 40])
@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 4), (6,)])
def test_a_layer_in_its_stack(tasks, shape):
    rng = np.random.default_rng(tasks)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    theta0, stack, coef, weights = normal(*shape), normal(3, tasks, *shape), normal(tasks), normal(*shape)
    merge = lambda theta0, stack, coef, layer: weighted_sum(theta0, LayerOf(stack, layer), coef)
    loss = lambda *args: (weights * merge(*args)).sum()
    value, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(theta0, stack, coef, 1)
    tau = stack[1].astype(np.float64)
    merged = theta0 + np.tensordot(coef.astype(np.float64), tau, 1)
    np.testing.assert_allclose(jax.jit(merge)(theta0, stack, coef, 1), merged, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(value, (weights * merged).sum(), rtol=1e-4, atol=1e-4)
    by_stack = np.zeros_like(stack)
    by_stack[1] = np.multiply.outer(coef, weights)
    expected = weights, by_stack, (tau * weights).reshape(tasks, -1).sum(1)
    for found, right in zip(grads, expected, strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-5)
    by_coef = normal(tasks)
    _, along = jax.jvp(lambda coef: merge(theta0, stack, coef, 1), (coef,), (by_coef,))
    np.testing.assert_allclose(along, np.tensordot(by_coef.astype(np.float64), tau, 1), rtol=1e-5, atol=1e-5)


def test_per_layer_layout_gives_the_same():
    theta0, experts = random_models(0, 2)
    merged = {}
    for layout in (lambda t: t, trees.unstack_layers):
        base, tau = layout(theta0), tv.task_vectors(layout(theta0), [layout(e) for e in experts])
        groups = trees.groups(base, "tensor")
        order = np.argsort(groups.names)
        lam = np.zeros((len(order), 2), np.float32)
        lam[order] = np.random.default_rng(2).uniform(size=lam.shape)
        parametrisation = coefficients(groups, 2, lam)
        merged[layout] = trees.unstack_layers(parametrisation.merge(base, tau, parametrisation.init()))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), *merged.values())


def test_accumulates_in_float32_and_casts_last():
    theta0 = {"w": jnp.ones(4, jnp.bfloat16)}
    tau = {"w": jnp.full((8, 4), 2.0**-9)}  # each is lost when added to 1 in bfloat16; their sum is not
    parametrisation = coefficients(trees.groups(theta0, "task"), 8, 1.0)
    merged = parametrisation.merge(theta0, tau, parametrisation.init())["w"]
    assert merged.dtype == jnp.bfloat16 and (merged == 1 + 2.0**-6).all()


def test_clip_has_gradient_on_the_closed_interval_only():
    x = jnp.array([-0.5, 0.0, 0.3, 1.0, 1.5])
    np.testing.assert_array_equal(clip01(x), [0, 0, np.float32(0.3), 1, 1])
    np.testing.assert_array_equal(jax.vmap(jax.grad(clip01))(x), [0, 1, 1, 1, 0])
    wide, x = (lambda x: effective(x, "clip_wide")), jnp.array([-0.75, -0.5, 0.25, 2.0, 2.5])
    np.testing.assert_array_equal(wide(x), [-0.5, -0.5, 0.25, 2, 2])
    np.testing.assert_array_equal(jax.vmap(jax.grad(wide))(x), [0, 1, 1, 1, 0])


def test_one_coefficient_for_everything():
    theta0, experts = random_models(0, 3)
    tau, made = tv.task_vectors(theta0, experts), coefficients(trees.groups(theta0, "global"), 3, 0.7, "tanh")
    learnables = made.init()
    assert jax.tree.map(jnp.shape, learnables) == {"lam": (1, 1)}
    down = lambda tree: np.asarray(tree["blocks"]["mlp"]["down"], np.float64)
    whole = sum(down(expert) - down(theta0) for expert in experts)
    np.testing.assert_allclose(
        down(made.merge(theta0, tau, learnables)), down(theta0) + np.tanh(0.7) * whole, atol=1e-6
    )
    names, table = made.table(learnables)
    assert names == ("all",)
    np.testing.assert_allclose(table, np.full((1, 3), np.tanh(0.7)), rtol=1e-6)
    slope = jax.grad(lambda learned: made.merge(theta0, tau, learned)["blocks"]["mlp"]["down"].sum())(learnables)
    np.testing.assert_allclose(slope["lam"], [[whole.sum() / np.cosh(0.7) ** 2]], rtol=1e-4)
    with pytest.raises(ValueError, match="over tasks, which share one"):
        coefficients(trees.groups(theta0, "global"), 3, constraint="simplex")


def test_parts_of_tensors_of_one_shape_can_be_shared():
    theta0 = {name: jnp.zeros(shape) for name, shape in (("a", (6, 50)), ("b", (6, 50)), ("c", (50, 6)))}
    tau = jax.tree.map(lambda x: jnp.ones((1, *x.shape)), theta0)
    for shared in (True, False):
        made = coefficients(trees.groups(theta0, "task"), 1, 0.0, "identity", 3, seed=1, shared_parts=shared)
        merged = made.merge(theta0, tau, {"lam": jnp.array([[[1.0, 2.0, 3.0]]])})
        assert sorted(np.unique(merged["a"])) == [1, 2, 3] and (merged["a"] == merged["b"]).all() == shared


def test_groups_of_clip_are_those_of_the_published_tables():
    """AdaMerging's have 158 and 302 rows, six of them of the text tower; query, key and value are one tensor there."""
    for size, number in (({}, 152), ({"hidden_size": 1024, "num_hidden_layers": 24, "patch_size": 14}, 296)):
        groups = trees.groups(clip.abstract(clip.VisionConfig(**size, projected=True)), "tensor")
        assert len({re.sub("/(query|key|value)/", "/in/", name) for name in groups.names}) == number


def test_errors_say_what_is_allowed():
    theta0, experts = random_models(0, 2)
    groups, tau = trees.groups(theta0, "task"), tv.task_vectors(theta0, experts)
    with pytest.raises(ValueError, match="clip, identity, tanh, softmax"):
        coefficients(groups, 2, constraint="clamp")
    with pytest.raises(ValueError, match=r"\(1, 2\)"):
        coefficients(groups, 2, np.zeros((2, 2)))
    parametrisation = coefficients(groups, 2)
    swapped = {**tau, "blocks": jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), tau["blocks"])}
    with pytest.raises(ValueError, match=r"blocks/attention/bias .*\[L, T, \.\.\.\]"):
        parametrisation.merge(theta0, swapped, parametrisation.init())
    fewer = {**tau, "head": jax.tree.map(lambda x: x[:1], tau["head"])}
    with pytest.raises(ValueError, match="hold 1 tasks, other leaves 2"):
        parametrisation.merge(theta0, fewer, parametrisation.init())
