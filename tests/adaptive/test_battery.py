"""What every registered adaptive method must satisfy, on a scanned toy transformer and in a few steps.

Its card is sound and its settings have defaults; the result has theta0's names, shapes and dtypes and is finite; the
same seed gives the same bits; eight devices give what one gives; unknown settings are refused by name.
"""

import functools
import typing

import jax
import numpy as np
import pytest

from taskvec import tree as trees
from taskvec.adaptive import registry, rows as rows_lib
from taskvec.adaptive.fit import Evaluate, Loop
from taskvec.adaptive.learn import Problem
from taskvec.adaptive.mesh import make_mesh, placement, sharded
from taskvec.merging.registry import DATA, RESULTS
from taskvec.training.heads import Heads
from tests.adaptive import test_learn, toy_models as toy
from tests.modular import blocks_for_tests

SHORT = {
    "steps": 2, "coefficient_steps": 1, "rounds": 1, "epochs": 1, "per_task": 4, "per_set": 4, "batch_size": 4,
    "shots": 2, "least_batches": 1, "budget": None, "per_class": 1, "matrices": "mlp/",
}  # fmt: skip
# Those that need blocks and hooks are tested on models of the library, in test_prodistill.py and others.
NEEDS_BLOCKS = tuple(name for name, method in registry.methods().items() if "tokens" in method.card.sees)
MESHED = ("adamerging", "fw_hard", "surgery", "symerge")  # on every run of the tests; some five seconds each
LONG_PHASES = ("adarank", "divmerge", "fw_hard", "fw_soft", "samerging", "sens_merging", "surgery", "symerge")
UNPLACED = ("fw_hard", "sens_merging")  # weights on a mesh, but no batches


def problem_and_rows(name: str) -> tuple[Problem, rows_lib.Rows]:
    if name in NEEDS_BLOCKS:
        _, _, rows, problem = blocks_for_tests.setting()
        return problem, rows
    problem, card = test_learn.problem(), registry.get(name).card
    rows = test_learn.rows(labelled=card.data == "few labelled")
    if "pairs" in card.sees:
        take = rows.take
        rows = rows._replace(take=lambda t, n: {**take(t, n), "second_ids": take(t, n[::-1])["ids"]})
    some = lambda tasks: jax.tree.map(lambda x: x[np.array(tasks)], problem.heads._replace(scale=np.zeros(3)))
    heads = lambda tasks: Heads(some(tasks).kernel, some(tasks).class_mask, problem.heads.scale)
    if card.learns == "one target":
        return problem._replace(heads=heads([0])), rows.only([0])
    if card.learns == "target and control":
        one = trees.map_with_path(lambda path, x: x[:, :1] if trees.is_stacked(path) else x[:1], problem.tau)
        return problem._replace(tau=one, heads=heads([0, 2])), rows.only([0, 2])
    return problem, rows


def settings_of(name: str) -> dict:
    given = {key: SHORT[key] for key in registry.get(name).defaults if key in SHORT}
    if name == "lorahub":
        given["budget"] = 20
    if name == "fw_soft":
        given["adapt"] = test_learn.rows()
    return given


@pytest.mark.parametrize("name", sorted(registry.methods()))
def test_card(name):
    method = registry.get(name)
    card = method.card
    assert method.name == name and card.title and card.summary and card.arxiv and card.year >= 2020
    assert card.data in DATA[1:] and card.result in RESULTS
    assert method.run.__doc__ and "Args:" in method.run.__doc__ and "Raises:" in method.run.__doc__
    with pytest.raises(ValueError, match="has no setting 'lambada'"):
        method(None, None, lambada=0.3)
    method.check(**method.defaults)
    for key, kind in typing.get_type_hints(method.run).items():
        if key in method.defaults and kind in (bool, int, float):
            with pytest.raises(ValueError, match=f"{name}: unknown {key} .*; allowed: "):
                method(None, None, **{key: "much"})
    if "mode" in method.defaults:
        with pytest.raises(ValueError, match="unknown mode 'tensr'; allowed: "):
            method(None, None, mode="tensr")


@functools.cache
def short(name: str, mesh=None, *, place: bool = True):
    """A short run, with weights and task vectors on a mesh if there is one, and batches and state too if `place`."""
    problem, rows = problem_and_rows(name)
    if mesh is not None:
        problem = problem._replace(theta0=sharded(problem.theta0, mesh), tau=sharded(problem.tau, mesh))
        assert not all(x.is_fully_replicated for x in jax.tree.leaves(problem.tau))
    loop = Loop(place=placement(mesh)) if mesh is not None and place else Loop()
    return registry.get(name)(problem, rows, seed=3, loop=loop, **settings_of(name))


def watched(run, name):
    """A run with a `Loop` that heeds all that watches it, or says what it does not."""
    seen, steps, phases = [], [], {}
    evaluate = Evaluate(1, lambda step, found: seen.append(step))
    loop = Loop(on_start=seen.append, on_chunk=lambda step, metrics: steps.append(step))
    loop = loop._replace(on_phase=lambda what, done, total: phases.setdefault(what, []).append((done, total)))
    try:
        found = run(loop=loop._replace(evaluate=evaluate))
        assert seen[0] == len(seen) - 1 == steps[-1] or found.kept is not None
        assert found.evaluations.keys() == set(seen[1:])
    except ValueError as error:
        assert "takes no Loop(evaluate=" in str(error)
        found = run(loop=loop)
        assert seen == steps[-1:]  # none where there are no steps
    assert phases or name not in LONG_PHASES
    assert all(told[0][0] == 1 and told[-1] == (told[0][1], told[0][1]) for told in phases.values())
    return found


@pytest.mark.parametrize("name", sorted(set(registry.methods()) - set(NEEDS_BLOCKS)))
def test_a_short_run(name):
    problem, rows = problem_and_rows(name)
    given = settings_of(name)
    run = lambda **watch: registry.get(name)(problem, rows, seed=3, **given, **watch)
    found, again = short(name), watched(run, name)
    for path, x in trees.flatten(problem.theta0).items():
        y = trees.flatten(found.params)[path]
        assert (y.shape, y.dtype) == (x.shape, x.dtype) and np.isfinite(y).all()
        np.testing.assert_array_equal(y, trees.flatten(again.params)[path])
    assert trees.flatten(found.params).keys() == trees.flatten(problem.theta0).keys()
    assert (found.method, found.settings.keys()) == (name, registry.get(name).defaults.keys())
    assert given.items() <= again.settings.items()
    if found.coefficients is not None:
        assert found.coefficients.shape == (len(found.groups), problem.num_tasks)
        assert found.coefficients.dtype == np.float32
    assert (found.heads is not None) == registry.get(name).card.heads_trained
    assert (found.merged is not None or found.heads is not None) == (
        registry.get(name).card.result == "task-conditioned"
    )
    assert toy.apply(found.params, toy.batch(0, 2))["features"].shape == (2, toy.WIDTH)


@pytest.mark.parametrize("name", [name for name, method in registry.methods().items() if method.card.pieces])
def test_pieces_change_nothing(name):
    problem, rows = problem_and_rows(name)
    found = registry.get(name)(problem, rows, seed=3, loop=Loop(pieces=2), **settings_of(name))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), found.params, short(name).params)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in MESHED else pytest.mark.slow) for n in sorted(registry.methods())]
)
def test_a_mesh_changes_nothing(name, monkeypatch):
    """Rows over four of eight devices, weights, task vectors and what is learned over two."""
    monkeypatch.setattr("taskvec.adaptive.mesh.SMALL", 32)
    mesh = make_mesh(4, 2)
    if name in UNPLACED:
        with pytest.raises(ValueError, match=r"takes no Loop.place=....: it"):
            short(name, mesh)
    one, many = short(name), short(name, mesh, place=name not in UNPLACED)
    same = lambda atol: lambda a, b: np.testing.assert_allclose(b, a, atol=atol, rtol=1e-5)
    jax.tree.map(same(1e-5), *((found.coefficients, found.params, found.history) for found in (one, many)))
    # Adam makes a whole step of a gradient that is zero but for rounding: entries of large arrays have such ones.
    jax.tree.map(same(1e-4), *((found.learnables, found.heads) for found in (one, many)))
