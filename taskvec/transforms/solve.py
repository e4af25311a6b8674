"""Transforms that solve for the merged matrix of a linear layer: a regression, or the least interference.

They work on every matrix of a linear layer by itself, as ``[out, in]``, a layer of a stack at a time.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from taskvec.transforms.base import Array, Leaf, Measure, Transform, check_choice
from taskvec.transforms.matrices import input_first, is_linear, turned
from taskvec.transforms.reduce import mean, weighted_sum
from taskvec.transforms.sparsify import by_task

OTHERS = ("mean", "pretrained")


def by_output(fn: Callable[..., Array], x: Array, leaf: Leaf) -> Array:
    """Applies ``fn: [T, out, in] -> [out, in]`` to a matrix, in the orientation that its name stands for."""
    return turned(fn(turned(x, leaf)), leaf)


def rest(x: Array, others: str) -> Array:
    """What tensors become that no equation is solved for."""
    return mean(x) if others == "mean" else jnp.zeros_like(x[0])


def minimise(gradient: Callable[[Array], Array], start: Array, steps: int, learning_rate: float) -> Array:
    """`steps` steps of Adam (the usual 0.9, 0.999, 1e-8)."""
    import optax  # here, for it takes as long to import as a small merge

    adam = optax.adam(learning_rate)

    def step(carry: tuple, _) -> tuple:
        updates, state = adam.update(gradient(carry[0]), carry[1])
        return (optax.apply_updates(carry[0], updates), state), None

    return jax.lax.scan(step, (start, adam.init(start)), None, length=steps)[0][0]


@functools.cache
def regress(reduce_nondiagonal: float = 0.9, ridge: float = 1e-6) -> Transform:
    """Matrices that best keep the outputs of all tasks' linear layers; the mean of all other tensors.

    ``W = (sum_t G_t)^-1 sum_t G_t W_t`` for ``y = x W``, with ``G_t`` the Gram matrix ``E[x^T x]`` of the layer's
    inputs in task t (``leaf.extras["gram"]``: ``[T, in, in]``), its entries off the diagonal multiplied by
    `reduce_nondiagonal`. theta_0 drops out: it is solved for the vectors' difference to their mean, which is also what
    inputs that never occurred keep. The sum is scaled to a unit diagonal, and `ridge` times its Frobenius norm is
    added there; a matrix with `reduce_nondiagonal` < 1 has no eigenvalue below 1 - `reduce_nondiagonal` then.
    """
    if not 0 <= reduce_nondiagonal <= 1 or not ridge > 0:
        raise ValueError(f"need reduce_nondiagonal in [0, 1] and ridge > 0, got {reduce_nondiagonal}, {ridge}")

    @jax.custom_batching.sequential_vmap
    def solved(x_TxOxI: Array, gram_TxIxI: Array) -> Array:
        size = x_TxOxI.shape[2]
        if gram_TxIxI.shape != (x_TxOxI.shape[0], size, size):
            raise ValueError(
                f"a Gram matrix of shape {gram_TxIxI.shape} for {x_TxOxI.shape[0]} matrices with {size} inputs: leaves "
                "named kernel are [in, out], others [out, in]"
            )
        average = mean(x_TxOxI)
        factor = jnp.where(jnp.eye(size, dtype=bool), 1.0, reduce_nondiagonal)
        grams = [gram.astype(jnp.float32) * factor for gram in gram_TxIxI]
        total = sum(grams)
        right_IxO = sum(gram @ (x - average).T for gram, x in zip(grams, x_TxOxI, strict=True))
        root = jnp.sqrt(jnp.maximum(jnp.diagonal(total), 0.0))
        unit = jnp.where(root > 0, 1 / jnp.where(root > 0, root, 1.0), 0.0)
        scaled = total * unit[:, None] * unit
        scaled += jnp.diag(jnp.where(root > 0, 0.0, 1.0) + ridge * jnp.linalg.norm(scaled))
        change = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(scaled), right_IxO * unit[:, None])
        return average + (change * unit[:, None]).T

    def apply(x: Array, leaf: Leaf, stats: tuple) -> Array:
        if "gram" not in leaf.extras or x.ndim != 3:
            return mean(x)
        with jax.default_matmul_precision("highest"):
            return by_output(lambda x: solved(x, leaf.extras["gram"]), x, leaf)

    return Transform("regress", apply, predicates=(input_first,), by_rows=False)


@functools.cache
def weigh_by_fisher(
    weights: tuple[float, ...] | None = None,
    normalize: bool = True,
    floor: float = 1e-6,
    floor_rule: str = "all",
) -> Transform:
    """Mean of the tasks, every entry weighed by its Fisher information.

    ``sum_t c_t F_t x_t / sum_t c_t F_t``, ``F_t = leaf.extras["fisher"][t]``, c_t being `weights`, over ``||F_t||_2``
    of the whole model if `normalize`. Entries that no task informs, and tensors without Fisher information, get the
    mean. See `merging.fisher`.
    """
    check_choice("floor_rule", floor_rule, ("all", "first", "add"))
    if floor < 0:
        raise ValueError(f"floor must not be negative, got {floor}")

    def floored(fisher: Array) -> Array:
        fisher = fisher.astype(jnp.float32)
        if floor_rule == "add":
            return fisher + floor
        if floor_rule == "first":
            return fisher.at[0].max(floor)
        return jnp.maximum(fisher, floor)

    def squares(x: Array, leaf: Leaf, stats: tuple) -> Array:
        if "fisher" not in leaf.extras:
            return jnp.zeros(leaf.tau.shape[0])
        fisher = leaf.extras["fisher"].astype(jnp.float32) + (floor if floor_rule == "add" else 0.0)
        return jnp.square(fisher.reshape(fisher.shape[0], -1)).sum(1)

    def norms(total: Array, info, stats: tuple) -> Array:
        return jnp.where(total > 0, jnp.sqrt(jnp.where(total > 0, total, 1.0)), 1.0)

    def apply(x: Array, leaf: Leaf, stats: tuple) -> Array:
        if "fisher" not in leaf.extras:
            return mean(x)
        if leaf.extras["fisher"].shape != x.shape:
            raise ValueError(f"Fisher information of shape {leaf.extras['fisher'].shape} for weights {x.shape}")
        share = by_task(1.0 if weights is None else weights, x) / (by_task(stats[0], x) if normalize else 1.0)
        weight = share * floored(leaf.extras["fisher"])
        ones = [1.0] * x.shape[0]
        total = weighted_sum(ones, weight)
        informed = total > 0
        return jnp.where(informed, weighted_sum(ones, weight * x) / jnp.where(informed, total, 1.0), mean(x))

    return Transform("weigh_by_fisher", apply, (Measure(squares, norms),) if normalize else ())


@functools.cache
def end_interference(
    solver: str = "adam",
    steps: int = 300,
    learning_rate: float = 1e-5,
    norm_power: float = 2.0,
    cutoff: float = 1e-5,
    others: str = "mean",
) -> Transform:
    """Matrices ``x`` (``[out, in]``) of least interference ``sum_t ||(x - tau_t) tau_t^T||_F^2 / ||tau_t||_F^p``.

    Both solvers start at ``x_0 = sum_t tau_t``. With ``G_t = tau_t^T tau_t / ||tau_t||^p``, ``A = sum_t G_t`` and
    ``R = sum_t (tau_t - x_0) G_t`` the gradient at ``x_0 + y`` is ``2 (y A - R)``: a step costs the same for any number
    of tasks, and y carries none of the rounding error of x_0. See `merging.wudi`.

    Args:
      solver: ``adam``, or ``exact``, the minimum nearest to x_0: ``x_0 + R A^+``.
      steps, learning_rate: of Adam.
      norm_power: p.
      cutoff: ``exact`` leaves x_0 as it is along eigenvectors of A whose eigenvalue is at most `cutoff` times the
        largest. The error of float32 there is some 1e-7 / cutoff.
      others: what tensors that are no matrix of a linear layer become: ``mean`` of the tasks, or ``pretrained``.
    """
    check_choice("solver", solver, ("adam", "exact"))
    check_choice("others", others, OTHERS)

    solve = functools.partial(least_interference, solver, steps, learning_rate, norm_power, cutoff)
    solved = jax.custom_batching.sequential_vmap(solve)

    def apply(x: Array, leaf: Leaf, stats: tuple) -> Array:
        if not leaf.satisfies(is_linear):
            return rest(x, others)
        with jax.default_matmul_precision("highest"):
            return by_output(solved, x, leaf)

    return Transform("end_interference", apply, predicates=(is_linear, input_first), by_rows=False)


def least_interference(
    solver: str, steps: int, learning_rate: float, norm_power: float, cutoff: float, x_TxOxI: Array
) -> Array:
    """The merged matrix ``[out, in]`` of `end_interference`."""
    tasks, outs, ins = x_TxOxI.shape
    x_0 = weighted_sum([1.0] * tasks, x_TxOxI)
    size = jnp.sqrt(jnp.square(x_TxOxI.reshape(tasks, -1)).sum(1))
    weight = jnp.where(size > 0, jnp.where(size > 0, size, 1.0) ** (-norm_power / 2), 0.0)
    # Scaled first: squares of small task vectors would leave float32.
    scaled = [weight[t] * x_TxOxI[t] for t in range(tasks)]
    gaps = [x_TxOxI[t] - x_0 for t in range(tasks)]
    if solver == "exact" and tasks * outs < ins:
        # With A = stack^T stack and R = N stack: R A^+ = N (stack stack^T)^+ stack.
        stack_SxI = jnp.concatenate(scaled)
        n_OxS = jnp.concatenate([gap @ each.T for gap, each in zip(gaps, scaled, strict=True)], axis=1)
        return x_0 + _pseudo_solve(n_OxS, stack_SxI @ stack_SxI.T, cutoff) @ stack_SxI
    residual = sum(_through(gap, each) for gap, each in zip(gaps, scaled, strict=True))
    if solver == "adam" and 2 * tasks * outs < ins:
        stack_SxI = jnp.concatenate(scaled)  # two thin products cost less than one with A
        gradient = lambda y: 2 * ((y @ stack_SxI.T) @ stack_SxI - residual)
    else:
        a_IxI = sum(each.T @ each for each in scaled)
        gradient = lambda y: 2 * (y @ a_IxI - residual)
    if solver == "exact":
        return x_0 + _pseudo_solve(residual, a_IxI, cutoff)
    return x_0 + minimise(gradient, jnp.zeros_like(x_0), steps, learning_rate)


def _through(x: Array, u: Array) -> Array:
    """``x u^T u``, in the cheaper order."""
    return (x @ u.T) @ u if 2 * x.shape[0] < x.shape[1] else x @ (u.T @ u)


def _pseudo_solve(right: Array, a: Array, cutoff: float) -> Array:
    """``right a^+`` for a symmetric, positive semi-definite a."""
    values, vectors = jnp.linalg.eigh(a)
    kept = values > cutoff * values[-1]
    inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1.0), 0.0)
    return ((right @ vectors) * inverse) @ vectors.T
