"""Heads trained on the cached features of a merged model's few labelled rows, added to its own logits.

*Tip-Adapter* (arXiv 2111.03930) remembers the rows as keys A, which are learned, as are alpha and beta:

    logits(z) = s(z) + alpha exp(-(beta - beta A z)) Y

with s(z) the merged model's logits, z of unit length, Y the rows' one-hot labels. *LP++* (arXiv 2404.02285):

    logits(z) = W z + alpha * cos(z),

with one alpha a class on the cosines with the text embeddings, by full-batch gradient descent with step sizes from the
data. Both follow aTLAS (arXiv 2407.02880), whose released code never calls backward here: its heads stay as they start.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from taskvec.adaptive.fit import Loop, make_fit
from taskvec.adaptive.keep import logits_of
from taskvec.adaptive.learn import Problem
from taskvec.adaptive.rows import Rows
from taskvec.adaptive.teachers import features_of
from taskvec.training.heads import normalise
from taskvec.tree import Tree

Array = jax.Array


def cached(problem: Problem, params: Tree, rows: Rows, task: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Unit features and logits of all rows of a task under merged weights: ``[N, d], [N, C]``."""
    features = features_of(problem, params, rows, task)
    return np.asarray(normalise(jnp.asarray(features))), logits_of(problem, features, task)


def classifier(problem: Problem, head: "TipAdapter | LinearProbe", task: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    """``features [N, d] -> logits [N, C]`` of a trained head on a task's merged features, as the model gives them."""

    def logits(features_Nxd: np.ndarray) -> np.ndarray:
        unit_Nxd = normalise(jnp.asarray(features_Nxd))
        return np.asarray(head.logits(unit_Nxd, jnp.asarray(logits_of(problem, features_Nxd, task))))

    return logits


class TipAdapter(NamedTuple):
    """A trained Tip-Adapter.

    Attributes:
      keys: A, ``[N, d]``.
      beta, alpha: scalars.
      values: Y, ``[N, C]``.
    """

    keys: Array
    beta: Array
    alpha: Array
    values: Array

    def logits(self, features_Bxd: Array, logits_BxC: Array) -> Array:
        """Of unit features and the merged model's logits: ``[B, C]``."""
        affinity_BxN = jnp.exp(self.beta * (features_Bxd @ self.keys.T) - self.beta)
        return logits_BxC + self.alpha * (affinity_BxN @ self.values)


def tip_adapter(
    features_Nxd: np.ndarray,
    logits_NxC: np.ndarray,
    labels_N: np.ndarray,
    *,
    beta: float = 1.0,
    alpha: float = 2.0,
    epochs: int = 10,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.1,
    batch_size: int = 128,
    seed: int = 0,
    loop: Loop = Loop(),
) -> tuple[TipAdapter, dict[str, np.ndarray]]:
    """Trains keys, beta and alpha by AdamW, its rate falling to 0 along a cosine; gives the losses as well.

    An earlier state of the authors' code trained beta and alpha 100 times as fast, with Adam's eps 1e-4.

    Args:
      features_Nxd, logits_NxC: of the merged model on the few rows, see `cached`; the keys start as the features.
      labels_N: classes.
      beta, alpha: at the start.
      epochs: of batches in random order; rows that do not fill a batch are left out.
      learning_rate, weight_decay, batch_size: of AdamW.
      seed: of the order.
      loop: see `fit.Loop`.
    """
    z_Nxd, s_NxC = jnp.asarray(features_Nxd), jnp.asarray(logits_NxC)
    values = jax.nn.one_hot(labels_N, s_NxC.shape[1])
    size = min(batch_size, len(labels_N))
    length = len(labels_N) // size

    def batches(step: int) -> np.ndarray:
        epoch, at = divmod(step, length)
        order = np.random.default_rng([seed, epoch]).permutation(len(labels_N))
        return order[at * size : (at + 1) * size].astype(np.int32)

    def loss_fn(learnables, frozen, numbers, key):
        z, s, y = (x[numbers] for x in (frozen["z"], frozen["s"], frozen["y"]))
        losses = optax.softmax_cross_entropy(TipAdapter(**learnables, values=frozen["y"]).logits(z, s), y)
        return losses.mean(), {}

    loop.refuse("tip_adapter", pieces="there is no model in its steps")
    steps = epochs * length
    adamw = optax.adamw(optax.cosine_decay_schedule(learning_rate, max(steps, 1)), weight_decay=weight_decay)
    start = {"keys": z_Nxd, "beta": jnp.float32(beta), "alpha": jnp.float32(alpha)}
    run = make_fit(loss_fn, adamw, chunk=loop.chunk)
    found = run(start, batches, steps, frozen={"z": z_Nxd, "s": s_NxC, "y": values}, loop=loop)
    return TipAdapter(**found.learnables, values=values), found.history


class LinearProbe(NamedTuple):
    """A trained LP++ head.

    Attributes:
      weight: W, ``[C, d]``.
      bias: ``[C]``, zeros in the paper's form.
      alpha: ``[C]``.
      scale: factor on the cosines in the merged model's logits.
    """

    weight: Array
    bias: Array
    alpha: Array
    scale: float

    def logits(self, features_Bxd: Array, logits_BxC: Array) -> Array:
        """Of unit features and the merged model's logits: ``[B, C]``."""
        return features_Bxd @ self.weight.T + self.bias[None] + self.alpha[None] * (logits_BxC / self.scale)


def lp_plus_plus(
    features_Nxd: np.ndarray,
    logits_NxC: np.ndarray,
    labels_N: np.ndarray,
    *,
    scale: float,
    steps: int = 300,
    alpha_every: int = 10,
    momentum: float = 0.0,
    bias: bool = False,
) -> tuple[LinearProbe, np.ndarray]:
    """Trains an LP++ head by gradient descent on all rows; gives the losses ``[steps]`` as well, before each step.

    W starts as the sum of each class's features, all alphas at 250 times the mean, over classes, of the mean cosine of
    its rows with their own class. W descends by ``4 N / lambda_max(F^T F)``, and every `alpha_every` steps alpha by
    ``N / (4 max_c sum_i cos_ic^2)`` (eqs. 10, 11 and 15 of LP++). The released LP++ has momentum 0.9 and a bias that
    starts at random, steps alpha along the *sum* of its gradients so far, and keeps the best step on validation rows.
    The step size does not allow for a bias: with one, the loss may rise. aTLAS's code names 300 epochs of AdamW with
    W's step size as learning rate, but does not train.

    Args:
      features_Nxd, logits_NxC: of the merged model on the few rows, see `cached`.
      labels_N: classes.
      scale: factor on the cosines in the logits (`Heads.scale`).
      steps, alpha_every, momentum: of the descent.
      bias: whether there is one, at 0 to start with, that descends like W.
    """
    z_Nxd, cos_NxC = jnp.asarray(features_Nxd), jnp.asarray(logits_NxC) / scale
    y_NxC = jax.nn.one_hot(labels_N, cos_NxC.shape[1])
    rows_C = y_NxC.sum(0)
    own_C = (y_NxC * cos_NxC).sum(0) / jnp.maximum(rows_C, 1)
    alpha = 250 * own_C.sum() / (rows_C > 0).sum()
    count, gram = len(labels_N), np.asarray(z_Nxd, np.float64)
    rate_w = 4 * count / np.linalg.eigvalsh(gram.T @ gram)[-1]
    rate_alpha = count / (4 * np.square(np.asarray(cos_NxC, np.float64)).sum(0).max())
    start = {"weight": y_NxC.T @ z_Nxd, "bias": jnp.zeros_like(rows_C), "alpha": alpha * jnp.ones_like(rows_C)}

    def loss_fn(learnables, z, cos, y):
        return optax.softmax_cross_entropy(LinearProbe(**learnables, scale=1.0).logits(z, cos), y).mean()

    @jax.jit
    def descend(start, z, cos, y):
        def step(carry, i):
            now, speed = carry
            loss, grads = jax.value_and_grad(loss_fn)(now, z, cos, y)
            speed = {name: momentum * speed[name] + grads[name] for name in speed}
            moved = {name: now[name] - rate_w * speed[name] for name in speed}
            due = (i + 1) % alpha_every == 0
            moved["bias"] = moved["bias"] if bias else now["bias"]
            moved["alpha"] = now["alpha"] - jnp.where(due, rate_alpha, 0.0) * grads["alpha"]
            return (moved, speed), loss

        still = {name: jnp.zeros_like(start[name]) for name in ("weight", "bias")}
        (found, _), losses = jax.lax.scan(step, (start, still), jnp.arange(steps))
        return found, losses

    found, losses = descend(start, z_Nxd, cos_NxC, y_NxC)
    return LinearProbe(**found, scale=scale), np.asarray(losses)
