"""Concrete subspace learning: one mask for all task vectors, learned by the entropy of predictions. arXiv 2312.06173.

    theta = theta0 + m / mean(m) * sum_t lam_t tau_t,    m = sigmoid((a + log u - log(1 - u)) / T),  u uniform

entry by entry, the mean over a tensor. Task arithmetic keeps lam at 0.3 and learns the logits a. AdaMerging learns a so
that coefficients adapt well *to* it: every step starts lam anew, moves it once with a fixed draw of the mask, and then
moves a at the lam found, without differentiating through the first move; a second stage adapts lam to one mask.
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from taskvec import tree as trees
from taskvec.adaptive import objectives
from taskvec.adaptive.coefficients import Constraint, coefficients
from taskvec.adaptive.fit import Gradient, Loop, LossFn
from taskvec.adaptive.learn import Learned, Outputs, Problem, learn, make_loss
from taskvec.adaptive.masks import MASKS, concrete
from taskvec.adaptive.parametrisation import fixed
from taskvec.adaptive.registry import adaptive_method
from taskvec.adaptive.rows import Batch, Rows, cyclic
from taskvec.merging.registry import Card
from taskvec.tree import Tree

_CARD = {
    "title": "Concrete Subspace Learning based Interference Elimination for Multi-task Model Fusion",
    "arxiv": "2312.06173",
    "year": 2023,
    "data": "unlabelled test",
}


def _entropy(eps: float, outputs: Outputs) -> jax.Array:
    return objectives.entropy(outputs.logits, eps=eps)


@adaptive_method(
    "concrete_task_arithmetic",
    Card(
        **_CARD,
        summary="task arithmetic under one learned mask of entries, shared by all tasks",
        beside="a mask of entries",
        released_code=(
            "masks leftovers of the text tower as well; FusionBench: trainable parameters only, no clamp, "
            "entropy_eps=1e-8"
        ),
    ),
)
def concrete_task_arithmetic(
    problem: Problem,
    rows: Rows,
    *,
    scale: float = 0.3,
    temperature: float = 0.5,
    mask_init: float = 0.0,
    eval_mask: Literal[MASKS] = "sample",
    steps: int = 2000,
    learning_rate: float = 1e-3,
    per_task: int = 16,
    entropy_eps: float = 0.0,
    seed: int = 0,
    loop: Loop = Loop(),
) -> Learned:
    """Learns the mask on unlabelled rows, with a fresh draw of it in every step.

    Args:
      problem: what is merged.
      rows: unlabelled.
      scale: lam, of all tasks.
      temperature: T.
      mask_init: start of the logits.
      eval_mask: of the resulting model: ``sample`` (one draw, as published: accuracies vary with the seed), ``mean``
        or ``hard``, see `masks.concrete`.
      steps: of Adam (betas 0.9, 0.999).
      learning_rate: of Adam.
      per_task: rows of a task in a step; tasks go through their rows in epochs.
      entropy_eps: see `objectives.entropy`.
      seed: of the rows and masks drawn.
      loop: see `fit.Loop`.

    Raises:
      ValueError: numbers of tasks do not fit; unknown `eval_mask`.
      FitDiverged: see `fit.fit`.
    """
    problem.check(rows)
    base = fixed(coefficients(trees.groups(problem.theta0, "task"), problem.num_tasks, scale, "identity"))
    masked = lambda mask: concrete(base, problem.theta0, temperature, mask, mask_init)
    batches, adam = cyclic(rows, per_task, seed), optax.adam(learning_rate)
    final = masked(eval_mask)
    objective = functools.partial(_entropy, entropy_eps)
    return learn(problem, masked("sample"), objective, batches, adam, steps, final=final, seed=seed, loop=loop)


@adaptive_method(
    "concrete_adamerging",
    Card(
        **_CARD,
        summary="AdaMerging under a mask of entries that is learned so that coefficients adapt well to it",
        beside="a mask of entries",
        released_code=(
            "the first move of the coefficients is by the gradient at the model of the step before (they are reset, "
            "the merged weights are not: stale_gradient=True); rows come in one fixed order. FusionBench: so as well "
            "(stale_gradient=True), and one draw of the mask for both moves (fresh_mask=False), "
            "constraint='identity', entropy_eps=1e-8, steps=1000"
        ),
    ),
)
def concrete_adamerging(
    problem: Problem,
    rows: Rows,
    *,
    mode: trees.GroupMode = "tensor",
    constraint: Constraint = "clip",
    init: float | np.ndarray = 0.3,
    temperature: float = 0.5,
    mask_init: float = 0.0,
    fresh_mask: bool = True,
    stale_gradient: bool = False,
    keep_moments: bool = True,
    eval_mask: Literal[MASKS] = "sample",
    steps: int = 2000,
    learning_rate: float = 1e-3,
    inner_learning_rate: float = 1.0,
    coefficient_steps: int = 1000,
    coefficient_learning_rate: float = 1e-3,
    per_task: int = 16,
    entropy_eps: float = 0.0,
    seed: int = 0,
    loop: Loop = Loop(),
) -> Learned:
    """Learns the mask, then coefficients under one mask, on unlabelled rows.

    The inner Adam keeps its moments from step to step, although the coefficients start anew, as in all code that was
    released; with a rate of 1 its first move is +-1. The second stage starts them anew, with an Adam of their own,
    under the mask of the resulting model.

    Args:
      problem: what is merged.
      rows: unlabelled; a step of the first stage takes two batches, of the second one.
      mode: ``tensor`` (the paper's layer-wise), ``task``, or another of `taskvec.tree.groups`.
      constraint: of the coefficients, see `coefficients.coefficients`; not ``simplex``.
      init: start of the coefficients, a number or ``[G, T]``.
      temperature, mask_init, eval_mask: as in `concrete_task_arithmetic`.
      fresh_mask: whether the mask is drawn anew for the second move of a step.
      stale_gradient: whether the first move of a step is by the gradient at the coefficients of the step before
        (released code), not at those that it starts from.
      keep_moments: False lets the inner Adam start anew as the coefficients do. Then every move is +-1 times its rate.
      steps: of Adam on the mask. After them the coefficients are those of the last inner move.
      learning_rate: of that Adam.
      inner_learning_rate: of the inner Adam on the coefficients.
      coefficient_steps: of the second stage; 0 for none.
      coefficient_learning_rate: of its Adam.
      per_task: rows of a task in a batch; tasks go through their rows in epochs.
      entropy_eps: see `objectives.entropy`.
      seed: of the rows and masks drawn.
      loop: see `fit.Loop`; steps of both stages are counted through.

    Raises:
      ValueError: numbers of tasks do not fit; unknown `eval_mask`, `mode` or `constraint`.
      FitDiverged: see `fit.fit`.
    """
    problem.check(rows)
    if constraint == "simplex":
        raise ValueError("concrete_adamerging: inner moves leave the simplex; constraint='softmax' stays on it")
    groups = trees.groups(problem.theta0, mode)
    base = coefficients(groups, problem.num_tasks, init, constraint)
    masked = lambda mask: concrete(base, problem.theta0, temperature, mask, mask_init)
    final = masked(eval_mask)
    rates = inner_learning_rate, coefficient_learning_rate
    objective = functools.partial(_entropy, entropy_eps)
    under_final = make_loss(problem, final, objective)
    how = fresh_mask, stale_gradient, keep_moments
    stages = _two_stages(base.init(), steps, *rates, *how, under_final, jax.random.key(seed))
    optimiser, batches = _outer(learning_rate, steps), _pairs(cyclic(rows, per_task, seed), steps)
    total = steps + coefficient_steps
    return learn(
        problem,
        masked("sample"),
        objective,
        batches,
        optimiser,
        total,
        final=final,
        gradient=stages,
        seed=seed,
        loop=loop,
    )


def _outer(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """Adam on the mask in the first stage; coefficients go where `_two_stages` says."""
    rate = lambda step: jnp.where(step < steps, learning_rate, 0.0)
    # What stands for the gradient of the coefficients is the way back from where they shall be.
    parts = {"base": optax.sgd(1.0), "mask": optax.adam(rate)}
    return optax.multi_transform(parts, {"merge": {"base": "base", "mask": "mask"}})


def _pairs(batches: Callable[[int], Batch], steps: int) -> Callable[[int], dict[str, Batch]]:
    """Two batches per step; in the second stage one, given twice."""

    def pair(step: int) -> dict[str, Batch]:
        if step < steps:
            return {"inner": batches(2 * step), "outer": batches(2 * step + 1)}
        only = batches(steps + step)
        return {"inner": only, "outer": only}

    return pair


def _two_stages(
    start: Tree,
    steps: int,
    inner_rate: float,
    second_rate: float,
    fresh: bool,
    stale: bool,
    keep: bool,
    final_loss: LossFn,
    mask_key: jax.Array,
) -> Callable[[LossFn], Gradient]:
    """How `concrete_adamerging` moves: both stages as one gradient, so that one run can be watched and resumed."""
    inner, second = optax.adam(inner_rate), optax.adam(second_rate)

    def gradient(loss_fn: LossFn) -> Gradient:
        of = lambda loss: lambda base, mask, *args: loss({"merge": {"base": base, "mask": mask}}, *args)
        by_base, by_mask = (jax.value_and_grad(of(loss_fn), argnums=i, has_aux=True) for i in (0, 1))
        by_base_at_last = jax.value_and_grad(of(final_loss), has_aux=True)

        def first_stage(memory, base, mask, frozen, batch, key):
            key_in, key_out = jax.random.split(key)
            _, g = by_base(base if stale else start, mask, frozen, batch["inner"], key_in)
            updates, state = inner.update(g, memory["inner"] if keep else inner.init(start), start)
            found = optax.apply_updates(start, updates)
            (loss, metrics), g = by_mask(found, mask, frozen, batch["outer"], key_out if fresh else key_in)
            return loss, metrics, found, g, memory | {"inner": state}

        def second_stage(memory, base, mask, frozen, batch, key):
            base = jax.tree.map(lambda now, first: jnp.where(memory["step"] == steps, first, now), base, start)
            (loss, metrics), g = by_base_at_last(base, mask, frozen, batch["outer"], mask_key)
            updates, state = second.update(g, memory["second"], base)
            still = jax.tree.map(jnp.zeros_like, mask)
            return loss, metrics, optax.apply_updates(base, updates), still, memory | {"second": state}

        def apply(memory, learnables, frozen, batch, key):
            base, mask = learnables["merge"]["base"], learnables["merge"]["mask"]
            args = memory, base, mask, frozen, batch, key
            loss, metrics, found, g, memory = jax.lax.cond(memory["step"] < steps, first_stage, second_stage, *args)
            back = jax.tree.map(jnp.subtract, base, found)
            memory = memory | {"step": memory["step"] + 1}
            return loss, metrics, {"merge": {"base": back, "mask": g}}, memory

        def init(learnables: Tree) -> Tree:
            return {"inner": inner.init(start), "second": second.init(start), "step": jnp.int32(0)}

        return Gradient(init, apply)

    return gradient
