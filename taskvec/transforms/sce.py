"""Select, calculate, erase: a mean whose weights come from the energy of the entries on which tasks differ most."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from taskvec.transforms.base import Array, Leaf, Measure, ModelInfo, Transform, check_choice, check_fraction
from taskvec.transforms.order import kth_magnitude_of
from taskvec.transforms.reduce import weighted_sum


@functools.cache
def select_calculate_erase(
    density: float, normalize: bool = True, mixed: str = "selected", guards: str = "none"
) -> Transform:
    """Selects entries, calculates one coefficient per task and tensor, erases minority signs, and adds up.

    In each tensor: the `density` largest of the variances (over tasks) that are not zero are selected;
    ``w_t = ||selected x_t||^2 / sum_k ||selected x_k||^2``; entries whose sign is not that of ``sum_t x_t`` are erased
    (a sum of zero elects +); ``x = sum_t w_t x_t``, by default divided by the coefficients that are left at the entry.
    Source: SCE of FuseChat, arXiv 2408.07990, after the authors' program.

    Args:
      density: fraction selected, in (0, 1]; 1 selects everything, also entries on which all tasks agree exactly.
      normalize: whether to divide by the sum of the coefficients left at an entry, as both released programs do.
      mixed: ``selected`` merges the selected entries (the rest goes back to the pretrained values; MergeKit); ``all``
        merges every entry with the coefficients of the selected ones (the authors' program).
      guards: ``none``, or ``mergekit``: equal coefficients where ``sum_t mean(x_t^2) < 1e-6``, and divisors of at least
        1e-6. The first makes the method a plain mean for task vectors as small as 1e-3.
    """
    check_fraction("density", density)
    check_choice("mixed", mixed, ("selected", "all"))
    check_choice("guards", guards, ("none", "mergekit"))

    def selected(x: Array, stats: tuple) -> Array:
        # The margin keeps the threshold's own entry, whose variance may be rounded differently in another program.
        return x if density == 1 else jnp.where(_variance(x) >= stats[1] * (1 - 1e-6), x, 0.0)

    def energies(x: Array, leaf: Leaf, stats: tuple) -> Array:
        return (selected(x, stats) ** 2).sum(tuple(range(1, x.ndim)))

    def coefficients(energy: Array, info: ModelInfo, stats: tuple) -> Array:
        total = energy.sum()
        few = total / max(info.size, 1) < 1e-6 if guards == "mergekit" else total <= 0
        return jnp.where(few, 1 / info.num_tasks, energy / jnp.where(total > 0, total, 1.0))

    def apply(x: Array, leaf: Leaf, stats: tuple) -> Array:
        weights, x = stats[-1], selected(x, stats) if mixed == "selected" else x
        elected = jnp.where(weighted_sum([1.0] * x.shape[0], x) >= 0, 1.0, -1.0)
        agrees = jnp.sign(x) == elected
        total = weighted_sum(weights, jnp.where(agrees, x, 0.0))
        if not normalize:
            return total
        left = weighted_sum(weights, agrees.astype(x.dtype))
        if guards == "mergekit":
            return total / jnp.maximum(left, 1e-6)
        return jnp.where(left > 0, total / jnp.where(left > 0, left, 1.0), 0.0)

    measures = () if density == 1 else _variance_threshold(density)
    return Transform("select_calculate_erase", apply, (*measures, Measure(energies, coefficients, scope="tensor")))


def _variance(x: Array) -> Array:
    """Population variance over the tasks, exactly 0 where all agree."""
    ones, x = [1.0] * x.shape[0], x - x[:1]
    return weighted_sum(ones, (x - weighted_sum(ones, x) / x.shape[0]) ** 2) / x.shape[0]


def _variance_threshold(density: float) -> tuple[Measure, Measure]:
    """Two rounds that find, in each tensor, the ``int(density m)``-th largest of the m variances that are not zero."""
    first, second = kth_magnitude_of(lambda n: n, "tensor")

    def find_upper(counts: Array, info: ModelInfo, stats: tuple) -> tuple[Array, Array, Array]:
        xp = np if isinstance(counts, np.ndarray) else jnp
        below = xp.cumsum(counts[0])
        wanted = xp.floor(density * (below[-1] - below[0])).astype(counts.dtype)  # bin 0 holds zeros only
        rank = below[-1] - xp.maximum(wanted, 1) + 1
        upper = xp.searchsorted(below, rank)
        rest = rank - xp.where(upper > 0, below[upper - 1], 0).astype(counts.dtype)
        return upper.reshape(1, 1), rest.reshape(1, 1), wanted

    def find_lower(counts: Array, info: ModelInfo, stats: tuple) -> Array:
        return jnp.where(stats[0][2] > 0, second.finish(counts, info, (stats[0][:2],))[0], jnp.inf)

    on_host = jax.jit(lambda x: _variance(jnp.stack(x))[None])  # one variance instead of T vectors
    return (
        Measure(
            lambda x, leaf, stats: first.of_leaf(_variance(x)[None], leaf, stats),
            find_upper,
            scope="tensor",
            host=lambda x, stats: first.host(np.asarray(on_host(tuple(map(np.asarray, x)))), stats),
        ),
        Measure(
            lambda x, leaf, stats: second.of_leaf(_variance(x)[None], leaf, (stats[0][:2],)),
            find_lower,
            scope="tensor",
            host=lambda x, stats: second.host(np.asarray(on_host(tuple(map(np.asarray, x)))), (stats[0][:2],)),
        ),
    )
