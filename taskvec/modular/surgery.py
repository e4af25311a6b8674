"""Representation Surgery: a low-rank correction of the merged features, one a task. arXiv 2402.02705 (ICML 2024).

    z' = z - U_t relu(D_t z),    min_{U_t, D_t} E_x |z'(x) - z_t^expert(x)|_1 / d

on unlabelled rows, the merged encoder frozen: features of merged model and expert are computed once and cached, and
training takes seconds. Rows of the test set make it transductive (as published), held-out rows inductive.

*Centred* Surgery (our default) feeds D with ``x = (z - mu_t) / s_t`` and scales the correction back, ``z' = z - s_t U_t
relu(D_t x)``; mu_t is the mean merged feature of the task and s_t the root mean square of ``z - mu_t``. Features that
are non-negative (pooled after a ReLU) share an offset that otherwise moves all pre-activations together: units die in a
few steps of Adam, in the worst case all of them, and the module stays the identity for good. Nor does the correction
depend on the units of the features. ``center=False`` is the paper's form.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from taskvec.adaptive import objectives
from taskvec.adaptive.fit import make_fit

Array = jax.Array


class Adapters(NamedTuple):
    """Corrections of T tasks.

    Attributes:
      down: D, ``[T, r, d]``.
      up: U, ``[T, d, r]``; zeros at the start, so that the correction starts as the identity.
      center: mu, ``[T, d]``; zeros in the paper's form.
      scale: s, ``[T]``, in units of the features; ones in the paper's form.
    """

    down: Array
    up: Array
    center: Array
    scale: Array


def apply(adapters: Adapters, task: int, features: Array) -> Array:
    """Corrected features of one task's rows: ``[N, d] -> [N, d]``."""
    return _correct(jax.tree.map(lambda x: x[task], adapters), jnp.asarray(features))


def _correct(adapter: Adapters, z_Nxd: Array) -> Array:
    hidden_Nxr = jax.nn.relu((z_Nxd - adapter.center[None]) / adapter.scale @ adapter.down.T)
    return z_Nxd - adapter.scale * (hidden_Nxr @ adapter.up.T)


def init_adapters(merged: Sequence[np.ndarray], rank: int, center: bool, seed: int) -> Adapters:
    """Adapters that change nothing yet. D is uniform in ``+-1/sqrt(d)`` (torch's kaiming_uniform with a = sqrt 5)."""
    tasks, d = len(merged), merged[0].shape[1]
    mu_Txd, s_T = np.zeros((tasks, d)), np.ones(tasks)
    if center:
        mu_Txd = np.stack([np.mean(z, 0, dtype=np.float64) for z in merged])
        s_T = np.array([np.sqrt(np.mean(np.square(z - mu))) for z, mu in zip(merged, mu_Txd, strict=True)])
        s_T = np.where(s_T > 0, s_T, 1.0)
    down = jax.random.uniform(jax.random.key(seed), (tasks, rank, d), jnp.float32, -1, 1) / np.float32(np.sqrt(d))
    up = jnp.zeros((tasks, d, rank), jnp.float32)
    return Adapters(down, up, jnp.asarray(mu_Txd, jnp.float32), jnp.asarray(s_T, jnp.float32))


def train(
    merged: Sequence[np.ndarray],
    expert: Sequence[np.ndarray],
    *,
    rank: int = 16,
    center: bool = True,
    steps: int = 1000,
    batch_size: int = 16,
    learning_rate: float = 1e-3,
    seed: int = 0,
    chunk: int = 50,
    on_chunk: Callable | None = None,
) -> Adapters:
    """Trains the corrections of T tasks side by side on cached features.

    The published run takes 500 iterations of two batches of 16 a task, with a step of Adam after every batch: our
    1000 steps, each with one batch of every task. Adam works entry by entry and a task's loss touches its own entries
    alone, so one Adam on the stacked adapters is an independent Adam a task (as the released code behaves with torch
    2; with older torch, moments of the other tasks keep moving their weights).

    Args:
      merged: T arrays ``[N_t, d]``, features of the merged model, not normalised.
      expert: T arrays ``[N_t, d]``, features of each task's own model on the same rows.
      rank: r.
      center: centred form (see the module's docstring); False is the paper's.
      steps: of Adam, each on one batch of every task.
      batch_size: rows a task and step, drawn with replacement.
      learning_rate: of Adam.
      seed: of the rows drawn and of D.
      chunk, on_chunk: see `adaptive.fit.fit`; the metrics are ``loss`` ``[n]`` and ``l1`` ``[n, T]``.

    Raises:
      ValueError: shapes do not pair up.
    """
    shapes = [(z.shape, y.shape) for z, y in zip(merged, expert, strict=True)]
    if any(z != y or len(z) != 2 or z[1] != shapes[0][0][1] or z[0] == 0 for z, y in shapes):
        raise ValueError(f"merged and expert features must be [N_t, d] in pairs, found {shapes}")
    counts = np.array([len(z) for z in merged])
    start = init_adapters(merged, rank, center, seed)

    def pad(rows):
        return np.stack([np.pad(z, ((0, counts.max() - len(z)), (0, 0))) for z in rows]).astype(np.float32)

    def batches(step):
        rng = np.random.default_rng([seed, step])
        return rng.integers(0, counts[:, None], (len(counts), batch_size), dtype=np.int32)

    def loss_fn(learnables, frozen, rows_TxB, key):
        z_TxBxd, y_TxBxd = (jnp.take_along_axis(x, rows_TxB[..., None], axis=1) for x in frozen["features"])
        adapters = Adapters(**learnables, center=frozen["center"], scale=frozen["scale"])
        l1_T = objectives.l1(jax.vmap(_correct)(adapters, z_TxBxd), y_TxBxd)
        return l1_T.sum(), {"l1": l1_T}

    run = make_fit(loss_fn, optax.adam(learning_rate), chunk=chunk)
    frozen = {"features": (pad(merged), pad(expert)), "center": start.center, "scale": start.scale}
    frozen = jax.tree.map(jnp.asarray, frozen)
    done = run({"down": start.down, "up": start.up}, batches, steps, frozen=frozen, on_chunk=on_chunk)
    return start._replace(**done.learnables)
