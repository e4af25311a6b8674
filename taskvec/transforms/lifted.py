"""Transforms of a chain that runs on another view of each tensor: parts of it, or other coordinates."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from taskvec.transforms.base import Array, Chain, Leaf, Measure, ModelInfo, Transform, chain
from taskvec.transforms.stored import Stored

View = tuple[Array, Leaf]  # a part's vectors, and the part as a leaf


class _Lift(NamedTuple):
    """The inner chain and where its statistics lie in the outer transform's: all constants, then all measures."""

    stages: tuple[Transform, ...]
    parts_of: Callable[[Array, Leaf], list[View]]

    def stats_of(self, at: int, stats: tuple, part: int | None) -> tuple:
        """What stage `at` may see of the outer statistics, as far as known; of one part if they are its own."""
        constants = sum(len(stage.constants) for stage in self.stages[:at])
        first = sum(len(stage.constants) for stage in self.stages)
        first += sum(len(stage.measures) for stage in self.stages[:at])
        stage, own = self.stages[at], []
        for measure, value in zip(stage.measures, stats[first : first + len(stage.measures)], strict=False):
            apart = measure.scope != "model" and part is not None and value is not None
            own.append(jax.tree.map(lambda a: a[part], value) if apart else value)
        return stats[constants : constants + len(stage.constants)] + tuple(own)

    def through(self, upto: int, stats: tuple, part: int, view: View) -> Array:
        """One part through the first `upto` stages."""
        x, leaf = view
        for at in range(upto):
            x = self.stages[at].apply(x, leaf, self.stats_of(at, stats, part))
        return x

    def measure(self, at: int, inner: Measure) -> Measure:
        """The inner measure, of all parts of a tensor."""

        def of_leaf(x: Array, leaf: Leaf, stats: tuple):
            found = []
            for part, view in enumerate(self.parts_of(x, leaf)):
                here = self.through(at, stats, part, view)
                found.append(inner.of_leaf(here, view[1], self.stats_of(at, stats, part)))
            if inner.scope == "model":
                return jax.tree.map(lambda *xs: functools.reduce(inner.combine, xs), *found)
            return jax.tree.map(lambda *xs: jnp.stack(xs), *found)

        def finish(total, info: ModelInfo, stats: tuple):
            if inner.scope == "model":
                return inner.finish(total, info, self.stats_of(at, stats, None))
            count = jax.tree.leaves(total)[0].shape[0]
            info = info._replace(size=info.size // count)
            pick = lambda part: jax.tree.map(lambda a: a[part], total)
            done = [inner.finish(pick(part), info, self.stats_of(at, stats, part)) for part in range(count)]
            return jax.tree.map(lambda *xs: jnp.stack(xs), *done)

        return Measure(of_leaf, finish, inner.combine, inner.scope)


def lifted(
    name: str,
    inner: Transform | Chain,
    parts_of: Callable[[Array, Leaf], list[View]],
    join: Callable[[list[Array], Array, Leaf], Array],
    predicates: tuple[Callable, ...] = (),
) -> Transform:
    """Runs a chain on another view of every tensor; what the chain measures, it measures there.

    Args:
      name: for messages.
      inner: a transform or chain.
      parts_of: ``(x, leaf) -> [(part of x, part as a leaf), ...]``, parts of one size.
      join: ``(results of the parts, x, leaf) -> result``.
      predicates: that the two functions ask about.
    """
    lift = _Lift(chain(inner).stages, parts_of)

    def apply(x: Array, leaf: Leaf, stats: tuple) -> Array:
        done = [lift.through(len(lift.stages), stats, i, view) for i, view in enumerate(parts_of(x, leaf))]
        if any(isinstance(result, Stored) for result in done):
            raise ValueError(f"{name} cannot run a task-conditioned chain: end its inner chain with vectors")
        return join(done, x, leaf)

    return Transform(
        name,
        apply,
        tuple(lift.measure(at, measure) for at, stage in enumerate(lift.stages) for measure in stage.measures),
        (*predicates, *(p for stage in lift.stages for p in stage.predicates)),
        by_rows=False,
        constants=tuple(c for stage in lift.stages for c in stage.constants),
    )
