"""Representation Surgery: a low-rank correction of the merged features, one per task. arXiv 2402.02705 (ICML 2024).

    z' = z - U_t relu(D_t z),    min_{U_t, D_t} E_x |z'(x) - z_t^expert(x)|_1 / d

on unlabelled rows, the merged encoder frozen: features of merged model and expert are computed once and cached, and
training takes seconds. Rows of the test set make it transductive (as published), held-out rows inductive.

*Centred* Surgery (``center=True``, ours) feeds D with ``x = (z - mu_t) / s_t`` and scales the correction back, ``z' = z
- s_t U_t relu(D_t x)``; mu_t is the mean merged feature of the task and s_t the root mean square of ``z - mu_t``.
Features that are non-negative (pooled after a ReLU) share an offset that otherwise moves all pre-activations together:
units die in a few steps of Adam, in the worst case all of them, and the module stays the identity for good. Nor does
the correction depend on the units of the features then.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from taskvec import transforms, vectors
from taskvec.adaptive import objectives
from taskvec.adaptive.fit import FitResult, Loop, make_fit
from taskvec.adaptive.learn import Learned, Problem
from taskvec.adaptive.registry import adaptive_method
from taskvec.adaptive.rows import Rows
from taskvec.adaptive.teachers import through, with_targets
from taskvec.merging import registry
from taskvec.merging.registry import Card
from taskvec.modular import results
from taskvec.training import heads
from taskvec.tree import Tree

Array = jax.Array

STEPS_AT_ONCE = 50  # in one call of the compiled program: a step takes a millisecond
# Of `fit.Loop`, by both versions.
NOT_HEEDED = {"evaluate": "it trains adapters beside a merged model", "pieces": "it takes no gradient of the merge"}


class Adapters(NamedTuple):
    """Corrections of T tasks.

    Attributes:
      down: D, ``[T, r, d]``.
      up: U, ``[T, d, r]``; zeros at the start, so that the correction starts as the identity.
      center: mu, ``[T, d]``; zeros in the paper's form.
      scale: s, ``[T]``, in units of the features; ones in the paper's form.
    """

    down: Array
    up: Array
    center: Array
    scale: Array


class Correction(NamedTuple):
    """What `train` gives: ``(task, features [N, d]) -> [N, d]``.

    Attributes:
      adapters: of all tasks.
      normalise: whether it corrects features of unit norm, not those before.
      history: ``loss`` ``[n]`` and ``l1`` ``[n, T]`` (``[n, 1]`` with ``once``).
    """

    adapters: Adapters
    normalise: bool
    history: dict[str, np.ndarray]

    def __call__(self, task: int, features: Array) -> Array:
        tasks = len(self.adapters.up)
        if not 0 <= task < tasks:
            raise ValueError(f"task {task}, but there are corrections of {tasks} tasks")
        return _correct(jax.tree.map(lambda x: x[task], self.adapters), _units(self.normalise, features))


def _units(normalise: bool, z: Array) -> Array:
    return heads.normalise(jnp.asarray(z)) if normalise else jnp.asarray(z)


def _correct(adapter: Adapters, z_Nxd: Array) -> Array:
    hidden_Nxr = jax.nn.relu((z_Nxd - adapter.center[None]) / adapter.scale @ adapter.down.T)
    return z_Nxd - adapter.scale * (hidden_Nxr @ adapter.up.T)


def init_adapters(merged: Sequence[np.ndarray], rank: int, center: bool, seed: int) -> Adapters:
    """Adapters that change nothing yet. D is uniform in ``+-1/sqrt(d)`` (torch's kaiming_uniform with a = sqrt 5)."""
    tasks, d = len(merged), merged[0].shape[1]
    mu_Txd, s_T = np.zeros((tasks, d)), np.ones(tasks)
    if center:
        mu_Txd = np.stack([np.mean(z, 0, dtype=np.float64) for z in merged])
        s_T = np.array([np.sqrt(np.mean(np.square(z - mu))) for z, mu in zip(merged, mu_Txd, strict=True)])
        s_T = np.where(s_T > 0, s_T, 1.0)
    down = jax.random.uniform(jax.random.key(seed), (tasks, rank, d), jnp.float32, -1, 1) / np.float32(np.sqrt(d))
    up = jnp.zeros((tasks, d, rank), jnp.float32)
    return Adapters(down, up, jnp.asarray(mu_Txd, jnp.float32), jnp.asarray(s_T, jnp.float32))


def train(
    merged: Sequence[np.ndarray],
    expert: Sequence[np.ndarray],
    *,
    rank: int = 16,
    center: bool = False,
    normalise: bool = False,
    steps: int = 1000,
    learning_rate: float = 1e-3,
    per_task: int = 16,
    once: bool = False,
    seed: int = 0,
    loop: Loop = Loop(),
) -> Correction:
    """Trains the corrections of T tasks side by side on cached features.

    The published run takes 500 iterations of two batches of 16 a task, with a step of Adam after every batch: our
    1000 steps, each with one batch of every task. Adam works entry by entry and a task's loss touches its own entries
    alone, so one Adam on the stacked adapters is an independent Adam a task (as the released code behaves with torch
    2; with older torch, moments of the other tasks keep moving their weights).

    Args:
      merged: T arrays ``[N_t, d]``, features of the merged model, not normalised.
      expert: T arrays ``[N_t, d]``, features of each task's own model on the same rows.
      once: the authors' online variant: one task after the other, every row once, in random order, one per step;
        `steps` and `per_task` do not count.
      rank, center, normalise, steps, learning_rate, per_task, seed, loop: see `surgery`.

    Raises:
      ValueError: shapes do not pair up.
    """
    shapes = [(z.shape, y.shape) for z, y in zip(merged, expert, strict=True)]
    if any(z != y or len(z) != 2 or z[1] != shapes[0][0][1] or z[0] == 0 for z, y in shapes):
        raise ValueError(f"merged and expert features must be [N_t, d] in pairs, found {shapes}")
    counts = np.array([len(z) for z in merged])
    merged, expert = ([np.asarray(_units(normalise, z)) for z in each] for each in (merged, expert))
    start = init_adapters(merged, rank, center, seed)

    def pad(rows):
        return np.stack([np.pad(z, ((0, counts.max() - len(z)), (0, 0))) for z in rows]).astype(np.float32)

    def batches(step):
        rng = np.random.default_rng([seed, step])
        return rng.integers(0, counts[:, None], (len(counts), per_task), dtype=np.int32)

    def loss_fn(learnables, frozen, rows_TxB, key):
        z_TxBxd, y_TxBxd = (jax.vmap(lambda x, rows: x[rows])(x, rows_TxB) for x in frozen["features"])
        adapters = Adapters(**learnables, center=frozen["center"], scale=frozen["scale"])
        l1_T = objectives.l1(jax.vmap(_correct)(adapters, z_TxBxd), y_TxBxd)
        return l1_T.sum(), {"l1": l1_T}

    run = make_fit(loss_fn, optax.adam(learning_rate), chunk=loop.chunk or STEPS_AT_ONCE)
    frozen = {"features": (pad(merged), pad(expert)), "center": start.center, "scale": start.scale}
    frozen = jax.tree.map(jnp.asarray, frozen)
    learnables = {"down": start.down, "up": start.up}
    if once:
        done = _one_pass(run, learnables, frozen, counts, seed, loop)
    else:
        done = run(learnables, batches, steps, frozen=frozen, loop=loop)
    return Correction(start._replace(**done.learnables), normalise, done.history)


def _one_pass(
    run: Callable[..., FitResult], learnables: Tree, frozen: Tree, counts: np.ndarray, seed: int, loop: Loop
) -> FitResult:
    """Task after task, every row once and alone, in random order; all tasks share the compiled step."""
    if loop.on_start is not None:
        loop.on_start(int(counts.sum()))
    each = []
    for t, count in enumerate(counts):
        order = np.random.default_rng([seed, t]).permutation(count).astype(np.int32)
        before, own = int(counts[:t].sum()), jax.tree.map(lambda x, t=t: x[t : t + 1], (learnables, frozen))
        batches = lambda step, order=order: order[step : step + 1, None]
        each.append(run(own[0], batches, int(count), frozen=own[1], loop=loop.part(f"task{t}").after(before)))
    joined = lambda pick: jax.tree.map(lambda *x: np.concatenate(x), *map(pick, each))
    return FitResult(joined(lambda done: done.learnables), (), joined(lambda done: done.history))


def merged_model(problem: Problem, on: str | Tree) -> Tree:
    """The merged weights that a correction stands on.

    Args:
      problem: what is merged.
      on: name of a data-free method, run on the task vectors with its published settings, or the weights themselves
        (of an adaptive method, of a merge with other settings).

    Raises:
      ValueError: unknown method; one that needs more than weights, or gives one model per task; other weights.
    """
    if not isinstance(on, str):
        vectors.check_same_model(problem.theta0, on, "on")
        return on
    card = registry.get(on).card
    if card.result != "static":
        raise ValueError(f"{on} gives one model per task; a correction stands on one model for all")
    card.check(on, problem.num_tasks, True, ())
    merge = jax.jit(functools.partial(transforms.transform_task_vectors, registry.resolve(on)))
    return jax.jit(vectors.apply)(problem.theta0, merge(problem.theta0, problem.tau))


@adaptive_method(
    "surgery",
    Card(
        title="Representation Surgery for Multi-Task Model Merging",
        arxiv="2402.02705",
        year=2024,
        summary="a low-rank correction of the merged features, one per task, trained to the experts' features",
        data="unlabelled test",
        sees=("teacher",),
        result="task-conditioned",
        released_code=(
            "as here with torch 2; with older torch, steps for one task also move the others by their moments. Its "
            "weight average leaves out the eighth task. FusionBench: one batch a task and iteration, 1000 iterations, "
            "on normalised features (normalise=True). Online variant: once=True"
        ),
    ),
)
def surgery(
    problem: Problem,
    rows: Rows,
    *,
    on: str | Tree = "task_arithmetic",
    rank: int = 16,
    center: bool = False,
    normalise: bool = False,
    steps: int = 1000,
    learning_rate: float = 1e-3,
    per_task: int = 16,
    once: bool = False,
    seed: int = 0,
    loop: Loop = Loop(),
) -> Learned:
    """Corrects the features of a merged model, for each task by itself.

    ``Learned.params`` is the merged model, ``Learned.merged`` the corrected result.

    Args:
      problem: what is merged; its heads are not used.
      rows: unlabelled. Rows with targets (`teachers.with_targets`) are taken as they are.
      on: see `merged_model`; published are weight average, task arithmetic, TIES and (best) AdaMerging.
      rank: r; higher is better (the authors' README).
      center: see the module's docstring; False is the paper's form.
      normalise: correct features of unit norm (FusionBench), not those before.
      steps: of Adam, each on one batch of every task: 500 iterations of two batches, as published.
      learning_rate: of Adam.
      per_task: rows of a task in a step.
      once: every row once, see `train`.
      seed: of the rows drawn, and of D.
      loop: see `fit.Loop`; not `evaluate` and `pieces`.

    Raises:
      ValueError: see `merged_model`; a loop with what is not heeded.
    """
    problem.check_not_linear("surgery")
    loop.refuse("surgery", **NOT_HEEDED)
    if len(rows.counts) != problem.num_tasks:
        raise ValueError(
            f"rows of {len(rows.counts)} tasks for {problem.num_tasks} task vectors: give rows of every task"
        )
    params = merged_model(problem, on)
    rows = with_targets(problem, rows, loop=loop)
    mine = [through(problem.apply_fn, params, rows, t, loop=loop)["features"] for t in range(len(rows.counts))]
    theirs = [np.asarray(targets["features"]) for targets in rows.targets]
    how = {"rank": rank, "center": center, "normalise": normalise, "once": once, "per_task": per_task}
    found = train(mine, theirs, steps=steps, learning_rate=learning_rate, seed=seed, loop=loop, **how)
    merged = results.corrected(results.static(params), found)
    learnables = jax.tree.map(np.asarray, found.adapters._asdict())
    return Learned(params, learnables, found.history, merged=merged)
