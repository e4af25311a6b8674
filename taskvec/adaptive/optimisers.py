"""Optimisers and gradients that adaptive methods need beside optax's."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from taskvec.adaptive.fit import Gradient, LossFn
from taskvec.tree import Tree

Array = jax.Array


def by_task(optimiser: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimiser of its own for every entry of the leading axis, which rests while that entry's gradient is zero.

    For learnables ``[T, ...]`` of which a step on one task's rows touches one. One Adam on the whole would go on moving
    the others by their decaying moments.
    """
    each = resting(optimiser)
    return optax.GradientTransformation(jax.vmap(each.init), jax.vmap(each.update))


def resting(optimiser: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimiser that takes no step, and keeps its state, where the whole gradient is zero: no row was of use."""

    def update(grads: Tree, state: Tree, params: Tree = None) -> tuple[Tree, Tree]:
        # NaN is not zero: where a gradient is broken it moves, and the run stops with a diagnosis.
        active = jnp.stack([(g != 0).any() for g in jax.tree.leaves(grads)]).any()
        updates, moved = optimiser.update(grads, state, params)
        updates = jax.tree.map(lambda u: jnp.where(active, u, 0), updates)
        return updates, jax.tree.map(lambda new, old: jnp.where(active, new, old), moved, state)

    return optax.GradientTransformation(optimiser.init, update)


def cosine(learning_rate: float) -> optax.GradientTransformationExtraArgs:
    """Updates times a rate that falls to 0: ``learning_rate (1 + cos(pi i / n)) / 2`` in step i of a run of n.

    As `optax.cosine_decay_schedule`, but n is an argument of the compiled step (`fit.make_fit`), so that runs of
    different lengths share it.
    """

    def init(params: Tree) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(jnp.zeros([], jnp.int32))

    def update(updates: Tree, state: optax.ScaleByScheduleState, params: Tree = None, *, num_steps: Array, **_):
        # In this order bits are those of optax's, where XLA folds the constants.
        angle = jnp.minimum(state.count, num_steps) * (jnp.pi * (1 / jnp.maximum(num_steps, 1)))
        rate = learning_rate * (0.5 * (1 + jnp.cos(angle)))
        state = optax.ScaleByScheduleState(optax.safe_increment(state.count))
        return jax.tree.map(lambda u: rate.astype(u.dtype) * u, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def sharpness_aware(rho: float, adaptive: bool = False) -> Callable[[LossFn], Gradient]:
    """The gradient at the worst point nearby, ``grad L(x + rho g / |g|)`` with ``g = grad L(x)`` (SAM, 2010.01412).

    Both are taken on the same batch with the same key; the loss reported is that at x.

    Args:
      rho: how far that point is.
      adaptive: measure it relative to x, ``x + rho x^2 g / |x g|`` (ASAM, arXiv 2102.11600).
    """

    def gradient(loss_fn: LossFn) -> Gradient:
        value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)

        def apply(state, learnables, frozen, batch, key):
            (loss, metrics), g = value_and_grad(learnables, frozen, batch, key)
            ahead = worst_nearby(learnables, g, rho, adaptive)
            return loss, metrics, value_and_grad(ahead, frozen, batch, key)[1], state

        return Gradient(lambda learnables: (), apply)

    return gradient


def worst_nearby(x: Tree, g: Tree, rho: float, adaptive: bool = False) -> Tree:
    """The point of `sharpness_aware`, from the gradient g at x."""
    size = jax.tree.map(jnp.abs if adaptive else jnp.ones_like, x)
    up = optax.tree.mul(size, g)
    uphill = rho / jnp.maximum(optax.tree.norm(up), 1e-12)
    return jax.tree.map(lambda x, s, d: x + (uphill * s * d).astype(x.dtype), x, size, up)
