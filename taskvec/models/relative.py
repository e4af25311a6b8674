"""Relative positions by buckets of distances (T5, arXiv 1910.10683, section 2.1)."""

import math

import jax.numpy as jnp
import numpy as np

from taskvec.models.base import Array


def bias(table_UxH: Array, position_Q: Array, keys: int, longest: int, *, both_ways: bool) -> Array:
    """What attention logits get for the distance between query and key.

    Args:
      table_UxH: learned values, a row a bucket.
      position_Q: slots of the queries.
      keys: K; keys stand in slots 0 to K - 1.
      longest: distances from here on share a bucket.
      both_ways: half of the buckets for keys before the query, half for those behind; otherwise all for those before.

    Returns:
      float32 ``[1, H, Q, K]``.
    """
    buckets = table_UxH.shape[0]
    distance_QxK = position_Q[:, None] - jnp.arange(keys)[None]
    if both_ways:
        bucket_of = jnp.asarray(_buckets(buckets // 2, longest))
        bucket_QxK = bucket_of.take(jnp.minimum(jnp.abs(distance_QxK), longest))
        bucket_QxK = jnp.where(distance_QxK < 0, buckets // 2 + bucket_QxK, bucket_QxK)
    else:
        bucket_QxK = jnp.asarray(_buckets(buckets, longest)).take(jnp.clip(distance_QxK, 0, longest))
    return table_UxH.take(bucket_QxK, axis=0).astype(jnp.float32).transpose(2, 0, 1)[None]


def _buckets(count: int, longest: int) -> np.ndarray:
    """The bucket of every distance up to `longest`: half of them hold one each, the rest grow with the logarithm."""
    exact = count // 2
    far = np.arange(exact, longest + 1, dtype=np.float32)
    grown = np.log(far / np.float32(exact)) / np.float32(math.log(longest / exact)) * np.float32(count - exact)
    return np.concatenate([np.arange(exact), np.minimum(exact + grown.astype(np.int32), count - 1)]).astype(np.int32)
