"""Statistics from data that methods ask for as `extras`: Gram matrices of layers' inputs, Fisher information.

Everything works with any pure ``apply_fn(params, batch)``. One call handles one model on its own batches; `stack_tasks`
makes extras of the trees of T models:

    grams = [collect_gram(apply_fn, params, batches) for params, batches in zip(finetuned, batches_of_task)]
    merged = tv.merge("regmean", pretrained, finetuned, extras={"gram": stack_tasks(grams)})
"""

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from taskvec import tree as trees
from taskvec.merging.api import merge
from taskvec.merging.watch import watch_inputs
from taskvec.transforms.base import check_choice
from taskvec.tree import Tree

Array = jax.Array

ESTIMATORS = ("exact", "sampled", "batch")


def stack_tasks(collected: Sequence[Tree]) -> Tree:
    """T trees, one per task, as one with a task axis: ``[T, ...]``, and ``[L, T, ...]`` for stacked layers."""
    flats = [trees.flatten(tree) for tree in collected]
    axis = lambda path: 1 if trees.is_stacked(path) else 0
    return trees.unflatten({path: jnp.stack([flat[path] for flat in flats], axis(path)) for path in flats[0]})


def collect_gram(
    apply_fn: Callable[[Tree, Any], Any],
    params: Tree,
    batches: Iterable[Any],
    *,
    mask_of: Callable[[Any], Array] | None = None,
    include: str | None = None,
) -> Tree:
    """Gram matrices ``E[x^T x]`` of the inputs x of dense layers, one mean over all tokens of all batches.

    The function is traced and watched: whenever an array is multiplied by a weight matrix of `params`, that array is
    the layer's input. See `watch.watch_inputs` for what is recognised. Batches stream; what is kept is one ``[in, in]``
    a matrix, float32. Batches of one shape share a compiled program.

    Args:
      apply_fn: ``(params, batch) -> anything``. Pass the same object for all models, so that it is compiled once.
      params: of one fine-tuned model.
      batches: pytrees of arrays.
      mask_of: ``batch -> bool [B, N]``, false at padding, which is then left out wherever a layer sees all B N tokens.
      include: regular expression searched in the per-layer path, of the matrices wanted; each must be met.

    Returns:
      ``[in, in]`` matrices (``[L, in, in]`` for stacked layers) under the paths of the weight matrices met.

    Raises:
      ValueError: no batch, no matrix met, one of `include` not met, or one used the other way round than its name says.
    """
    add, total = _gram_step(apply_fn, mask_of), None
    for batch in batches:
        total = add(total, params, batch)
    if total is None:
        raise ValueError("collect_gram needs at least one batch")
    named = {n: path for n, (path, _) in trees.tensors(params).items()}
    wanted = {path for n, path in named.items() if include is not None and re.search(include, n)}
    if not total or not wanted <= total.keys():
        raise ValueError(
            f"no product with {sorted(wanted - total.keys()) or 'any weight matrix'} was seen in the function; see "
            "taskvec.merging.watch for what is recognised"
        )
    found = {path: gram / jnp.maximum(rows, 1.0)[..., None, None] for path, (gram, rows) in total.items()}
    return trees.unflatten({path: gram for path, gram in found.items() if include is None or path in wanted})


@functools.lru_cache(maxsize=16)
def _gram_step(apply_fn: Callable, mask_of: Callable | None) -> Callable:
    @functools.partial(jax.jit, donate_argnums=0)
    def add(total: dict | None, params: Tree, batch: Any) -> dict:
        mask = None if mask_of is None else mask_of(batch)
        found = watch_inputs(apply_fn, params, batch, mask)
        return found if total is None else jax.tree.map(jnp.add, total, found)

    return add


def collect_gram_plusplus(
    apply_fn: Callable[[Tree, Any], Any],
    pretrained: Tree | None,
    finetuned: Sequence[Tree],
    batches: Sequence[Callable[[], Iterable[Any]]],
    *,
    mask_of: Callable[[Any], Array] | None = None,
    **settings: Any,
) -> Tree:
    """Gram matrices for RegMean++, of all tasks together: a block's inputs come through merged earlier blocks.

    Block after block: the inputs of every fine-tuned model's block on top of the blocks merged so far (and of averaged
    embeddings), then that block merged. Inside a block activations are the fine-tuned model's own, as in the authors'
    code. Works for any `apply_fn` whose parameters' names number the blocks, and costs one pass over the data and one
    merge for every block. Source: RegMean++, arXiv 2508.03121.

    Args:
      apply_fn, mask_of: as `collect_gram`.
      pretrained, finetuned: as for `merge`.
      batches: one function a task that starts the task's batches anew.
      **settings: of the method ``regmean_plusplus``.

    Returns:
      The extra ``gram``, with its task axis.
    """
    depths = {n: trees.depth(n) for n in trees.tensors(finetuned[0])}
    averaged = merge("weight_average", pretrained, finetuned)
    grams, merged = None, averaged
    for block in sorted({d for d in depths.values() if d is not None}):
        mixed = [_with_block(merged, params, block) for params in finetuned]
        found = [collect_gram(apply_fn, m, b(), mask_of=mask_of) for m, b in zip(mixed, batches, strict=True)]
        here = stack_tasks(found)
        if grams is None:
            # Outside the blocks, and in blocks still to come, unit matrices: their regression is the mean.
            grams = jax.tree.map(lambda g: jnp.broadcast_to(jnp.eye(g.shape[-1]), g.shape), here)
        grams = _with_block(grams, here, block)
        merged = merge("regmean_plusplus", pretrained, finetuned, extras={"gram": grams}, **settings)
    if grams is None:
        raise ValueError("the parameters' names show no blocks (blocks/0, layer.0, h.0, ...)")
    return grams


def _with_block(tree: Tree, other: Tree, block: int) -> Tree:
    """`tree` with the layers of depth `block` taken from `other`."""

    def pick(path: str, mine: Array, theirs: Array) -> Array:
        if not trees.is_stacked(path):
            return theirs if trees.depth(path) == block else mine
        return mine.at[block].set(theirs[block])

    return trees.map_with_path(pick, tree, other)


def collect_fisher(
    log_probs_fn: Callable[[Tree, Any], Array],
    params: Tree,
    batches: Iterable[Any],
    *,
    estimator: str = "exact",
    samples: int = 1,
    seed: int = 0,
    chunk: int = 1,
) -> Tree:
    """Diagonal Fisher information ``E_x E_{y ~ p(y|x)} (d log p(y|x) / d theta)^2``, the mean over all examples.

    Args:
      log_probs_fn: ``(params, batch) -> [B, C]`` log-probabilities of the classes; rows must not depend on each other.
      params: of one fine-tuned model; the gradient is taken for its floating-point leaves.
      batches: pytrees of arrays whose leading axis is B.
      estimator: ``exact`` sums over all C labels (C backward passes an example); ``sampled`` draws labels from the
        model; ``batch`` squares the gradient of ``sum sqrt(p) log p`` over a whole batch and all labels, which is
        what MergeLM and FusionBench compute: with cross terms, and in the number of batches rather than of examples.
      samples: labels drawn for each example.
      seed: of the labels.
      chunk: examples whose gradients are held at once.

    Returns:
      Float32 arrays in the shapes of the floating-point leaves.
    """
    check_choice("estimator", estimator, ESTIMATORS)
    add = _fisher_step(log_probs_fn, estimator, samples, chunk)
    flat = trees.flatten(params)
    floats = {path: x for path, x in flat.items() if trees.is_float(x)}
    rest = {path: x for path, x in flat.items() if path not in floats}
    total, count = {path: jnp.zeros(x.shape, jnp.float32) for path, x in floats.items()}, 0
    for batch in batches:
        total = add(total, floats, rest, batch, jax.random.fold_in(jax.random.key(seed), count))
        count += len(jax.tree.leaves(batch)[0])
    if count == 0:
        raise ValueError("collect_fisher needs at least one batch")
    return trees.unflatten({path: x / count for path, x in total.items()})


@functools.lru_cache(maxsize=16)
def _fisher_step(log_probs_fn: Callable, estimator: str, samples: int, chunk: int) -> Callable:
    """``(total, params, other leaves, batch, key) -> total``; both halves of the params are flat."""

    def squared(tree: dict, weight: Array) -> dict:
        return jax.tree.map(lambda g: weight * jnp.square(g.astype(jnp.float32)), tree)

    def of_example(log_probs: Callable, floats: dict, example: Any, key: Array) -> dict:
        log_p_C, pull = jax.vjp(lambda p: log_probs(p, jax.tree.map(lambda x: x[None], example))[0], floats)
        if estimator == "exact":
            labels, weights = jnp.arange(log_p_C.shape[0]), jnp.exp(log_p_C)
        else:
            labels, weights = jax.random.categorical(key, log_p_C, shape=(samples,)), jnp.full(samples, 1 / samples)

        def one(total: dict, label_and_weight: tuple) -> tuple[dict, None]:
            label, weight = label_and_weight
            (g,) = pull(jax.nn.one_hot(label, log_p_C.shape[0], dtype=log_p_C.dtype))
            return jax.tree.map(jnp.add, total, squared(g, weight)), None

        zeros = {path: jnp.zeros(x.shape, jnp.float32) for path, x in floats.items()}
        return jax.lax.scan(one, zeros, (labels, weights))[0]

    @functools.partial(jax.jit, donate_argnums=0)
    def add(total: dict, floats: dict, rest: dict, batch: Any, key: Array) -> dict:
        log_probs = lambda p, batch: log_probs_fn(trees.unflatten({**rest, **p}), batch)
        if estimator == "batch":

            def expected(p: dict) -> Array:
                log_p = log_probs(p, batch)
                return (jax.lax.stop_gradient(jnp.exp(log_p / 2)) * log_p).sum()

            return jax.tree.map(jnp.add, total, squared(jax.grad(expected)(floats), 1.0))
        keys = jax.random.split(key, len(jax.tree.leaves(batch)[0]))
        each = lambda item: of_example(log_probs, floats, *item)
        if chunk == 1:  # a scan that keeps only the sum
            sums, _ = jax.lax.scan(
                lambda acc, item: (jax.tree.map(jnp.add, acc, each(item)), None), total, (batch, keys)
            )
            return sums
        for start in range(0, keys.shape[0], chunk):
            item = jax.tree.map(lambda x: x[start : start + chunk], (batch, keys))  # noqa: B023
            total = jax.tree.map(lambda acc, x: acc + x.sum(0), total, jax.vmap(each)(item))
        return total

    return add
