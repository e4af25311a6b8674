"""ProDistill against a float64 loop with gradients by hand, block after block."""

import jax
import numpy as np
import pytest

from taskvec import tree as trees
from taskvec.adaptive.fit import Loop
from taskvec.adaptive.prodistill import drawn, epochs_of, prodistill
from tests.modular import blocks_for_tests as toy

BATCH, EPOCHS, RATE = 4, 8, 2e-2


def block(w, b, x):
    h = np.tanh(x @ w + b)
    return x + h, h


def oracle(theta0, tau, rows, mode, shots, seed):
    """Weights of all blocks, coefficients ``{name: [L, T, ...]}`` and losses."""
    inputs, counts = drawn(rows, shots, seed)
    task = np.repeat(np.arange(toy.TASKS), counts)
    x, mask = inputs["x"].astype(np.float64), inputs["mask"][..., None]
    share = theta0["embed"] + 0.3 * tau["embed"].sum(0)
    z1 = x @ share
    z2 = np.stack([x[i] @ (theta0["embed"] + tau["embed"][t]) for i, t in enumerate(task)])
    merged, coefs, losses = [], [], []
    for layer in range(toy.LAYERS):
        base = {k: theta0["blocks"][k][layer] for k in ("b", "w")}
        own = {k: tau["blocks"][k][layer] for k in base}
        y = np.stack([block(*(base[k] + own[k][t] for k in ("w", "b")), z2[i])[0] for i, t in enumerate(task)])
        lam = {k: np.full_like(v, 0.3) for k, v in own.items()}
        m, v = ({k: np.zeros_like(x) for k, x in lam.items()} for _ in range(2))
        numbers = epochs_of(len(task), BATCH, seed, layer)
        for step in range(EPOCHS * (len(task) // BATCH)):
            at = numbers(step)
            theta = {k: base[k] + (lam[k] * own[k]).sum(0) for k in base}
            out, h = block(theta["w"], theta["b"], z1[at])
            miss = (out - y[at]) * mask[at]
            losses.append((miss**2).sum())
            g = 2 * miss * (1 - h**2)
            grads = {"b": g.sum((0, 1)), "w": np.einsum("bni,bnj->ij", z1[at], g)}
            by_entry = {k: grads[k][None] * own[k] for k in base}
            per_tensor = {k: x.sum(tuple(range(1, x.ndim)), keepdims=True) for k, x in by_entry.items()}
            if mode == "task":
                both = sum(x.reshape(toy.TASKS) for x in per_tensor.values())
                per_tensor = {k: both.reshape(x.shape) for k, x in per_tensor.items()}
            for k in base:
                d = by_entry[k] if mode == "element" else np.broadcast_to(per_tensor[k], own[k].shape)
                m[k], v[k] = 0.9 * m[k] + 0.1 * d, 0.999 * v[k] + 0.001 * d**2
                lam[k] = lam[k] - RATE * (m[k] / (1 - 0.9 ** (step + 1))) / (
                    np.sqrt(v[k] / (1 - 0.999 ** (step + 1))) + 1e-8
                )
        theta = {k: base[k] + (lam[k] * own[k]).sum(0) for k in base}
        z1, z2 = block(theta["w"], theta["b"], z1)[0], y
        merged.append(theta)
        coefs.append(lam)
    return merged, coefs, losses


def run(problem, rows, **settings):
    return prodistill(problem, rows, epochs=EPOCHS, batch_size=BATCH, learning_rate=RATE, shots=6, seed=2, **settings)


@pytest.mark.parametrize("mode", ["element", "tensor", "task"])
def test_trajectory(mode):
    theta0, tau, rows, problem = toy.setting()
    found = run(problem, rows, mode=mode)
    merged, coefs, losses = oracle(theta0, tau, rows, mode, 6, 2)
    np.testing.assert_allclose(found.history["loss"], losses, rtol=2e-3)
    per_block = len(losses) // toy.LAYERS
    assert per_block == EPOCHS * (11 // BATCH)  # 6 rows of the first task, all 5 of the second
    assert losses[per_block - 1] < 0.5 * losses[0] or mode != "element"
    for layer, theta in enumerate(merged):
        for name, x in theta.items():
            np.testing.assert_allclose(found.params["blocks"][name][layer], x, atol=1e-4)
    np.testing.assert_allclose(found.params["project"], theta0["project"] + 0.3 * tau["project"].sum(0), atol=1e-6)
    if mode == "element":
        assert found.coefficients is None
        return
    table = dict(zip(found.groups, found.coefficients, strict=True))
    assert found.groups == trees.groups(problem.theta0, "tensor").names
    np.testing.assert_allclose(table["embed"], 0.3, rtol=1e-6)
    for layer, lam in enumerate(coefs):
        for name, x in lam.items():
            np.testing.assert_allclose(table[f"blocks/{layer}/{name}"], x.reshape(toy.TASKS, -1)[:, 0], atol=1e-4)


def test_without_steps_it_is_task_arithmetic_and_blocks_share_one_program(caplog):
    theta0, tau, rows, problem = toy.setting()
    host = problem._replace(tau=jax.tree.map(np.asarray, problem.tau))
    start = prodistill(host, rows, epochs=0)
    wanted = jax.tree.map(lambda a, b: a + 0.3 * b, theta0, toy.add(toy.select(tau, 0), toy.select(tau, 1)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), start.params, wanted)
    seen = []
    compiled = lambda: sum(record.message.startswith("Compiling") for record in caplog.records)
    watch = Loop(on_chunk=lambda step, metrics: seen.append((step, compiled())), chunk=100)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        run(problem, rows, loop=watch)
    steps = EPOCHS * (11 // BATCH)
    assert [step for step, _ in seen] == [steps, 2 * steps, 3 * steps]
    assert seen[0][1] > 0 and seen[2][1] == seen[1][1]  # nothing is compiled from the second block on


def test_errors():
    _, _, rows, problem = toy.setting()
    with pytest.raises(ValueError, match="scanned=True"):
        prodistill(problem._replace(scanned=False), rows)
    with pytest.raises(ValueError, match="element, tensor, task"):
        prodistill(problem, rows, mode="layer")
    for field, value in {"evaluate": object(), "pieces": 2}.items():
        with pytest.raises(ValueError, match=f"takes no Loop.{field}=.*block after block|sums over the rows"):
            prodistill(problem, rows, loop=Loop(**{field: value}))
