"""LoraHub: weights of LoRA modules from a few examples, without gradients. arXiv 2307.13269 (COLM 2024).

    A = sum_t w_t A_t,  B = sum_t w_t B_t,  theta = theta0 + A B,
    min_w CE(theta) + 0.05 mean_t |w_t|,    w in [-1.5, 1.5]^T

Factors are summed, not their products. The paper searches with Shiwa of the nevergrad package, its code with NGOpt;
ours is the CMA-ES of `taskvec.merging.evolution`, a generation at a time, within the same box and budget.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from taskvec import tree as trees
from taskvec.adaptive import atlas_parts as parts
from taskvec.adaptive.coefficients import coefficients
from taskvec.adaptive.fit import Gradient, Loop, LossFn
from taskvec.adaptive.learn import Kind, Learned, Learner, Problem, make_learner
from taskvec.adaptive.parametrisation import LowRank, Parametrisation, weighted_sum
from taskvec.adaptive.registry import adaptive_method
from taskvec.adaptive.rows import Rows
from taskvec.merging import evolution
from taskvec.merging.registry import Card
from taskvec.tree import Tree

Array = jax.Array


def composed(parametrisation: Parametrisation) -> Parametrisation:
    """Coefficients that multiply the factors of low-rank task vectors: ``(sum_t w_t up_t) @ (sum_t w_t down_t)``.

    Dense task vectors are summed as ever.
    """

    def combine(theta0: Array, tau: Any, coef_T: Array) -> Array:
        if not isinstance(tau, LowRank):
            return weighted_sum(theta0, tau, coef_T)
        wide = jnp.promote_types(theta0.dtype, jnp.float32)
        up, down = (weighted_sum(jnp.zeros(x.shape[1:], wide), x, coef_T) for x in (tau.up, tau.down))
        return theta0.astype(wide) + up @ down

    return parametrisation._replace(combine=combine)


def by_evolution(bound: float, sigma: float, at_once: int = 1):
    """A `Gradient` that has none: each step is a generation of CMA-ES, and moves the learnables to the best point yet.

    For learnables ``{"merge": {"lam": [1, T]}}`` and `optax.sgd` with learning rate 1. The first generation holds the
    starting point.

    Args:
      bound: of the box ``[-bound, bound]^T``.
      sigma: initial step, as a fraction of the box.
      at_once: points whose merged models are held at the same time.
    """

    def make(loss_fn: LossFn) -> Gradient:
        def init(learnables: Tree) -> Tree:
            start_T = (learnables["merge"]["lam"][0] + bound) / (2 * bound)
            return {"search": evolution.begin(start_T, sigma), "best": learnables, "loss": jnp.float32(jnp.inf)}

        def apply(state: Tree, learnables: Tree, frozen: Any, batch: Any, key: Array):
            search = state["search"]
            points_PxT = evolution.ask(search, key)
            points_PxT = points_PxT.at[0].set(jnp.where(search.generation == 0, search.mean, points_PxT[0]))
            lam = lambda point_T: {"merge": {"lam": bound * (2 * point_T - 1)[None]}}
            loss = lambda point_T: loss_fn(lam(point_T), frozen, batch, key)
            losses_P, metrics = jax.lax.map(loss, points_PxT, batch_size=at_once)
            losses_P = jnp.where(jnp.isnan(losses_P), jnp.inf, losses_P)
            least = losses_P.argmin()
            better = losses_P[least] < state["loss"]
            best = jax.tree.map(lambda x, y: jnp.where(better, x, y), lam(points_PxT[least]), state["best"])
            after = {
                "search": evolution.tell(search, points_PxT, -losses_P),
                "best": best,
                "loss": jnp.where(better, losses_P[least], state["loss"]),
            }
            move = jax.tree.map(jnp.subtract, learnables, best)
            return after["loss"], {name: x[least] for name, x in metrics.items()}, move, after

        return Gradient(init, apply)

    return make


def side_by_side(theta0: Tree) -> int:
    """Points whose merged models are evaluated at the same time, by default.

    On CPU one: its cores are busy with one, and memory would grow. Elsewhere, where a few rows fill no device, as many
    as hold 4 GiB of merged weights together, at least one: 12 of ViT-B/32, which is a whole generation of 20 modules.
    """
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(theta0))
    return 1 if jax.default_backend() == "cpu" else max(2**32 // held, 1)


@adaptive_method(
    "lorahub",
    Card(
        title="LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition",
        arxiv="2307.13269",
        year=2023,
        summary="one weight a LoRA module from a few examples of a new task, by an evolution strategy",
        learns="one target",
        beside="factors are summed, not their products",
        data="few labelled",
        released_code=(
            "optimises with NGOpt of nevergrad where the paper names Shiwa; divides the mean loss once more by the "
            "number of rows, so that with 5 of them the penalty weighs as regularise=0.25"
        ),
    ),
)
def lorahub(
    problem: Problem,
    rows: Rows,
    *,
    budget: int = 40,
    bound: float = 1.5,
    regularise: float = 0.05,
    factors: bool = True,
    sigma: float = 0.25,
    at_once: int | None = None,
    seed: int = 0,
    loop: Loop = Loop(),
) -> Learned:
    """Searches one weight per module; all rows are used in every evaluation.

    The result is the best point that was tried, zero weights (the pretrained model) among them. A step of `loop` is a
    generation; ``history["loss"]`` is the least loss yet, ``history["objective"]`` that of the generation's best.
    Tasks with as many rows share their compiled programs.

    Args:
      problem: T task vectors, published 20 drawn at random from some 200 LoRA modules of rank 16; one head.
      rows: the few labelled rows of the new task; published 5.
      budget: evaluations at most; a generation takes `evolution.population` of T (12 for 20 modules).
      bound: of the box ``[-bound, bound]``.
      regularise: factor of ``mean_t |w_t|``.
      factors: whether the factors of low-rank task vectors are summed, as published, or their products.
      sigma: initial step, as a fraction of the box (our choice).
      at_once: points evaluated side by side, see `side_by_side` for the default; memory grows with it.
      seed: of the samples.
      loop: see `fit.Loop`.

    Raises:
      ValueError: not one head and one set of labelled rows, or a budget below one generation.
    """
    parts.check_labels(rows, "lorahub")
    parts.check_whole(loop, "lorahub")
    if (problem.heads.kernel.shape[0], len(rows.counts)) != (1, 1):
        raise ValueError("lorahub takes one head and one set of rows, those of the new task")
    generations = budget // evolution.population(problem.num_tasks)
    if generations < 1:
        least = evolution.population(problem.num_tasks)
        raise ValueError(f"budget={budget}: a generation of {problem.num_tasks} modules takes {least} evaluations")
    at_once = side_by_side(problem.theta0) if at_once is None else at_once
    learner = _learner_of(problem.kind, bound, regularise, factors, sigma, at_once, loop.chunk)
    batch = rows.batch([np.arange(rows.counts[0])])
    return learner.run(problem, lambda step: batch, generations, seed=seed, loop=loop)


@functools.lru_cache(1)
def _learner_of(
    kind: Kind, bound: float, regularise: float, factors: bool, sigma: float, at_once: int, chunk: int | None
) -> Learner:
    """The last one made is kept for the next task."""
    parametrisation = coefficients(trees.groups(kind.theta0, "task"), kind.num_tasks, 0.0, "identity")
    return make_learner(
        kind,
        composed(parametrisation) if factors else parametrisation,
        parts.cross_entropies,
        optax.sgd(1.0),
        penalty=lambda learnables: regularise * jnp.abs(learnables["lam"]).mean(),
        gradient=by_evolution(bound, sigma, at_once),
        loop=Loop(chunk=chunk),
    )
