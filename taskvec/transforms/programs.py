"""What is compiled: one leaf, or block of rows, through the stages of a chain.

`measured` gives its part of a measure, `applied` what the whole chain makes of it. Both are compiled once for all
leaves of the same shape; what a tensor must know of itself is measured inside them unless it is given. `programs` says
from shapes which of them a run will call.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from taskvec.transforms.base import Array, Chain, Leaf, ModelInfo, Transform, chain
from taskvec.transforms.reduce import UNROLL
from taskvec.transforms.stored import Stored
from taskvec.transforms.unroll import Tasks, stacked as stack_tasks, unrolled

# What has been measured, `shared` by all tensors or a tensor's `own`: of every stage ``{position: value}``.
Stats = tuple[dict[int, Any], ...]


class Passes:
    """The passes of a chain over a model, and what they have found.

    Attributes:
      stages: of the chain, without the values of its constants: programs are compiled for these.
      shared: those values, and the measures of the whole model that are finished.
    """

    def __init__(self, transform: Transform | Chain, info: ModelInfo):
        given = chain(transform).stages
        self.stages = tuple(stage._replace(constants=(0.0,) * len(stage.constants)) for stage in given)
        self.shared: Stats = tuple(dict(enumerate(stage.constants)) for stage in given)
        self.info = info

    def rounds(self) -> Iterator[tuple[int, int]]:
        """(stage, measure) of the measures that need the whole model, in order."""
        for at, stage in enumerate(self.stages):
            yield from ((at, i) for i, measure in enumerate(stage.measures) if measure.scope == "model")

    def finish_round(self, at: int, round_: int, total: Any, shapes: bool = False) -> None:
        """Finishes a measure of the whole model; it sees the earlier ones of the whole model (others are ``None``).

        With `shapes` all these are shapes and dtypes.
        """
        found = tuple(self.shared[at].get(i) for i in range(self.position(at, round_)))
        finish = lambda total, found: self.stages[at].measures[round_].finish(total, self.info, found)
        done = jax.eval_shape(finish, total, found) if shapes else finish(total, found)
        self.shared[at][self.position(at, round_)] = done

    def position(self, at: int, round_: int) -> int:
        """Of a measure in the statistics of its stage."""
        return len(self.stages[at].constants) + round_


def _on_vectors(fn: Callable[[Leaf], Any], leaf: Leaf) -> Any:
    """``fn`` of a leaf that holds its task vectors, in float32, made from its fine-tuned versions if need be."""
    if isinstance(leaf.tau, tuple):
        base = leaf.theta0.astype(jnp.float32)
        vectors = [theta.astype(jnp.float32) - base for theta in leaf.tau]
    else:
        vectors = [leaf.tau[t] for t in range(leaf.tau.shape[0])]
    of_vectors = lambda tau: fn(dataclasses.replace(leaf, tau=tau))
    return unrolled(of_vectors, vectors) if len(vectors) <= UNROLL else of_vectors(jnp.stack(vectors))


def of_tensor(info: ModelInfo, shape: Sequence[int]) -> ModelInfo:
    """The info that a measure of one tensor is finished with."""
    return info._replace(size=math.prod(shape), unseen=0)


def _found(stage: Transform, upto: int, stats: dict[int, Any], x: Array, leaf: Leaf) -> tuple:
    """The constants of a stage and its first `upto` measures; those of the tensor that are not known are taken now."""
    found = tuple(stats[i] for i in range(len(stage.constants)))
    for measure in stage.measures[:upto]:
        if len(found) in stats:
            found += (stats[len(found)],)
        else:
            total = measure.of_leaf(x, leaf, found)
            found += (measure.finish(total, of_tensor(leaf.info, leaf.theta0.shape), found),)
    return found


def _through(stages: tuple[Transform, ...], stats: Stats, leaf: Leaf) -> Any:
    x = leaf.tau
    for stage, known in zip(stages, stats, strict=False):
        x = stage.apply(x, leaf, _found(stage, len(stage.measures), known, x, leaf))
    return x


def _both(shared: Stats, own: Stats) -> Stats:
    return tuple({**a, **b} for a, b in zip(shared, own, strict=True))


def _probe(leaf: Leaf, check: bool) -> Array:
    """A number that is finite if, and but for overflow only if, all weights of the leaf are."""
    if not check:
        return jnp.zeros(())
    total = sum(leaf.tau[t] for t in range(leaf.tau.shape[0])).reshape(-1)
    return jnp.vdot(total, total)


def _over_layers(fn: Callable, stages: tuple, stacked: bool) -> Callable:
    """``fn(leaf, own)`` for every layer of a stack."""
    if not stacked:
        return fn
    if all(stage.by_rows for stage in stages):
        return jax.vmap(fn)
    # One layer after the other: in jaxlib 0.10 two batched QR factorisations, or triangular solves, that run at once in
    # one program wait for each other for ever on a CPU of two cores.
    return lambda *of_layers: jax.lax.map(lambda of_layer: fn(*of_layer), of_layers)


@functools.partial(jax.jit, static_argnums=(0, 1, 5, 6))
def measured(stages: tuple, round_: int, shared: Stats, own: Stats, leaf: Leaf, stacked: bool, check: bool):
    """One leaf's part of measure `round_` of the last of `stages` (layers of a stack combined), and its probe."""
    measure = stages[-1].measures[round_]

    def one(leaf: Leaf, own: Stats):
        stats = _both(shared, own)

        def of_vectors(leaf: Leaf):
            x = _through(stages[:-1], stats, leaf)
            found = _found(stages[-1], round_, stats[-1], x, leaf)
            return measure.of_leaf(x, leaf, found), _probe(leaf, check)

        return stack_tasks(_on_vectors(of_vectors, leaf))

    parts, probe = _over_layers(one, stages, stacked)(leaf, own)
    if stacked and measure.scope == "model":
        parts = jax.tree.map(lambda a: functools.reduce(measure.combine, [a[i] for i in range(a.shape[0])]), parts)
    return parts, probe.sum()


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6, 7, 8))
def applied(stages: tuple, shared: Stats, own: Stats, leaf: Leaf, stacked: bool, check: bool, add: bool, dtype, task):
    """One leaf through the chain, and its probe.

    Without `add` the result is what the chain gives, an array with a task axis as a tuple of T arrays. With `add` it is
    merged weights in `dtype`, for `task` if the chain is task-conditioned; such a chain without a task gives its
    `Stored` form.
    """

    def one(leaf: Leaf, own: Stats):
        x, probe = _on_vectors(lambda leaf: (_through(stages, _both(shared, own), leaf), _probe(leaf, check)), leaf)
        if not add and not isinstance(x, Stored):
            x = tuple(x) if isinstance(x, Tasks) or x.shape != leaf.theta0.shape else x
        if not add:
            return stack_tasks(x), probe
        x = stack_tasks(x)
        if isinstance(x, Stored) and task is not None:
            x = x.vector(task)
        if not isinstance(x, Stored):
            if x.shape != leaf.theta0.shape:
                raise ValueError(
                    f"the chain ends with one vector per task (shape {x.shape}, weights {leaf.theta0.shape}): add a "
                    "reduction such as sum_tasks(), mean_tasks() or disjoint_mean(), end it with keep_tasks() for one "
                    "model per task, or get the vectors by transform_task_vectors"
                )
            x = (leaf.theta0.astype(jnp.float32) + x).astype(dtype or leaf.theta0.dtype)
        return x, probe

    x, probe = _over_layers(one, stages, stacked)(leaf, own)
    return x, probe.sum()


def programs(
    transform: Transform | Chain, info: ModelInfo, leaf: Leaf, stacked: bool, host: bool, dtype: Any, task: int | None
) -> Iterator[tuple[Callable, tuple]]:
    """(program, arguments) of what `run.run` calls for a leaf in one piece, in order; to lower or trace them.

    Args:
      transform, dtype, task: of the run.
      info: the whole model.
      leaf: shapes and dtypes in place of arrays.
      stacked: whether it is a stack of layers.
      host: whether NumPy takes the measures that it can take.
    """
    passes = Passes(transform, info)
    stages, shared = passes.stages, passes.shared
    own: Stats = tuple({} for _ in stages)
    check = True  # in the first pass
    for at, round_ in passes.rounds():
        upto = at + 1
        arguments = (stages[:upto], round_, shared[:upto], own[:upto], leaf, stacked, check)
        if not (host and stages[at].measures[round_].host):
            yield measured, arguments
        elif at:
            yield applied, (stages[:at], shared[:at], own[:at], leaf, stacked, check, False, None, None)
        part, _ = measured.eval_shape(*arguments)
        passes.finish_round(at, round_, part, shapes=True)
        check = False
    yield applied, (stages, shared, own, leaf, stacked, check, True, dtype, task)
