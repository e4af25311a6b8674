"""AdaRank: which singular directions of each task vector to keep, learned by entropy. arXiv 2503.22178 (ICLR 2026).

    theta = theta_b + sum_t lam_t sum_i [a_ti > 0] s_ti u_ti v_ti^T

for every matrix of attention and MLP, with ``tau_t = U_t diag(s_t) V_t^T`` and learned logits a and coefficients lam;
other tensors have coefficients alone. theta_b are the pretrained weights, or, as in CART (arXiv 2412.12153), the
average of the experts, from which task vectors are then counted.
"""

import re
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from taskvec import tree as trees
from taskvec.adaptive import objectives
from taskvec.adaptive.coefficients import Constraint, coefficients
from taskvec.adaptive.fit import Loop
from taskvec.adaptive.learn import Learned, Problem, learn
from taskvec.adaptive.masks import rank_masks
from taskvec.adaptive.parametrisation import LowRank
from taskvec.adaptive.registry import adaptive_method
from taskvec.adaptive.rows import Rows, cyclic
from taskvec.merging.registry import Card
from taskvec.transforms.lapack import one_lapack_thread
from taskvec.tree import Tree

Array = jax.Array

BASES = {"pretrained": (0.3, 1.0), "average": (2.3, 0.16)}  # start of the coefficients, ranks kept at the start


def low_rank_bank(theta0: Tree, tau: Tree, matrices: str = "att|mlp", loop: Loop = Loop()) -> Tree:
    """Task vectors whose matrices are factorised, ``tau_t = (U_t diag(s_t)) V_t^T``, largest singular value first.

    The factors multiply to the matrix to rounding, whatever its rank; together they have ``1 + r / n`` times its size,
    twice for a square one.

    Args:
      theta0: pretrained parameters, or their shapes.
      tau: task vectors.
      matrices: regular expression of the paths of the matrices that are factorised.
      loop: of `on_phase`.

    Raises:
      ValueError: there is none.
    """
    factors = _matrices(theta0, tau, matrices)
    with one_lapack_thread():
        # One leaf after the other, each to its end: the memory of one at a time beside the factors.
        for path in loop.phase("task vectors factorised", list(factors)):
            factors[path] = jax.block_until_ready(_factors(factors[path]))
    return _with_factors(tau, factors)


def _matrices(theta0: Tree, tau: Tree, matrices: str) -> dict[str, Array]:
    """The task vectors of the matrices that are factorised, by path."""
    shapes, matrix = trees.flatten(theta0), re.compile(matrices)
    per_layer = lambda path: shapes[path].ndim - int(trees.is_stacked(path))
    chosen = lambda path: trees.is_float(shapes[path]) and per_layer(path) == 2 and matrix.search(path)
    found = {path: vectors for path, vectors in trees.flatten(tau).items() if chosen(path)}
    if not found:
        raise ValueError(f"no matrix has a path that matches {matrices!r}; set `matrices` to a pattern of your model")
    return found


def _with_factors(tau: Tree, factors: dict[str, LowRank]) -> Tree:
    return trees.map_with_path(lambda path, vectors: factors.get(path, vectors), tau)


@jax.jit
def _factors(x: Array) -> LowRank:
    """``[..., m, n] -> [..., m, r], [..., r, n]``, r = min(m, n), one matrix at a time."""
    tall = x.shape[-2] >= x.shape[-1]

    def one(matrix: Array) -> tuple[Array, Array]:
        # Projected on the eigenvectors of the smaller Gram matrix: exact as a product, whatever their accuracy.
        y = matrix if tall else matrix.T
        unit = y / jnp.maximum(jnp.abs(y).max(), jnp.finfo(y.dtype).tiny)
        v = jnp.linalg.eigh(unit.T @ unit)[1][:, ::-1]
        return (y @ v, v.T) if tall else (v, (y @ v).T)

    with jax.default_matmul_precision("highest"):
        flat = x.astype(jnp.promote_types(x.dtype, jnp.float32)).reshape(-1, *x.shape[-2:])
        up, down = jax.lax.map(one, flat)
    return LowRank(*(y.reshape(*x.shape[:-2], *y.shape[1:]).astype(x.dtype) for y in (up, down)))


@jax.jit
def recentred(theta0: Tree, tau: Tree) -> tuple[Tree, Tree]:
    """The average of the experts, and task vectors counted from it; integer leaves are kept."""

    def leaf(path: str, base: Array, vectors: Array) -> tuple[Array, Array]:
        if not trees.is_float(base):
            return base, vectors
        axis = int(trees.is_stacked(path))
        wide = vectors.astype(jnp.promote_types(vectors.dtype, jnp.float32))
        num_tasks = wide.shape[axis]
        mean = sum(jax.lax.index_in_dim(wide, t, axis, keepdims=False) for t in range(num_tasks)) / num_tasks
        return (base + mean).astype(base.dtype), (wide - jnp.expand_dims(mean, axis)).astype(vectors.dtype)

    both = trees.map_with_path(leaf, theta0, tau)
    return tuple(jax.tree.map(lambda _, pair, i=i: pair[i], theta0, both) for i in (0, 1))


@adaptive_method(
    "adarank",
    Card(
        title="AdaRank: Adaptive Rank Pruning for Enhanced Model Merging",
        arxiv="2503.22178",
        year=2026,
        summary="masks over singular directions and coefficients, learned together by the entropy of predictions",
        beside="masks of ranks",
        pieces=True,
        data="unlabelled test",
        released_code=(
            "reports the best of its periodic evaluations on the test set, here the last step; factorises query, key "
            "and value as one matrix; its bf16 branch does not parse"
        ),
    ),
)
def adarank(
    problem: Problem,
    rows: Rows,
    *,
    base: Literal[tuple(BASES)] = "pretrained",
    init: float | np.ndarray | None = None,
    kept: float | None = None,
    mode: trees.GroupMode = "tensor",
    constraint: Constraint = "identity",
    matrices: str = "att|mlp",
    temperature: float = 10.0,
    steps: int = 10000,
    learning_rate: float = 1e-3,
    per_task: int = 16,
    seed: int = 0,
    loop: Loop = Loop(),
) -> Learned:
    """Learns rank masks and coefficients on unlabelled rows.

    Args:
      problem: what is merged.
      rows: unlabelled.
      base: ``pretrained`` (task arithmetic), or ``average`` (CART).
      init: start of all coefficients, by default 0.3 and, for ``average``, 2.3 (published for 8 tasks of ViT-B/32; 3.0
        for ViT-L/14); or ``[G, T]``.
      kept: fraction of the ranks kept at the start, by default 1 and, for ``average``, 0.16.
      mode: groups of the coefficients, see `taskvec.tree.groups`.
      constraint: of the coefficients, see `coefficients.coefficients`.
      matrices: see `low_rank_bank`.
      temperature: see `masks.rank_masks`.
      steps: of Adam (betas 0.9, 0.999).
      learning_rate: of Adam, for masks and coefficients.
      per_task: rows of a task in a step; tasks go through their rows in epochs.
      seed: of the rows drawn.
      loop: see `fit.Loop`.

    Returns:
      `Learned`, whose learnables hold the masks' logits: ranks with positive ones are kept.

    Raises:
      ValueError: unknown base, or ``average`` of a linearised model; numbers of tasks do not fit; no matrix is found.
      FitDiverged: see `fit.fit`.
    """
    problem.check(rows)
    problem.check_dense("adarank")
    if base == "average" and problem.linear:
        raise ValueError("a model linearised at its pretrained weights has no other base; take base='pretrained'")
    init, kept = (default if given is None else given for given, default in zip((init, kept), BASES[base], strict=True))
    theta0, tau = problem.theta0, problem.tau
    if base == "average":
        theta0, tau = recentred(theta0, tau)
    by_group = coefficients(trees.groups(theta0, mode), problem.num_tasks, init, constraint)
    # Of shapes alone, so that what is wrong fails before all task vectors are factorised.
    shapes = {path: jax.eval_shape(_factors, x) for path, x in _matrices(theta0, tau, matrices).items()}
    masks = rank_masks(by_group, _with_factors(tau, shapes), temperature, kept)
    return learn(
        problem._replace(theta0=theta0, tau=low_rank_bank(theta0, tau, matrices, loop)),
        masks,
        lambda outputs: objectives.entropy(outputs.logits),
        cyclic(rows, per_task, seed),
        optax.adam(learning_rate),
        steps,
        seed=seed,
        loop=loop,
    )
