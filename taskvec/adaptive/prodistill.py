"""ProDistill: layer by layer, the merged block imitates every expert's. arXiv 2502.12706 (ICML 2025).

    theta_l = theta0_l + sum_t alpha_{t,l} * tau_{t,l},
    min_alpha  sum_t sum_{x in X_t} |f_{theta_l}(z1_l(x)) - f_{theta_{t,l}}(z2_l(x))|_2^2      block after block

alpha has the shape of the tensors. Each row has two streams of tokens: z1 comes from the blocks merged so far, z2 from
its own expert; both then pass their block l. Outside the blocks weights are merged by task arithmetic.

A block is fitted without the others: there is no backward pass through the model, and beside the rows' tokens only the
task vectors, coefficients and optimiser states of one block are at work.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from taskvec import tree as trees
from taskvec.adaptive import blocks
from taskvec.adaptive.coefficients import coefficients, elementwise
from taskvec.adaptive.fit import Loop, make_fit
from taskvec.adaptive.learn import Learned, Problem
from taskvec.adaptive.parametrisation import Parametrisation, weighted_sum
from taskvec.adaptive.registry import adaptive_method
from taskvec.adaptive.rows import Batch, Rows
from taskvec.merging.registry import Card
from taskvec.transforms.base import check_choice
from taskvec.tree import Tree

Array = jax.Array
MODES = ("element", "tensor", "task")


def parametrised(block: Tree, num_tasks: int, mode: str, init: float) -> Parametrisation:
    """The coefficients of one block, in its per-layer layout."""
    check_choice("mode", mode, MODES)
    if mode == "element":
        return elementwise(block, num_tasks, init)
    return coefficients(trees.groups(block, mode), num_tasks, init, "identity")


def block_loss(
    apply_fn: Callable, path: str, parametrisation: Parametrisation
) -> Callable[..., tuple[Array, dict[str, Array]]]:
    """The loss of `fit`: squared differences summed over rows, tokens and features.

    Frozen are ``theta0`` and ``tau`` of the block, the params outside, the inputs of all rows, ``x`` ``[R, N, D]`` (z1)
    and ``y`` ``[R, N, D]`` (what the experts' blocks give); a batch is the numbers of its rows.
    """

    def loss_fn(learnables: Tree, frozen: Tree, rows: Array, key: Array) -> tuple[Array, dict[str, Array]]:
        inputs, x, y = jax.tree.map(lambda a: a[rows], (frozen["inputs"], frozen["x"], frozen["y"]))
        weights = parametrisation.merge(frozen["theta0"], frozen["tau"], learnables)
        found = blocks.run_block(apply_fn, frozen["outside"], path, weights, inputs, x)
        counted = blocks.token_weights(y, inputs)[..., None]
        return (counted * jnp.square(found - y)).sum(), {}

    return loss_fn


def drawn(rows: Rows, shots: int, seed: int) -> tuple[Batch, list[int]]:
    """`shots` rows of every task (all, where there are fewer), as one batch without labels; and how many of each."""
    rng = np.random.default_rng(seed)
    numbers = [np.sort(rng.permutation(count)[:shots]) for count in rows.counts]
    return rows._replace(labels=None, targets=None).batch(numbers), [len(each) for each in numbers]


class Streams(NamedTuple):
    """Tokens of the rows before a block, task by task, ``[R_t, N, D]`` each.

    Attributes:
      merged: z1, from the blocks merged so far.
      own: z2, from each task's own expert.
      parts: the rows' inputs.
      outside: merged params outside the blocks.
    """

    merged: list[Array]
    own: list[Array]
    parts: list[Batch]
    outside: Tree


def start_streams(problem: Problem, path: str, inputs: Batch, counts: list[int], outside: float) -> Streams:
    """The tokens before the first block."""
    ends = np.cumsum(counts).tolist()
    slices = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
    parts = [jax.tree.map(lambda x, s=s: x[s], inputs) for s in slices]
    rest = [blocks.replaced(tree, path, {}) for tree in (problem.theta0, problem.tau)]
    first = blocks.one_layer(blocks.get(problem.theta0, path), 0)
    begin = lambda coef, part: _start(problem.apply_fn, path, *rest, coef, first, part)
    share, one_hot = np.full(problem.num_tasks, outside, np.float32), np.eye(problem.num_tasks, dtype=np.float32)
    merged = [begin(share, part) for part in parts]
    own = [begin(coef, part)[1] for coef, part in zip(one_hot, parts, strict=True)]
    return Streams([x for _, x in merged], own, parts, merged[0][0])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _start(apply_fn: Callable, path: str, theta0: Tree, tau: Tree, coef: Array, weights: Tree, inputs: Batch):
    """Params outside the blocks, merged by `coef` ``[T]``, and the tokens that they make of some rows."""
    outside = _weighted(theta0, tau, coef)
    return outside, blocks.embedded(apply_fn, outside, path, weights, inputs)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _pushed(apply_fn: Callable, path: str, outside: Tree, weights: Tree, inputs: Batch, x: Array) -> Array:
    return blocks.run_block(apply_fn, outside, path, weights, inputs, x)


@jax.jit
def _weighted(theta0: Tree, tau: Tree, coef: Array) -> Tree:
    leaf = lambda base, tau: weighted_sum(base, tau, coef).astype(base.dtype) if trees.is_float(base) else base
    return jax.tree.map(leaf, theta0, tau)


def epochs_of(num_rows: int, batch_size: int, seed: int, block: int) -> Callable[[int], np.ndarray]:
    """``step -> numbers of rows``: epochs in an order of their own; the rest that fills no batch is left out."""
    per_epoch = num_rows // batch_size

    def numbers(step: int) -> np.ndarray:
        epoch, at = divmod(step, per_epoch)
        order = np.random.default_rng([seed, block, epoch]).permutation(num_rows).astype(np.int32)
        return order[at * batch_size : (at + 1) * batch_size]

    return numbers


@adaptive_method(
    "prodistill",
    Card(
        title="Scalable Model Merging with Progressive Layer-wise Distillation",
        arxiv="2502.12706",
        year=2025,
        summary="coefficients per entry, learned block by block so that the merged block imitates every expert's",
        sees=("tokens",),
        data="unlabelled train",
        released_code=(
            "every expert's block runs on all rows and what is not its own is masked out; an epoch ends with a "
            "smaller batch where rows do not divide; one coefficient per tensor (mode='tensor') or block (mode='task') "
            "are options there too"
        ),
    ),
)
def prodistill(
    problem: Problem,
    rows: Rows,
    *,
    mode: Literal[MODES] = "element",
    init: float = 0.3,
    outside: float = 0.3,
    shots: int = 64,
    epochs: int = 100,
    batch_size: int = 128,
    learning_rate: float = 1e-2,
    seed: int = 0,
    loop: Loop = Loop(),
) -> Learned:
    """Learns coefficients block by block.

    Leaves of ``problem.tau`` may be arrays of the host: one block of them at a time goes to the device.

    Args:
      problem: what is merged; a model of ours, scanned, whose blocks are one stack. Its heads are not used.
      rows: unlabelled, of the tasks' training sets.
      mode: one coefficient per task and ``element``, ``tensor`` or block (``task``, the released code's name).
      init: start of all coefficients.
      outside: coefficient of all task vectors outside the blocks.
      shots: rows of a task, drawn once.
      epochs: over these rows, for every block.
      batch_size: rows of all tasks in a step.
      learning_rate: of Adam.
      seed: of the rows drawn and their order.
      loop: see `fit.Loop`; steps count on from block to block. A checkpoint is taken after every block. Not `evaluate`
        and `pieces`.

    Returns:
      `Learned` with the loss of every step ``[L * steps]``; with ``mode`` tensor or task, coefficients of all tensors
      ``[G, T]``. Coefficients an entry are as large as the task vectors and are not kept.

    Raises:
      ValueError: unknown mode; the model has no blocks or several stacks; rows are packed sentences; a loop with what
        is not heeded.
      FitDiverged: see `fit.fit`.
    """
    if not problem.scanned:
        raise ValueError("prodistill runs single blocks: it needs a model with scanned=True")
    loop.refuse("prodistill", evaluate="it fits block after block", pieces="it sums over the rows of a batch")
    problem.check_not_linear("prodistill")
    path, num_tasks = blocks.stack_of(problem.theta0), problem.num_tasks
    if len(rows.counts) != num_tasks:
        raise ValueError(f"{num_tasks} task vectors but rows of {len(rows.counts)} tasks")
    theta0, tau = (blocks.get(tree, path) for tree in (problem.theta0, problem.tau))
    parametrisation = parametrised(blocks.one_layer(theta0, 0), num_tasks, mode, init)
    inputs, counts = drawn(rows, shots, seed)
    inputs, batch_size = jax.tree.map(jnp.asarray, inputs), min(batch_size, sum(counts))
    steps = epochs * (sum(counts) // batch_size)
    streams = start_streams(problem, path, inputs, counts, outside)
    push = functools.partial(_pushed, problem.apply_fn, path, streams.outside)
    # One compiled step for all blocks: their weights, task vectors and tokens are its arguments.
    fit = make_fit(block_loss(problem.apply_fn, path, parametrisation), optax.adam(learning_rate), chunk=loop.chunk)
    merge, layers, learned, losses = jax.jit(parametrisation.merge), [], [], []
    depth = jax.tree.leaves(theta0)[0].shape[0]
    spread = lambda learnables: {"factors": parametrisation.spread(learnables, None)}
    factors = (lambda learnables: {}) if mode == "element" else spread
    like = jax.eval_shape(lambda: factors(parametrisation.init()))
    if loop.on_start is not None:
        loop.on_start(depth * steps)
    for number in range(depth):
        # On the device once, not again with every chunk of steps.
        block, own = (jax.tree.map(jnp.asarray, blocks.one_layer(tree, number)) for tree in (theta0, tau))
        experts = (_weighted(block, own, coef) for coef in np.eye(num_tasks, dtype=np.float32))
        targets = [push(*each) for each in zip(experts, streams.parts, streams.own, strict=True)]
        frozen = {"theta0": block, "tau": own, "outside": streams.outside, "inputs": inputs}
        frozen |= {"x": jnp.concatenate(streams.merged), "y": jnp.concatenate(targets)}
        order, inside = epochs_of(sum(counts), batch_size, seed, number), loop.after(number * steps)
        # The block is kept, not its coefficients: those of entries are as large as the task vectors.
        kept = loop.part(f"block{number}").checkpoint
        saved = kept and kept.restore({"merged": block, "loss": np.zeros(steps, np.float32)} | like)
        if saved:
            found = saved[1]
        else:
            done = fit(parametrisation.init(), order, steps, frozen=frozen, loop=inside._replace(checkpoint=None))
            loss = done.history.get("loss", np.zeros(0, np.float32))
            found = {"merged": merge(block, own, done.learnables), "loss": loss} | factors(done.learnables)
            if kept is not None:
                kept.save(steps, found)
        followed = [push(found["merged"], *each) for each in zip(streams.parts, streams.merged, strict=True)]
        streams = streams._replace(merged=followed, own=targets)
        layers.append(jax.tree.map(np.asarray, found["merged"]))
        losses.append(np.asarray(found["loss"]))
        learned.append(jax.device_get(found.get("factors")))
    params = blocks.replaced(streams.outside, path, jax.tree.map(lambda *x: jnp.stack(x), *layers))
    table = (None, ()) if mode == "element" else _table(problem, path, learned, outside)
    return Learned(params, {}, {"loss": np.concatenate(losses)}, *table)


def _table(problem: Problem, path: str, learned: list[Tree], outside: float) -> tuple[np.ndarray, tuple[str, ...]]:
    """Coefficients of all tensors ``[G, T]``, and their names, from the factors ``[T]`` of every block's tensors."""
    groups = trees.groups(problem.theta0, "tensor")
    values = np.full((len(groups.names), problem.num_tasks), outside, np.float32)
    for layer, factors in enumerate(learned):
        for name, factor in trees.flatten(factors).items():
            values[groups.names.index(trees.layer_path(f"{path}/{name}", layer))] = factor
    return values, groups.names
