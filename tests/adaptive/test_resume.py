"""Methods of several fits, and those that keep their best step: killed, they end with the same bits in fewer steps."""

import jax
import numpy as np
import pytest

from taskvec.adaptive.adamerging import adamerging
from taskvec.adaptive.atlas import atlas
from taskvec.adaptive.divmerge import divmerge
from taskvec.adaptive.fit import Loop
from taskvec.adaptive.fw_merging import fw_hard, fw_soft
from taskvec.adaptive.prodistill import prodistill
from taskvec.adaptive.supermerge import supermerge
from taskvec.io.checkpoints import Checkpoint
from tests.adaptive import toy_mlp
from tests.modular import blocks_for_tests


class Killed(Exception):
    pass


def on_mlp(method, **settings):
    theta0, tau, kernels, rows = toy_mlp.setting()
    problem = toy_mlp.problem(theta0, tau, kernels)
    return lambda loop: method(problem, rows, per_task=toy_mlp.ROWS, learning_rate=0.5, loop=loop, **settings)


def hard(**settings):
    theta0, tau, kernels, rows = toy_mlp.setting()
    problem = toy_mlp.problem(theta0, tau, kernels)
    return lambda loop: fw_hard(problem, rows, shots=4, step_size=1.0, granularity="tensor", loop=loop, **settings)


def on_blocks(**settings):
    _, _, rows, problem = blocks_for_tests.setting()
    return lambda loop: prodistill(problem, rows, shots=6, batch_size=4, loop=loop, **settings)


@pytest.mark.parametrize(
    "run, total, killed, left",
    [
        (on_mlp(atlas, epochs=4, keep="best"), 8, 7, 2),
        (on_mlp(fw_soft, rounds=2, steps=4, shots=4), 8, 7, 2),
        (hard(rounds=6), 6, 5, 2),
        pytest.param(hard(rounds=6, merge="dare_ties"), 6, 5, 2, marks=pytest.mark.slow),
        pytest.param(on_mlp(supermerge, groups=((0, 1), (2,)), steps=4), 12, 11, 2, marks=pytest.mark.slow),
        (on_blocks(epochs=2, mode="tensor"), 12, 7, 8),
    ],
    ids=["atlas", "fw_soft", "fw_hard", "fw_hard_ties", "supermerge", "prodistill"],
)
def test_a_killed_run_goes_on(tmp_path, run, total, killed, left):
    def counted(checkpoint=None, end=None):
        def step(*_):
            nonlocal steps
            steps += 1
            if steps == end:
                raise Killed

        steps = 0
        found = run(Loop(chunk=1, checkpoint=checkpoint, on_chunk=step))
        return found, steps

    whole, steps = counted()
    assert steps == total
    with Checkpoint(tmp_path, every=2, keep=1) as checkpoint, pytest.raises(Killed):
        counted(checkpoint, killed)
    with Checkpoint(tmp_path, every=2, keep=1) as checkpoint:
        found, steps = counted(checkpoint)
    assert steps == left
    one, two = ((each.params, each.coefficients, each.history, each.kept) for each in (whole, found))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    # The best step is one before the last checkpoint: the rest of the run cannot find it again.
    assert whole.kept is None or 0 < whole.kept < total - left


def test_another_run_takes_no_checkpoint(tmp_path):
    """A method, setting, seed, model or rows that differ are named; only the first run takes a step."""
    theta0, tau, kernels, rows = toy_mlp.setting()
    problem = toy_mlp.problem(theta0, tau, kernels)
    other = toy_mlp.problem(theta0, {**tau, "b2": tau["b2"] + 1}, kernels)
    fewer = rows._replace(counts=(9, 8, 29))
    with Checkpoint(tmp_path, every=1) as checkpoint:
        how = {"steps": 2, "per_task": 4, "learning_rate": 0.1, "loop": Loop(checkpoint=checkpoint)}
        found = adamerging(problem, rows, **how)
        for method, given, seen, more, match in (
            (divmerge, problem, rows, {}, "method: 'adamerging' saved, 'divmerge' wanted"),
            (adamerging, problem, rows, {"learning_rate": 0.5}, r"\(setting learning_rate: 0.1 saved, 0.5 wanted\)"),
            (adamerging, problem, rows, {"steps": 3}, r"\(setting steps: 2 saved, 3 wanted\)"),
            (adamerging, problem, rows, {"seed": 7}, r"\(seed: 0 saved, 7 wanted\)"),
            (adamerging, problem, rows, {"init": np.full((4, 3), 0.3)}, r"\(setting init: 0.3 saved, checksum"),
            (adamerging, other, rows, {}, r"\(tau: checksum \w+ saved, checksum \w+ wanted\); .* empty directory"),
            (adamerging, problem, fewer, {}, r"\(rows: \[9, 8, 30\] rows, .* saved, \[9, 8, 29\] rows"),
        ):
            with pytest.raises(ValueError, match=match):
                method(given, seen, **{**how, **more})
        again = adamerging(toy_mlp.problem(*toy_mlp.setting()[:3]), toy_mlp.setting()[3], **how)
    np.testing.assert_array_equal(again.coefficients, found.coefficients)
