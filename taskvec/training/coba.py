"""The formulas of CoBa, convergence balancer (arXiv 2410.06741): task weights from histories of validation losses.

With a_i the least-squares slope of task i's validation loss, as a fraction of its first value, over the last N steps,
and a_max that of the largest of these losses at every step:

* relative score ``softmax_i(T a_i / sum_i |a_i|)``: slower tasks get more;
* absolute score ``softmax_i(-N a_i / sum over the last N steps of |a_i|)``: tasks that diverge get less;
* divergence factor ``D = t softmax_s(-tau t a_max(s) / sum_s |a_max(s)|)[t]`` of the t steps since warm-up;
* ``w = T softmax(T (D relative + (1 - D) absolute))``; if one is below the floor, all are drawn towards 1.

They are those of the released code (MFTCoder), except that its window of slopes is shifted by the warm-up.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array

_TINY = 1e-30


def _slope(losses_NxK: Array, count: Array) -> Array:
    """Least-squares slopes ``[K]`` of the last `count` rows; 0 for fewer than two."""
    n = losses_NxK.shape[0]
    mask_N = (jnp.arange(n) >= n - count).astype(losses_NxK.dtype)
    x_N = jnp.arange(n, dtype=losses_NxK.dtype)
    x_N = mask_N * (x_N - (mask_N * x_N).sum() / jnp.maximum(count, 1))
    mean_K = (mask_N[:, None] * losses_NxK).sum(0) / jnp.maximum(count, 1)
    centred_NxK = mask_N[:, None] * (losses_NxK - mean_K[None])
    return (x_N[:, None] * centred_NxK).sum(0) / jnp.maximum(jnp.square(x_N).sum(), 1)


def make(history: int, warmup: int, tau: float, floor: float, horizon: int) -> tuple[Callable, Callable]:
    """``(init, weights)`` as a `balancers.Balancer` has them; see `balancers.coba` for the arguments."""
    if warmup < 1 or history < 2 or not 0 <= floor < 1:
        raise ValueError(f"want warmup >= 1, history >= 2, floor in [0, 1); got {warmup}, {history}, {floor}")
    push = lambda buffer, new: jnp.concatenate([buffer[1:], new[None]])

    def init(num_tasks):
        return {
            "first": jnp.ones(num_tasks),
            "losses": jnp.zeros((history, num_tasks)),
            "slopes": jnp.zeros((history, num_tasks)),
            "largest": jnp.zeros(horizon),
            "step": jnp.zeros((), jnp.int32),
        }

    def weights(gram, state, losses, key):
        num_tasks, step = losses.shape[0], state["step"]
        first_T = jnp.where(step == 0, losses, state["first"])
        recorded = push(state["losses"], losses / jnp.maximum(first_T, _TINY))
        count = jnp.minimum(step + 1, history)
        slope_T = _slope(recorded, count)
        slopes = push(state["slopes"], slope_T)
        largest = push(state["largest"], _slope(recorded.max(1, keepdims=True), count)[0])
        since = jnp.maximum(step + 2 - warmup, 1)  # the number of slopes since warm-up
        near_N = (jnp.arange(history) >= history - since).astype(slopes.dtype)
        near_H = jnp.arange(horizon) >= horizon - since
        seen, known = jnp.minimum(since, history), jnp.minimum(since, horizon)
        share = lambda x, total: x / jnp.maximum(total, _TINY)
        relative_T = jax.nn.softmax(share(num_tasks * slope_T, jnp.abs(slope_T).sum()))
        absolute_T = jax.nn.softmax(share(-seen * slope_T, (near_N[:, None] * jnp.abs(slopes)).sum(0)))
        falling_H = share(-tau * known * largest, jnp.where(near_H, jnp.abs(largest), 0).sum())
        divergence = known * jax.nn.softmax(jnp.where(near_H, falling_H, -jnp.inf))[-1]
        w_T = jax.nn.softmax(num_tasks * (divergence * relative_T + (1 - divergence) * absolute_T))
        low = floor / num_tasks
        w_T = num_tasks * jnp.where((w_T < low).any(), (1 - floor) * w_T + low, w_T)
        w_T = jnp.where(step + 1 >= warmup, w_T, 1.0)
        return w_T, {"first": first_T, "losses": recorded, "slopes": slopes, "largest": largest, "step": step + 1}

    return init, weights
