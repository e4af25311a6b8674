"""Balancers against float64 NumPy written from the formulas, on gradients themselves where the paper has them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

from taskvec.training import balancers

KEY = jax.random.key(3)


def gradients(num_tasks, seed=0, width=30):
    """Rows that conflict: a common part, and noise that outweighs it."""
    rng = np.random.default_rng([seed, num_tasks])
    return rng.normal(size=(num_tasks, width)) + 0.3 * rng.normal(size=width)


@functools.cache
def compiled(name, num_tasks, **settings):
    made = balancers.get(name, **settings)
    step = jax.jit(lambda gram, losses, key: made.weights(gram, made.init(num_tasks), losses, key)[0])
    return lambda g, losses=None, key=KEY: np.asarray(
        step(
            jnp.asarray(g @ g.T, jnp.float32),
            jnp.ones(num_tasks) if losses is None else jnp.asarray(losses, jnp.float32),
            key,
        )
    )


def pcgrad(g, key):
    """Algorithm 1 on the gradients, in the orders that the key gives."""
    changed = g.copy()
    for i, each in enumerate(jax.random.split(key, len(g))):
        for j in np.asarray(jax.random.permutation(each, len(g))):
            if j != i and (inner := changed[i] @ g[j]) < 0:
                changed[i] -= inner / (g[j] @ g[j]) * g[j]
    return changed.sum(0)


@pytest.mark.parametrize("num_tasks", [1, 3, 20])
@pytest.mark.parametrize("seed", [0, 1])
def test_pcgrad(num_tasks, seed):
    g = gradients(num_tasks, seed)
    w = compiled("pcgrad", num_tasks)(g)
    np.testing.assert_allclose(w @ g, pcgrad(g, KEY), rtol=1e-3, atol=1e-3)
    assert num_tasks == 1 or (g @ g.T < 0).any()


def test_pcgrad_of_two_tasks_by_hand():
    g = np.array([[1.0, 0.0], [-1.0, 1.0]])
    np.testing.assert_allclose(compiled("pcgrad", 2)(g) @ g, [0.5, 1.5], atol=1e-6)
    agree = np.array([[1.0, 0.0], [1.0, 1.0]])
    np.testing.assert_array_equal(compiled("pcgrad", 2)(agree), [1, 1])


@pytest.mark.parametrize("scale", balancers.SCALES)
@pytest.mark.parametrize("num_tasks", [1, 4, 20])
def test_aligned_mtl(num_tasks, scale):
    """By the singular values of the gradients: all of them become one number."""
    g = gradients(num_tasks)
    u, sigma, vt = np.linalg.svd(g, full_matrices=False)
    lower_median = np.sort(sigma)[(num_tasks - 1) // 2]
    size = {"min": sigma.min(), "median": lower_median, "rmse": np.sqrt(np.mean(sigma**2))}[scale]
    expected = size * (u @ vt).sum(0)  # of gradients with equal singular values, the sum
    found = compiled("aligned_mtl", num_tasks, scale=scale)(g) @ g
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def bounded_minimum(gram, low):
    """``argmin v' M v`` over ``v >= low``: with ``v = low + x``, non-negative least squares on a square root of M."""
    root = np.linalg.cholesky(gram).T
    return low + scipy.optimize.nnls(root, -root @ low, maxiter=1000)[0]


@pytest.mark.parametrize("num_tasks, seed", [(1, 0), (2, 0), (5, 1), (20, 0), (20, 1)])
def test_upgrad(num_tasks, seed):
    g = gradients(num_tasks, seed)
    gram = g @ g.T / np.square(g).sum() + 1e-4 * np.eye(num_tasks)
    expected = sum(bounded_minimum(gram, low) for low in np.eye(num_tasks))
    w = compiled("upgrad", num_tasks)(g)
    np.testing.assert_allclose(w, expected, rtol=1e-3)
    assert (g @ (w @ g)).min() > -1e-2 * np.linalg.norm(w @ g)  # no conflict, up to the regularisation
    assert num_tasks == 1 or (w >= 1 - 1e-6).all()


def test_numbers_of_torchjd():
    """The examples in the documentation of its UPGrad and AlignedMTL, for preferences 1/T."""
    g = np.array([[-4.0, 1, 1], [6, 1, 1]])
    half = (0.5, 0.5)
    np.testing.assert_allclose(compiled("upgrad", 2, preference=half)(g) @ g, [0.2929, 1.9004, 1.9004], atol=1e-4)
    np.testing.assert_allclose(compiled("aligned_mtl", 2, preference=half)(g) @ g, [0.2133, 0.9673, 0.9673], atol=1e-4)


@pytest.mark.parametrize("num_tasks", [1, 4, 20])
def test_mgda(num_tasks):
    g = gradients(num_tasks)
    gram = g @ g.T / np.square(g).sum() + 1e-4 * np.eye(num_tasks)
    # Non-negative least squares with the sum as one more heavy row.
    rows = np.vstack([np.linalg.cholesky(gram).T, np.full((1, num_tasks), 1e4)])
    expected = scipy.optimize.nnls(rows, np.append(np.zeros(num_tasks), 1e4))[0]
    w = compiled("mgda", num_tasks)(g)
    np.testing.assert_allclose(w, expected, atol=2e-4)
    np.testing.assert_allclose(w.sum(), 1, rtol=1e-5)


@pytest.mark.parametrize("name", balancers.BALANCERS)
@pytest.mark.parametrize("num_tasks", [1, 3])
def test_degenerate(name, num_tasks):
    """No gradient at all, one that vanishes, and tasks that are the same: finite, and the same for the same tasks."""
    run = compiled(name, num_tasks)
    zero = run(np.zeros((num_tasks, 5)), losses=np.zeros(num_tasks))
    assert np.isfinite(zero).all() and (zero > 0).all()
    g = gradients(num_tasks)
    g[0] = 0
    assert np.isfinite(run(g)).all()
    same = run(np.tile(gradients(1), (num_tasks, 1)))
    np.testing.assert_allclose(same, same[0], rtol=1e-2)
    assert same[0] > 0


@pytest.mark.parametrize("name", [n for n in balancers.BALANCERS if n != "pcgrad"])
def test_order_of_tasks_does_not_matter(name):
    g, order = gradients(3), np.array([2, 0, 1])
    losses = np.array([1.0, 2.0, 0.5])
    run = compiled(name, 3)
    np.testing.assert_allclose(run(g[order], losses[order]), run(g, losses)[order], rtol=1e-3, atol=1e-4)


def run_steps(balancer, grams, losses):
    """Weights of every step, under one compilation."""

    def step(state, inputs):
        w, state = balancer.weights(inputs[0], state, inputs[1], KEY)
        return state, w

    inputs = jnp.asarray(grams, jnp.float32), jnp.asarray(losses, jnp.float32)
    return np.asarray(jax.jit(lambda x: jax.lax.scan(step, balancer.init(losses.shape[1]), x)[1])(inputs))


@pytest.mark.parametrize("form", ["weights", "softmax"])
def test_gradnorm(form):
    """Plain steps of the weights; the derivative of the L1 loss by hand."""
    rng, rate, num_tasks = np.random.default_rng(0), 0.05, 3
    norms, losses = rng.uniform(0.5, 2, (40, num_tasks)), rng.uniform(0.5, 2, (40, num_tasks))
    balancer = balancers.gradnorm(1.5, optax.sgd(rate), form)
    found = run_steps(balancer, [np.diag(n**2) for n in norms], losses)
    s, expected = np.full(num_tasks, float(form == "weights")), []
    for n, loss in zip(norms, losses, strict=True):
        p = np.exp(s) / np.exp(s).sum()
        w = s.copy() if form == "weights" else num_tasks * p
        expected.append(w)
        ratio = loss / losses[0]
        sign = np.sign(w * n - np.mean(w * n) * (ratio / ratio.mean()) ** 1.5)
        jacobian = np.eye(num_tasks) if form == "weights" else num_tasks * (np.diag(p) - np.outer(p, p))
        s = s - rate * (sign * n) @ jacobian
        if form == "weights":
            s = np.maximum(s, 1e-3)
            s *= num_tasks / s.sum()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.sum(1), num_tasks, rtol=1e-5)


@pytest.mark.parametrize("form, factor", [("classification", 1.0), ("regression", 0.5)])
def test_uncertainty(form, factor):
    losses, rate = np.random.default_rng(0).uniform(0.2, 3, (50, 3)), 0.1
    balancer = balancers.uncertainty(optax.sgd(rate), form, init=-0.5)
    s, expected = np.full(3, -0.5), []
    for loss in losses:
        expected.append(factor * np.exp(-s))
        s = s - rate * (0.5 - factor * np.exp(-s) * loss)
    np.testing.assert_allclose(run_steps(balancer, np.zeros((50, 3, 3)), losses), expected, rtol=1e-4)
    constant = run_steps(balancer, np.zeros((300, 3, 3)), np.tile([0.5, 1.0, 2.0], (300, 1)))
    np.testing.assert_allclose(constant[-1], 0.5 / np.array([0.5, 1, 2]), rtol=1e-2)  # where the derivative is zero


def test_coba():
    """History by history in lists, slopes by polyfit."""
    steps, num_tasks, history, warmup, tau, floor = 40, 3, 8, 5, 5.0, 0.3
    rng, t = np.random.default_rng(0), np.arange(40)[:, None]
    falling = np.exp(-t * np.array([0.02, 0.1, 0.01])) + np.maximum(0, t - 25) * np.array([0.0, 0.04, 0.0])
    losses = falling * np.array([1.0, 3.0, 0.5]) * (1 + 0.02 * rng.normal(size=falling.shape))
    softmax = lambda x: np.exp(x - x.max()) / np.exp(x - x.max()).sum()
    ratios, slopes, largest, expected = [], [], [], []
    for step, loss in enumerate(losses, 1):
        ratios.append(loss / losses[0])
        if step < warmup:
            expected.append(np.ones(num_tasks))
            continue
        window = np.array(ratios[-history:])
        slopes.append(np.polyfit(np.arange(len(window)), window, 1)[0])
        largest.append(np.polyfit(np.arange(len(window)), window.max(1), 1)[0])
        recent, n = np.array(slopes[-history:]), len(largest)
        relative = softmax(num_tasks * slopes[-1] / np.abs(slopes[-1]).sum())
        absolute = softmax(-len(recent) * recent[-1] / np.abs(recent).sum(0))
        divergence = n * softmax(-tau * n * np.array(largest) / np.abs(largest).sum())[-1]
        w = softmax(num_tasks * (divergence * relative + (1 - divergence) * absolute))
        if (w < floor / num_tasks).any():
            w = (1 - floor) * w + floor / num_tasks
        expected.append(num_tasks * w)
    balancer = balancers.coba(history, warmup, tau, floor)
    found = run_steps(balancer, np.zeros((steps, num_tasks, num_tasks)), losses)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)
    assert found[-1, 1] < found[20, 1] or found[-1, 1] < 0.8  # the task that diverges is held back


def test_names():
    with pytest.raises(ValueError, match=r"unknown balancer 'sum'.*pcgrad"):
        balancers.get("sum")
    with pytest.raises(ValueError, match="unknown scale"):
        balancers.aligned_mtl("max")
