"""The loop: resumes bit for bit, does not depend on chunks, compiles once a shape, and says where it diverged."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from taskvec.adaptive.fit import Evaluate, FitDiverged, Loop, fit, make_fit
from taskvec.io.checkpoints import Checkpoint

START = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
FROZEN = {"x": jnp.arange(3.0)}


def batches(step):
    return {"y": np.random.default_rng(step).normal(size=(4, 3)).astype(np.float32)}


def loss_fn(learnables, frozen, batch, key):
    noise = 0.1 * jax.random.normal(key, (2,))
    z = jnp.tanh((batch["y"] + frozen["x"][None]) @ learnables["w"]) + (learnables["b"] + noise)[None]
    return jnp.square(z).mean(), {"mean_T": z.mean(0)}


def run(steps=20, project=None, **loop):
    return fit(loss_fn, START, optax.adam(1e-2), batches, steps, frozen=FROZEN, project=project, loop=Loop(**loop))


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


class Killed(Exception):
    pass


@pytest.mark.parametrize("kill_at", [10, 13])
def test_a_killed_run_resumes_bit_for_bit(tmp_path, kill_at):
    def kill(step, metrics):
        if step >= kill_at:
            raise Killed

    with Checkpoint(tmp_path, every=5) as checkpoint, pytest.raises(Killed):
        run(chunk=1, checkpoint=checkpoint, on_chunk=kill)
    seen = []
    with Checkpoint(tmp_path, every=5) as checkpoint:
        resumed = run(chunk=4, checkpoint=checkpoint, on_chunk=lambda step, metrics: seen.append(step))
    assert 5 < seen[0] < 20 and seen[-1] == 20  # it did not start anew
    equal(resumed, run(chunk=4))
    with Checkpoint(tmp_path, every=5) as checkpoint:
        equal(run(checkpoint=checkpoint), resumed)  # a finished run is only read


def test_a_run_that_ended_early_stays_ended(tmp_path):
    evaluate = Evaluate(5, lambda step, learnables: step, stop=lambda step: step == 10)
    ends = []
    for _ in range(2):
        with Checkpoint(tmp_path, every=5) as checkpoint:
            ends.append(run(checkpoint=checkpoint, evaluate=evaluate))
    assert list(ends[0].evaluations) == [5, 10] and list(ends[1].evaluations) == [10]
    equal(ends[1].learnables, ends[0].learnables)
    equal(ends[1].history, ends[0].history)
    assert ends[0].history["loss"].shape == (10,)


def test_chunks_change_nothing():
    results = [run(chunk=chunk) for chunk in (1, 7, 20)]
    equal(results[0], results[1])
    equal(results[0], results[2])
    assert results[0].history["loss"].shape == (20,) and results[0].history["mean_T"].shape == (20, 2)


def test_matches_a_plain_loop():
    learnables, optimiser = START, optax.adam(1e-2)
    state, expected = optimiser.init(learnables), []
    for step in range(20):
        key = jax.random.fold_in(jax.random.key(0), step)
        (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(learnables, FROZEN, batches(step), key)
        updates, state = optimiser.update(grads, state, learnables)
        learnables = optax.apply_updates(learnables, updates)
        expected.append(loss)
    found = run()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found.learnables, learnables)
    np.testing.assert_allclose(found.history["loss"], expected, rtol=1e-5)


def test_compiles_once_a_shape_whatever_the_chunks_and_calls():
    traces = []

    def counted(*args):
        traces.append(args[2]["y"].shape)
        return loss_fn(*args)

    ragged = lambda step: {"y": np.ones((4 if step < 7 or step == 9 else 6, 3), np.float32)}
    runner = make_fit(counted, optax.sgd(0.1), chunk=4)
    runner(START, ragged, 12, frozen=FROZEN)
    once = len(traces)
    assert set(traces) == {(4, 3), (6, 3)}
    runner(START, ragged, 12, frozen=FROZEN)
    runner(jax.tree.map(lambda x: x + 1, START), lambda step: ragged(0), 5, frozen=FROZEN, seed=3)
    assert len(traces) == once


def test_the_start_survives_and_project_is_applied():
    result = run(project=lambda t: jax.tree.map(lambda x: jnp.clip(x, 0.2, 0.9), t))
    assert (START["w"] == 1).all() and not START["w"].is_deleted()
    assert all((x >= np.float32(0.2)).all() and (x <= np.float32(0.9)).all() for x in result.learnables.values())


def test_progress_comes_in_order_with_all_steps():
    seen = []
    result = run(chunk=8, on_chunk=lambda step, metrics: seen.append((step, metrics["loss"])))
    assert [step for step, _ in seen] == [8, 16, 20]
    np.testing.assert_array_equal(np.concatenate([loss for _, loss in seen]), result.history["loss"])


def test_divergence_is_diagnosed():
    poisoned = lambda step: {"y": batches(step)["y"] * (np.nan if step == 6 else 1)}
    with pytest.raises(FitDiverged, match="step 6: metrics loss, mean_T; gradients of b, w") as caught:
        fit(loss_fn, START, optax.adam(1e-2), poisoned, 20, frozen=FROZEN, loop=Loop(chunk=4))
    assert caught.value.step == 6 and caught.value.learnables == ["b", "w"]

    def one_bad_leaf(learnables, frozen, batch, key):
        return learnables["w"].sum() + jnp.sqrt(jnp.square(learnables["b"]).sum()), {}

    with pytest.raises(FitDiverged, match="step 0: gradients of b") as caught:
        fit(one_bad_leaf, START, optax.sgd(0.1), batches, 3)
    assert caught.value.metrics == []


def test_no_diverged_state_is_saved(tmp_path):
    poisoned = lambda step: {"y": batches(step)["y"] * (np.nan if step == 6 else 1)}
    with Checkpoint(tmp_path, every=1) as checkpoint, pytest.raises(FitDiverged):
        fit(loss_fn, START, optax.adam(1e-2), poisoned, 20, frozen=FROZEN, loop=Loop(4, checkpoint))
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == [4]


def test_nothing_large_is_held_beside_the_state():
    """Adam's start and single batches are freed; frozen host arrays go to the device once."""
    start, host, seen = jnp.ones(4321), np.ones(1234, np.float32), []

    def count(step, metrics):
        shapes = [x.shape for x in jax.live_arrays() if not x.is_deleted()]
        seen.append((shapes.count((4321,)), shapes.count((1234,))))

    loss = lambda w, frozen, batch, key: (jnp.square(w - frozen.sum() - batch.mean()).sum(), {})
    watch = Loop(chunk=2, on_chunk=count)
    fit(loss, start, optax.adam(0.1), lambda step: np.ones(3, np.float32), 6, frozen=host, loop=watch)
    assert seen == [(4, 1)] * 3  # the caller's, and weights and two moments
