"""AdaMerging: coefficients that make the merged model's predictions certain, arXiv 2310.02575 (ICLR 2024).

    theta_l = theta0_l + sum_t clip(lam[l, t], 0, 1) tau_{l,t},    min_lam sum_t E_{x in X_t} H(softmax(h_t(f(x))))

with H the Shannon entropy, f the encoder with weights theta, h_t the frozen head of task t, X_t unlabelled rows of its
test set (transductive, as published) or of held-out data (inductive).

Where the released code differs (EnnengYang/AdaMerging, commit cea1165): a step sums the entropies of *two* batches of
16 a task, and merges anew for each of them; it learns coefficients for six leftovers of the text tower, whose gradient
is zero. FusionBench takes 1000 steps, one batch, no clamp, and ``log(p + 1e-8)``. The ++ form of the released code
elects the majority sign where signs cancel and keeps one entry more (rule "released" and zero "majority" of `trim`
and `elect_signs`).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from taskvec import transforms, tree as trees, vectors
from taskvec.adaptive import objectives
from taskvec.adaptive.coefficients import Parametrisation, coefficients, effective
from taskvec.adaptive.fit import make_fit
from taskvec.adaptive.merged import merged_apply
from taskvec.training.heads import Heads, all_logits
from taskvec.tree import Tree

Array = jax.Array

CONSTRAINT = "clip"


class AdaMergingResult(NamedTuple):
    """Attributes of a run.

    Attributes:
      coefficients: ``[G, T]`` float32 in [0, 1], those of the last step.
      groups: G names, in order of the rows.
      params: the merged model (a static result).
      history: ``loss`` ``[steps]`` and ``entropy`` ``[steps, T]`` in nats, before each step's update.
    """

    coefficients: np.ndarray
    groups: tuple[str, ...]
    params: Tree
    history: dict[str, np.ndarray]


def keep_agreeing(theta0: Tree, tau: Tree) -> Tree:
    """AdaMerging++'s task vectors: the largest 20 % of each, without the entries against the elected sign."""
    ties = transforms.chain(transforms.trim(density=0.2), transforms.elect_signs())
    return jax.jit(lambda *args: transforms.transform_task_vectors(ties, *args))(theta0, tau)


def adamerging(
    apply_fn: Callable[..., dict[str, Array]],
    theta0: Tree,
    tau: Tree,
    heads: Heads,
    batches: Callable[[int], dict[str, np.ndarray]],
    *,
    scanned: bool,
    mode: str = "tensor",
    plus_plus: bool = False,
    init: float | Array = 0.3,
    steps: int = 500,
    learning_rate: float = 1e-3,
    chunk: int | None = None,
    checkpoint: Any = None,
    on_chunk: Callable | None = None,
) -> AdaMergingResult:
    """Learns merging coefficients on unlabelled rows. Defaults are the published settings.

    The model is merged once a step, and the rows of all tasks pass the encoder as one batch.

    Args:
      apply_fn: ``(params, batch) -> {"features": [T * B, d], ...}``.
      theta0: pretrained parameters.
      tau: task vectors, ``[T, ...]``, stacked leaves ``[L, T, ...]``.
      heads: frozen heads of the T tasks.
      batches: ``step -> inputs`` of ``T * B`` rows in the order of the tasks (published: B = 16).
      scanned: whether `apply_fn` merges layer by layer (see `merged.merged_apply`).
      mode: ``tensor`` (the paper's layer-wise), ``task`` (task-wise), or another of `taskvec.tree.groups`.
      plus_plus: trim task vectors and elect signs first, as TIES (arXiv 2306.01708) before its mean: AdaMerging++.
      init: start of all coefficients, or ``[G, T]``.
      steps: of Adam (betas 0.9, 0.999).
      learning_rate: of Adam.
      chunk, checkpoint, on_chunk: see `fit.fit`.

    Raises:
      ValueError: the numbers of tasks of `tau`, heads and batches do not fit.
      FitDiverged: see `fit.fit`.
    """
    num_tasks = vectors.num_tasks(tau)
    if heads.kernel.shape[0] != num_tasks:
        raise ValueError(f"{num_tasks} task vectors but heads of {heads.kernel.shape[0]} tasks")
    if plus_plus:
        tau = keep_agreeing(theta0, tau)
    shapes = tuple((path, x.shape, str(x.dtype)) for path, x in trees.flatten(theta0).items())
    groups, parametrisation, run = _loop(apply_fn, shapes, num_tasks, mode, scanned, learning_rate, chunk)
    lam = jnp.broadcast_to(jnp.asarray(init, jnp.float32), (len(groups.names), num_tasks))
    frozen = (theta0, tau, heads)
    done = run({"lam": lam}, batches, steps, frozen=frozen, checkpoint=checkpoint, on_chunk=on_chunk)
    params = jax.jit(parametrisation.merge)(theta0, tau, done.learnables)
    return AdaMergingResult(
        np.asarray(effective(done.learnables["lam"], CONSTRAINT)), groups.names, params, done.history
    )


@functools.lru_cache(maxsize=8)
def _loop(
    apply_fn: Callable, shapes: tuple, num_tasks: int, mode: str, scanned: bool, learning_rate: float, chunk: int | None
) -> tuple[trees.Groups, Parametrisation, Callable]:
    """Groups, parametrisation and the compiled loop, the same for all runs of one model: seeds compile once."""
    abstract = trees.unflatten({path: jax.ShapeDtypeStruct(shape, dtype) for path, shape, dtype in shapes})
    groups = trees.groups(abstract, mode)
    parametrisation = coefficients(groups, num_tasks, constraint=CONSTRAINT)
    encode = merged_apply(apply_fn, parametrisation, scanned=scanned)

    def loss_fn(learnables, frozen, batch, key):
        *weights, heads = frozen
        features = encode(learnables, weights, batch)["features"]
        entropy_T = objectives.entropy(all_logits(heads, split_tasks(features, num_tasks)))
        return entropy_T.sum(), {"entropy": entropy_T}

    return groups, parametrisation, make_fit(loss_fn, optax.adam(learning_rate), chunk=chunk)


def split_tasks(rows: Array, num_tasks: int) -> Array:
    """``[T * B, ...] -> [T, B, ...]``; raises `ValueError` if the rows do not divide."""
    if rows.shape[0] % num_tasks:
        raise ValueError(f"a batch of {rows.shape[0]} rows does not divide among {num_tasks} tasks")
    return jnp.reshape(rows, (num_tasks, -1, *rows.shape[1:]))
