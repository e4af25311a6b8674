"""Joint training: one shared pass is the sum of the losses, balanced steps are ``G' w``, memory survives a kill."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from taskvec.adaptive import objectives
from taskvec.adaptive.fit import Loop
from taskvec.io.checkpoints import Checkpoint
from taskvec.training import balancers, heads as heads_lib
from taskvec.training.multitask import concatenated, gram_matrix, make_joint, task_gradients
from taskvec.training.trainable import matching

D_IN, D, ROWS, CLASSES = 6, 5, 8, (3, 4, 2)
NUM_TASKS = len(CLASSES)


def apply_fn(params, batch):
    return {"features": jnp.tanh(batch["x"] @ params["w"]) + params["b"][None]}


def setting(seed=0):
    rng = np.random.default_rng(seed)
    params = {"w": jnp.asarray(rng.normal(size=(D_IN, D)), jnp.float32), "b": jnp.zeros(D)}
    kernels = [np.asarray(heads_lib.normalise(jnp.asarray(rng.normal(size=(c, D)))).T) for c in CLASSES]
    centres = [2 * rng.normal(size=(c, D_IN)) for c in CLASSES]

    def one(t, stream):
        def batch(step):
            rng = np.random.default_rng([seed, t, step, stream])
            label = rng.integers(0, CLASSES[t], ROWS).astype(np.int32)
            return {"x": (centres[t][label] + rng.normal(size=(ROWS, D_IN))).astype(np.float32), "label": label}

        return batch

    joined = [concatenated([one(t, stream) for t in range(NUM_TASKS)]) for stream in (0, 1)]
    return (
        params,
        heads_lib.make_heads(kernels),
        joined[0],
        lambda step: joined[0](step) | {"validation": joined[1](step)},
    )


def losses_of(params, heads, batch):
    """Task by task, each alone."""
    out = []
    for t in range(NUM_TASKS):
        rows = slice(t * ROWS, (t + 1) * ROWS)
        features = apply_fn(params, {"x": batch["x"][rows]})["features"]
        logits = heads_lib.logits(heads.kernel[t], heads.class_mask[t], heads.scale, features)
        out.append(objectives.cross_entropy(logits, batch["label"][rows]))
    return jnp.stack(out)


jacobian_of = jax.jit(jax.jacrev(losses_of))
losses_of = jax.jit(losses_of)


def flat(tree):
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def test_equal_is_the_sum_of_the_losses():
    params, heads, batches, _ = setting()
    joint = make_joint(apply_fn, optax.sgd(0.01))
    done = joint(params, heads, batches, 3)
    expected = params
    for step in range(3):
        np.testing.assert_allclose(
            done.history["loss"][step], losses_of(expected, heads, batches(step)).sum(), rtol=1e-5
        )
        grads = jacobian_of(expected, heads, batches(step))
        expected = jax.tree.map(lambda p, g: p - 0.01 * g.sum(0), expected, grads)
    np.testing.assert_allclose(flat(done.learnables), flat(expected), atol=1e-5)
    np.testing.assert_allclose(done.history["losses"].sum(1), done.history["loss"], rtol=1e-5)
    np.testing.assert_array_equal(done.history["weights"], 1)
    again = joint(params, heads, batches, 60)
    assert again.history["loss"][-10:].mean() < 0.7 * again.history["loss"][:5].mean()
    assert not params["w"].is_deleted()


@pytest.mark.parametrize("tasks_at_once", [1, 2])
def test_gradients_of_tasks_and_their_gram_matrix(tasks_at_once):
    params, heads, batches, _ = setting()
    batch = batches(0)
    losses, accuracy, (grads,) = task_gradients(apply_fn, params, heads, batch, tasks_at_once)
    expected = jacobian_of(params, heads, batch)
    np.testing.assert_allclose(losses, losses_of(params, heads, batch), rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, expected)
    rows = np.stack([flat(jax.tree.map(lambda g, t=t: g[t], expected)) for t in range(NUM_TASKS)])
    np.testing.assert_allclose(gram_matrix(grads), rows @ rows.T, rtol=1e-4, atol=1e-5)
    assert accuracy.shape == (NUM_TASKS,)


@pytest.mark.parametrize("name, trained", [("pcgrad", "w"), ("upgrad", ""), ("gradnorm", ""), ("uncertainty", "b")])
def test_a_step_goes_along_the_weighted_gradients(name, trained):
    """Two steps with the balancer's own weights from exact Gram matrices, of all weights or of some."""
    params, heads, batches, _ = setting()
    balancer, trainable = balancers.get(name), matching(trained) if trained else None
    done = make_joint(apply_fn, optax.sgd(0.01), balancer, trainable=trainable)(params, heads, batches, 2, seed=5)
    assert done.learnables.keys() == ({trained} if trained else params.keys())
    state = balancer.init(NUM_TASKS)
    for step in range(2):
        jacobian = {k: g for k, g in jacobian_of(params, heads, batches(step)).items() if k in done.learnables}
        key = jax.random.fold_in(jax.random.key(5), step)
        w, state = balancer.weights(gram_matrix(jacobian), state, losses_of(params, heads, batches(step)), key)
        np.testing.assert_allclose(done.history["weights"][step], w, rtol=1e-3)
        params = params | {k: params[k] - 0.01 * jnp.tensordot(w, g, 1) for k, g in jacobian.items()}
    np.testing.assert_allclose(flat(done.learnables), flat({k: params[k] for k in done.learnables}), atol=1e-5)


def test_sam_balances_ascent_and_flatness_apart():
    params, heads, batches, _ = setting()
    batch, rho = batches(0), 0.1
    done = make_joint(apply_fn, optax.sgd(1.0), sam_rho=rho)(params, heads, batches, 1)
    total = 0
    for t in range(NUM_TASKS):
        grad = lambda p, t=t: jax.tree.map(lambda x: x[t], jacobian_of(p, heads, batch))
        g = grad(params)
        norm = np.linalg.norm(flat(g))
        total = total + flat(grad(jax.tree.map(lambda p, d, norm=norm: p + rho / norm * d, params, g)))
    np.testing.assert_allclose(flat(params) - flat(done.learnables), total, rtol=1e-3, atol=1e-4)


def test_coba_hears_validation_rows():
    params, heads, batches, with_validation = setting()
    joint = make_joint(apply_fn, optax.adam(3e-2), balancers.coba(history=6, warmup=3))
    done = joint(params, heads, with_validation, 8)
    weights = done.history["weights"]
    np.testing.assert_array_equal(weights[:2], 1)
    assert (weights[3:] != 1).any() and (weights > 0).all()
    np.testing.assert_allclose(weights.sum(1), NUM_TASKS, rtol=1e-5)
    with pytest.raises(ValueError, match="'validation'"):
        joint(params, heads, batches, 1)


def test_a_balancers_memory_is_in_the_checkpoint(tmp_path):
    params, heads, batches, _ = setting()
    joint = make_joint(apply_fn, optax.adam(1e-2), balancers.gradnorm())

    def kill(step, metrics):
        if step >= 6:
            raise KeyboardInterrupt

    with Checkpoint(tmp_path, every=4) as checkpoint, pytest.raises(KeyboardInterrupt):
        joint(params, heads, batches, 10, loop=Loop(checkpoint=checkpoint, on_chunk=kill))
    seen = []
    with Checkpoint(tmp_path, every=4) as checkpoint:
        watch = Loop(checkpoint=checkpoint, on_chunk=lambda step, metrics: seen.append(step))
        resumed = joint(params, heads, batches, 10, loop=watch)
    assert seen[0] > 4
    jax.tree.map(np.testing.assert_array_equal, resumed, joint(params, heads, batches, 10))


def test_batches_are_joined():
    short = lambda step: {"ids": np.ones((2, 3), np.int32), "label": np.zeros(2, np.int32)}
    long = lambda step: {"ids": np.ones((2, 5), np.int32), "label": np.ones(2, np.int32)}
    joined = concatenated([short, long])(0)
    assert joined["ids"].shape == (4, 5) and joined["ids"][:2, 3:].sum() == 0
    assert joined["label"].tolist() == [0, 0, 1, 1]
    with pytest.raises(ValueError, match=r"\[2, 1\]"):
        concatenated([short, lambda step: {"ids": np.ones((1, 3)), "label": np.zeros(1)}])(0)
