"""Masks that compare a task's own vector with the merged one."""

import functools
from collections.abc import Sequence

import jax.numpy as jnp

from taskvec.transforms.base import Array, Leaf, Measure, ModelInfo, Transform, check_choice
from taskvec.transforms.reduce import weighted_sum
from taskvec.transforms.sparsify import by_task, l1_norms
from taskvec.transforms.stored import Masked

Thresholds = float | Sequence[float]


def tall_masks(x: Array, tau: Array, threshold: Array | float) -> Array:
    """``m_t = |tau_t| > threshold_t |x - tau_t|``: where task t's own vector dominates the merged x. ``[T, ...]`` bool.

    Entries that neither changes are in no mask. Source: TALL-masks, arXiv 2405.07813, equation 4.
    """
    return jnp.abs(tau) > by_task(threshold, tau) * jnp.abs(x[None] - tau)


def keep_masked(threshold: Thresholds) -> Transform:
    """Ends a chain with the merged vector and the TALL-masks of all tasks: ``m_t x`` for task t (`stored.Masked`).

    Args:
      threshold: lambda_t of the masks; one number, or one per task. A search over it compiles once.
    """
    return Transform("keep_masked", _masked, constants=_checked(threshold))


def _masked(x: Array, leaf: Leaf, stats: tuple) -> Masked:
    _check_merged("keep_masked", x, leaf)
    return Masked.make(x, tall_masks(x, leaf.tau, jnp.stack([jnp.asarray(s) for s in stats])))


def consensus(threshold: Thresholds, at_least: int = 2) -> Transform:
    """Keeps the entries of a merged vector that at least `at_least` tasks need, by their TALL-masks.

    With 2, weights that no task uses (catastrophic) and that one task uses (selfish) go back to their pretrained
    values. Source: Consensus merging, arXiv 2405.07813, section 5.

    Args:
      threshold: lambda_t of the masks; one number, or one per task (the paper searches {.2, ..., .6} for each task). A
        search over it compiles once.
      at_least: k, number of tasks.
    """
    if at_least < 1:
        raise ValueError(f"at_least must be 1 or more, got {at_least}")
    return Transform("consensus", _agreed, constants=(*_checked(threshold), at_least))


def _agreed(x: Array, leaf: Leaf, stats: tuple) -> Array:
    _check_merged("consensus", x, leaf)
    needed_by = tall_masks(x, leaf.tau, jnp.stack([jnp.asarray(s) for s in stats[:-1]])).sum(0)
    return jnp.where(needed_by >= stats[-1], x, 0.0)


@functools.cache
def elect_and_mask(rescale: str = "paper") -> Transform:
    """Ends a chain with one elected vector, a mask and a factor per task: ``f_t m_t x`` for task t (`stored.Masked`).

    With g the sign of ``sum_t x_t`` (-1 where it is zero): ``m_t = (x_t g > 0)``, ``x = g max_t m_t |x_t|`` and
    ``f_t = ||x_t||_1 / ||m_t x||_1``. Source: EMR-Merging, arXiv 2405.17461, section 3.2.

    Args:
      rescale: ``paper`` takes the norms of the whole model; ``released`` (code) the sums of every tensor's mean
        magnitude, in which a bias weighs as much as a matrix; ``none`` leaves f_t = 1.
    """
    check_choice("rescale", rescale, ("paper", "released", "none"))

    def apply(x: Array, leaf: Leaf, stats: tuple) -> Masked:
        merged, mask = _elected(x, leaf)
        return Masked.make(merged, mask, None if rescale == "none" else stats[-1])

    def norms(x: Array, leaf: Leaf, stats: tuple) -> tuple[Array, Array]:
        merged, mask = _elected(x, leaf)
        entries = stats[0] if rescale == "released" else 1.0
        return l1_norms(x) / entries, l1_norms(jnp.where(mask, merged[None], 0.0)) / entries

    def ratio(total: tuple[Array, Array], info: ModelInfo, stats: tuple) -> Array:
        own, masked = total
        return jnp.where(masked > 0, own / jnp.where(masked > 0, masked, 1.0), 1.0)

    # A tensor may come in blocks of rows: its size is known where a measure of the tensor ends.
    entries = Measure(lambda x, leaf, stats: jnp.zeros(()), lambda _, info, __: jnp.float32(info.size), scope="tensor")
    measures = {"paper": (Measure(norms, ratio),), "released": (entries, Measure(norms, ratio)), "none": ()}
    return Transform("elect_and_mask", apply, measures[rescale])


def _elected(x: Array, leaf: Leaf) -> tuple[Array, Array]:
    if x.shape != leaf.tau.shape:
        raise ValueError("elect_and_mask takes task vectors: leave out sum_tasks() or another reduction before it")
    sign = jnp.where(weighted_sum([1.0] * x.shape[0], x) > 0, 1.0, -1.0)
    along = [x_t * sign for x_t in x]
    largest = functools.reduce(jnp.maximum, along)
    return sign * jnp.maximum(largest, 0.0), jnp.stack([each > 0 for each in along])


def _check_merged(name: str, x: Array, leaf: Leaf) -> None:
    if x.shape != leaf.theta0.shape:
        raise ValueError(f"{name} masks a merged vector: put sum_tasks() or another reduction before it")


def _checked(threshold: Thresholds) -> tuple[float, ...]:
    thresholds = tuple(threshold) if isinstance(threshold, Sequence) else (threshold,)
    if not thresholds or min(thresholds) <= 0:
        raise ValueError(f"threshold must be positive, got {threshold!r}")
    return thresholds
