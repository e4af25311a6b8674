"""What the methods of aTLAS (see `taskvec.adaptive.atlas`) have in common."""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from taskvec import tree as trees
from taskvec.adaptive import objectives
from taskvec.adaptive.coefficients import coefficients
from taskvec.adaptive.fit import Loop
from taskvec.adaptive.learn import Kind, Learner, Objective, Outputs, Problem, make_learner
from taskvec.adaptive.optimisers import cosine
from taskvec.adaptive.parametrisation import Parametrisation
from taskvec.adaptive.rows import Rows
from taskvec.transforms.base import check_choice
from taskvec.tree import Tree

TITLE = "Knowledge Composition using Task Vectors with Learned Anisotropic Scaling"
PARTITIONED = ("all", "matrices")
Partitioned = Literal[PARTITIONED]


def optimiser(
    learning_rate: optax.ScalarOrSchedule, weight_decay: float = 0.1, gradient_norm: float | None = 1.0
) -> optax.GradientTransformation:
    """AdamW along the gradient scaled to the global norm `gradient_norm`; see `taskvec.adaptive.atlas`."""
    adamw = optax.adamw(learning_rate, weight_decay=weight_decay)
    return adamw if gradient_norm is None else optax.chain(optax.normalize_by_update_norm(gradient_norm), adamw)


def free_coefficients(
    problem: Problem | Kind, mode: str, partitions: int = 1, partitioned: str = "all", seed: int = 0
) -> Parametrisation:
    """Coefficients of any sign, zero at the start.

    Args:
      problem: what is merged.
      mode: of `taskvec.tree.groups`.
      partitions: K.
      partitioned: with K > 1, ``all`` tensors, or ``matrices``: others then stay at theta0, as in the released code
        (it drops convolutions and vectors without a word), and tensors of equal shape share their parts.
      seed: of the parts.
    """
    check_choice("partitioned", partitioned, PARTITIONED)
    groups = trees.groups(problem.theta0, mode)
    as_released = partitioned == "matrices"
    made = coefficients(groups, problem.num_tasks, 0.0, "identity", partitions, seed, shared_parts=as_released)
    if partitions > 1 and as_released:
        combine = made.combine
        keep = lambda theta0, tau, factor: combine(theta0, tau, factor) if theta0.ndim == 2 else theta0
        made = made._replace(combine=keep)
    return made


@functools.lru_cache(1)
def learner_of(
    kind: Kind,
    objective: Objective,
    mode: str,
    partitions: int,
    partitioned: str,
    seed: int,
    learning_rate: float,
    weight_decay: float,
    gradient_norm: float | None,
    accumulate: int,
    chunk: int | None,
    pieces: int = 1,
) -> Learner:
    """Free coefficients by AdamW, its rate falling to 0 along a cosine; the last one made is kept for the next task.

    Args:
      kind: of the problems.
      objective: a function that stays the same from task to task.
      mode, partitions, partitioned, seed: see `free_coefficients`.
      learning_rate, weight_decay, gradient_norm: see `optimiser`.
      accumulate: batches a step of the optimiser.
      chunk, pieces: of the loop.
    """
    made = free_coefficients(kind, mode, partitions, partitioned, seed)
    falling = optax.chain(optimiser(1.0, weight_decay, gradient_norm), cosine(learning_rate))
    return make_learner(kind, made, objective, falling, accumulate=accumulate, loop=Loop(chunk=chunk, pieces=pieces))


def lp_penalty(order: int | None, gamma: float = 0.5) -> Callable[[Tree], jax.Array] | None:
    """``gamma * mean_l |lam[l, :]|_p``, with gradient 0 at 0, or ``None``; the released code has it as an option."""
    if order is None:
        return None
    if order not in (1, 2):
        raise ValueError(f"order={order}; allowed: None, 1, 2")

    def penalty(learnables: Tree) -> jax.Array:
        lam_GxT = learnables["lam"]
        if order == 1:
            return gamma * jnp.abs(lam_GxT).sum(1).mean()
        squares = jnp.square(lam_GxT).sum(1)
        return gamma * jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0).mean()

    return penalty


def cross_entropies(outputs: Outputs) -> jax.Array:
    """The tasks' mean cross-entropies with their labels: ``[S]``."""
    return objectives.cross_entropy(outputs.logits, outputs.batch["label"])


def check_labels(rows: Rows, name: str) -> None:
    """Raises `ValueError` if there are no labels."""
    if rows.labels is None:
        raise ValueError(f"{name} learns from labelled rows; pass rows with labels")


def check_whole(loop: Loop, name: str) -> None:
    """Raises `ValueError` if batches were to be taken in pieces."""
    loop.refuse(name, pieces="its loss looks across a batch")
