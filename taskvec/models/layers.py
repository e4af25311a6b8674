"""What the models share: dense layers, norms, attention, and the one loop over stacked blocks.

Shape suffixes: B batch, N or Q tokens, K keys, D width, H heads, G key-value heads, C width of a head.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from taskvec.tree import Tree

Array = jax.Array

# A hook stands around a piece of a block: `hook(run, weights, x)`, where `run(weights, x)` is what it stands around.
Hook = Callable[[Callable[[Tree, Array], Array], Tree, Array], Array]

REMAT = {
    "dots": jax.checkpoint_policies.dots_saveable,  # keep products of matrices, compute the rest again
    "weights": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep products with weights, not the scores
    "all": jax.checkpoint_policies.nothing_saveable,  # keep the input of every block only
}


class Options(NamedTuple):
    """How a model is run; every ``apply`` takes these as keyword arguments.

    Attributes:
      layer_params: maps one layer's slice of the stacked ``blocks`` to the weights of that layer, so that a caller can
        merge one layer at a time inside the scan. The slice itself if ``None``.
      hooks: ``{piece: hook}`` for the pieces ``block`` (a whole block, residuals and norms included), ``attention``,
        ``mlp`` and, in a decoder with an encoder, ``cross_attention`` (without residual and norm). A hook is called as
        ``hook(run, weights, x)``, with ``run(weights, x)`` the model's own computation and ``weights`` that piece's
        part of what `layer_params` gives; what else it needs (adapters, routers) travels in those weights.
      capture: pieces whose outputs are returned as well, stacked over the layers ``[L, B, N, D]``.
      remat: what the backward pass computes again: nothing (``None``), ``dots`` all but products of matrices,
        ``weights`` attention's scores as well, so that memory grows with the tokens of a row and not with their square,
        ``all`` everything inside a block. With `layer_params`, ``None`` means ``dots``: merged weights are then made
        again instead of kept.
      dtype: of the computation (bfloat16), that of the params if ``None``; norms, softmax and returned features are
        float32 always.
      unroll: layers are written out, this many in one turn of the loop over them. All of them spare the backward pass
        copies of what it keeps: steps on CPU are faster by some percent, and compile as many times longer.
      dropout: rate after embeddings, attention probabilities and both halves of a block, 0 for none.
      key: for `dropout`.
    """

    layer_params: Callable[[Tree], Tree] | None = None
    hooks: Mapping[str, Hook] = {}
    capture: tuple[str, ...] = ()
    remat: str | None = None
    dtype: Any = None
    unroll: int = 1
    dropout: float = 0.0
    key: Array | None = None


class Tap:
    """What a block calls its pieces through; made anew for every layer."""

    def __init__(self, options: Options, key: Array | None):
        self._options, self._key, self._drawn = options, key, 0
        self.captured: dict[str, Array] = {}

    def __call__(self, piece: str, run: Callable[[Tree, Array], Array], weights: Tree, x: Array) -> Array:
        """Runs a piece through its hook, and keeps its output if that is asked for."""
        hook = self._options.hooks.get(piece)
        y = run(weights, x) if hook is None else hook(run, weights, x)
        if piece in self._options.capture:
            self.captured[piece] = y
        return y

    def drop(self, x: Array) -> Array:
        """Dropout, if it is asked for."""
        rate = self._options.dropout
        if not rate:
            return x
        self._drawn += 1
        keep = jax.random.bernoulli(jax.random.fold_in(self._key, self._drawn), 1 - rate, x.shape)
        return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


Block = Callable[[Tree, Array, Tap, Tree], tuple[Array, Tree]]


def options_of(settings: Mapping[str, Any]) -> Options:
    """`Options` from keyword arguments; raises `ValueError` for what cannot be meant."""
    options = Options(**settings)
    if options.remat is not None and options.remat not in REMAT:
        raise ValueError(f"unknown remat {options.remat!r}; allowed: None, {', '.join(map(repr, REMAT))}")
    pieces = ("block", "attention", "cross_attention", "mlp")
    if unknown := sorted({*options.hooks, *options.capture} - {*pieces}):
        raise ValueError(f"unknown piece {unknown[0]!r}; a block has {', '.join(pieces)}")
    if options.dropout and options.key is None:
        raise ValueError("dropout needs a key")
    return options


def run_blocks(
    block: Block, blocks: Tree, x: Array, options: Options, state: Tree = None
) -> tuple[Array, dict[str, Array], Tree]:
    """Runs stacked blocks one after the other, in one `lax.scan`.

    Args:
      block: ``(weights, x, tap, state) -> (x, state)``.
      blocks: tree with a leading layer axis on every leaf.
      x: input of the first block.
      options: see `Options`.
      state: tree with a leading layer axis, of what a block carries from call to call (keys and values); or ``None``.

    Returns:
      the output of the last block; ``{piece: [L, ...]}`` as captured; the new state, stacked as it came.
    """
    layers = jax.tree.leaves(blocks)[0].shape[0]

    def step(x: Array, layer: tuple[Tree, Tree, Array]) -> tuple[Array, tuple[dict, Tree]]:
        weights, old, number = layer
        weights = cast(weights if options.layer_params is None else options.layer_params(weights), options.dtype)
        tap = Tap(options, None if options.key is None else jax.random.fold_in(options.key, number))
        new = None

        def run(weights: Tree, x: Array) -> Array:
            nonlocal new
            y, new = block(weights, x, tap, old)
            return y

        x = tap("block", run, weights, x)
        return x, (tap.captured, new)

    remat = options.remat or ("dots" if options.layer_params is not None else None)
    if remat:
        # Forward and backward of a scan are two loops, between which nothing can be common: no barriers are needed, but
        # where no loop is left.
        step = jax.checkpoint(step, policy=REMAT[remat], prevent_cse=options.unroll > 1)
    x, (captured, state) = lax.scan(step, x, (blocks, state, jnp.arange(layers)), unroll=min(options.unroll, layers))
    return x, captured, state


def cast(tree: Tree, dtype: Any) -> Tree:
    """Floating-point leaves in `dtype`, as they are if that is ``None``."""
    if dtype is None:
        return tree
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def dense(weights: Tree, x: Array) -> Array:
    """``x @ kernel + bias``; the bias may be absent. ``[..., n] -> [..., m]``."""
    # Two matrices: XLA on CPU multiplies them faster than a stack of matrices by one.
    y = x.reshape(-1, x.shape[-1]) @ weights["kernel"]
    if "bias" in weights:
        y = y + weights["bias"]
    return y.reshape(*x.shape[:-1], y.shape[-1])


def layer_norm(weights: Tree, x: Array, epsilon: float) -> Array:
    """Layer normalisation over the last axis, in float32."""
    y = x.astype(jnp.float32)
    y -= y.mean(-1, keepdims=True)
    y *= lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + epsilon)
    return (y * weights["scale"] + weights["bias"]).astype(x.dtype)


def rms_norm(weights: Tree, x: Array, epsilon: float) -> Array:
    """``x / rms(x) * scale`` over the last axis, in float32 (arXiv 1910.07467)."""
    y = x.astype(jnp.float32)
    y *= lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + epsilon)
    return (y * weights["scale"]).astype(x.dtype)


def attend(q_BxQxHxC: Array, k_BxKxGxC: Array, v_BxKxGxC: Array, bias: Array | None, scale: float, tap: Tap) -> Array:
    """Scaled dot-product attention; every key-value head serves H / G query heads.

    Args:
      q_BxQxHxC, k_BxKxGxC, v_BxKxGxC: queries, keys and values.
      bias: float32, added to the logits, broadcast to ``[B, H, Q, K]``; -1e9 where attention is not allowed.
      scale: factor on the logits.
      tap: for dropout on the probabilities.

    Returns:
      ``[B, Q, H * C]``.
    """
    batch, queries, heads, width = q_BxQxHxC.shape
    groups = k_BxKxGxC.shape[2]
    if groups != heads:
        k_BxKxGxC, v_BxKxGxC = (jnp.repeat(x, heads // groups, axis=2) for x in (k_BxKxGxC, v_BxKxGxC))
    logits = jnp.einsum("bqhc,bkhc->bhqk", q_BxQxHxC, k_BxKxGxC).astype(jnp.float32) * scale
    probabilities = tap.drop(jax.nn.softmax(logits if bias is None else logits + bias).astype(v_BxKxGxC.dtype))
    return jnp.einsum("bhqk,bkhc->bqhc", probabilities, v_BxKxGxC).reshape(batch, queries, heads * width)


def self_attention(heads: int, bias: Array | None, tap: Tap) -> Callable[[Tree, Array], Array]:
    """The piece ``attention`` of an encoder: ``(weights, x) -> [B, N, D]``, with query, key, value and output."""

    def run(weights: Tree, x: Array) -> Array:
        q, k, v = (split_heads(dense(weights[name], x), heads) for name in ("query", "key", "value"))
        return dense(weights["output"], attend(q, k, v, bias, q.shape[-1] ** -0.5, tap))

    return run


def mlp(activation: str) -> Callable[[Tree, Array], Array]:
    """The piece ``mlp``: ``down(activation(up(x)))``."""
    return lambda weights, x: dense(weights["down"], ACTIVATIONS[activation](dense(weights["up"], x)))


def split_heads(x: Array, heads: int) -> Array:
    """``[B, N, H * C] -> [B, N, H, C]``."""
    return x.reshape(*x.shape[:-1], heads, -1)


def padding_bias(mask_BxK: Array) -> Array:
    """Bias ``[B, 1, 1, K]`` that forbids attention to padding."""
    return jnp.where(mask_BxK, 0.0, -1e9).astype(jnp.float32)[:, None, None, :]


def packed_bias(sentence_RxN: Array) -> Array:
    """Bias ``[R, 1, N, N]`` that forbids attention to other sentences of a packed row."""
    same_RxNxN = sentence_RxN[:, :, None] == sentence_RxN[:, None, :]
    return jnp.where(same_RxNxN, 0.0, -1e9).astype(jnp.float32)[:, None]


def causal_bias(mask_BxN: Array) -> Array:
    """Bias ``[B, 1, N, N]`` that forbids attention to padding and to later tokens."""
    length = mask_BxN.shape[1]
    seen_NxN = jnp.arange(length)[:, None] >= jnp.arange(length)
    return jnp.where(mask_BxN[:, None, None, :] & seen_NxN[None, None], 0.0, -1e9).astype(jnp.float32)


def with_cache(cache: Tree, new: Tree, slot: Array) -> Tree:
    """A layer's cached keys and values ``[B, K, G, C]`` with those of new tokens written from `slot` on."""
    if cache is None:
        return new
    return jax.tree.map(lambda old, x: lax.dynamic_update_slice_in_dim(old, x, slot, axis=1), cache, new)


def gelu(x: Array) -> Array:
    """The exact GELU; `jax.nn.gelu` goes through erfc, which is dearer than erf on CPU."""
    return 0.5 * x * (1 + lax.erf(x * math.sqrt(0.5)))


def gelu_tanh(x: Array) -> Array:
    """The tanh approximation of GELU (``gelu_new``, ``gelu_pytorch_tanh``)."""
    return jax.nn.gelu(x, approximate=True)


def quick_gelu(x: Array) -> Array:
    """``x sigmoid(1.702 x)``, OpenAI CLIP's."""
    return x * jax.nn.sigmoid(1.702 * x)


# Names of config.json.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
