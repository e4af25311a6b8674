"""Frank-Wolfe merging whose steps are TIES merges, as the authors' code does for language models (arXiv 2503.12649).

    theta <- theta + eta trim(s - theta),     theta_first = TIES(theta0; tau_1, ..., tau_T)

trim keeps the largest entries of the whole vector by magnitude. One vector elects its own signs and is its own mean: of
TIES (arXiv 2306.01708) nothing else is left in a step. With DARE (arXiv 2311.03099) before it, every vector is thinned
at random first, anew in every round. The result has no table of coefficients.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from taskvec import transforms, tree as trees, vectors
from taskvec.adaptive.learn import Problem
from taskvec.adaptive.masks import tensor_seeds, uniform
from taskvec.merging import registry
from taskvec.tree import Tree


def thinned(tau: Tree, density: float, key: jax.Array | None) -> Tree:
    """DARE: every entry is kept with probability `density` and divided by it; all, without a key.

    The key is an argument, unlike the seed of `transforms.drop`: all rounds share a program.
    """
    if key is None:
        return tau
    one = lambda x, seeds: jnp.where(uniform(seeds, x.shape) < density, x / density, 0.0)
    leaf = lambda path, x, seeds: (jax.vmap(one) if trees.is_stacked(path) else one)(x, seeds)
    return trees.map_with_path(leaf, tau, tensor_seeds(tau, key))


def first(problem: Problem, scale: float, density: float, key: jax.Array | None = None) -> Tree:
    """``theta0 + scale * TIES(tau)`` by the rules of released code: weights to begin with."""
    ties = registry.get("ties")(density=density, scale=scale, rule="released", zero="majority")
    merge = jax.jit(
        lambda theta0, tau, key: transforms.transform_task_vectors(ties, theta0, thinned(tau, density, key))
    )
    return vectors.apply(problem.theta0, merge(problem.theta0, problem.tau, key))


@functools.partial(jax.jit, static_argnames="density")
def stepped(
    params: Tree,
    pool: Tree,
    start: Tree,
    ids: Tree,
    from_start_G: np.ndarray,
    eta: float,
    density: float,
    key: jax.Array | None = None,
) -> Tree:
    """A step towards a vertex.

    Args:
      params: theta.
      pool: s, but for tensors whose vertex is the start.
      start: weights that it began with.
      ids: of the tensors' groups.
      from_start_G: which groups have the start for a vertex.
      eta: length of the step.
      density: fraction of the entries that are kept, by DARE and by TIES.
      key: of DARE's draw; none leaves it out.
    """

    def leaf(x: jax.Array, own: jax.Array, ids: jax.Array) -> jax.Array:
        here = from_start_G[ids]
        return jnp.where(here.reshape(here.shape + (1,) * (x.ndim - here.ndim)), own, x)

    vertex = jax.tree.map(leaf, pool, start, ids)
    ties = transforms.chain(transforms.trim(density, rule="released"), transforms.sum_tasks())
    move = thinned(vectors.task_vectors(params, [vertex]), density, key)
    moved = transforms.transform_task_vectors(ties, params, move)
    return vectors.apply(params, moved, eta)
