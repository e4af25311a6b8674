"""Which tensors are the matrices of linear layers, and which way round they are stored.

`Transform.predicates` lists those of these functions that a transform asks a leaf about (`Leaf.satisfies`).
"""

import functools
import re
from collections.abc import Callable

import jax.numpy as jnp

from taskvec.transforms.base import Array, Leaf

_TABLE = re.compile(r"embed|wte|wpe|(?:^|[./])shared(?:[./]|$)|relative_attention_bias")
_GPT2 = re.compile(r"(?:^|[./])h[./]\d+[./].*(?:c_attn|c_proj|c_fc|q_attn)[./]weight$")


@functools.cache
def matrix_named(pattern: str) -> Callable:
    """Predicate of a leaf: a matrix (two axes) whose per-layer path the regular expression finds; "" finds all."""
    return lambda path, shape: len(shape) == 2 and bool(re.search(pattern, path))


def is_linear(path: str, shape: tuple[int, ...]) -> bool:
    """Whether a per-layer leaf is the matrix of a linear layer: two axes, and no table of embeddings by its name."""
    return len(shape) == 2 and not _TABLE.search(path)


def input_first(path: str, shape: tuple[int, ...]) -> bool:
    """Whether a matrix is ``[in, out]``, ``y = x W``: leaves named ``kernel``, and GPT-2's, in Hugging Face's names.

    Every other matrix is taken for ``[out, in]``, ``y = x W^T``, as PyTorch's linear layers store their ``weight``.
    """
    del shape
    return re.split(r"[./]", path)[-1] == "kernel" or bool(_GPT2.search(path))


def turned(x: Array, leaf: Leaf) -> Array:
    """Matrices as ``[..., out, in]``, whichever way they are stored, and back; the transform lists `input_first`."""
    return jnp.swapaxes(x, -1, -2) if leaf.satisfies(input_first) else x
