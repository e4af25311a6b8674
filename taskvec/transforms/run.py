"""Runs a chain of transforms over the leaves of a model, wherever they come from.

There is one loop, `run`. It makes one pass over the leaves for every measure of the whole model, and one that applies.
A leaf comes as arrays in memory (also under an enclosing `jax.jit`, sharded or not) or is read from files, a large one
in blocks of rows. What is compiled is in `programs.py`; what is measured of each tensor alone is computed inside these
programs or, where the tensor comes in blocks or NumPy counts, before them.
"""

import collections
import concurrent.futures
import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from taskvec import tree as trees
from taskvec.transforms.base import Chain, Leaf, Measure, Transform, chain
from taskvec.transforms.lapack import one_lapack_thread
from taskvec.transforms.order import Difference
from taskvec.transforms.plan import LeafPolicy, Plan, Tensor, make_leaf, make_plan
from taskvec.transforms.programs import Passes, Stats, applied, measured, of_tensor
from taskvec.transforms.stored import Stored, decoded
from taskvec.tree import Tree


class Where(NamedTuple):
    """How the leaves can be worked on.

    Attributes:
      host: the arrays lie in the memory of a CPU, so that NumPy can count in them.
      workers: threads, each with one leaf or block.
      check: whether leaves are searched for NaN and infinity as they come by first.
    """

    host: bool = False
    workers: int = 1
    check: bool = False


def where(arrays: Iterable[Any]) -> Where:
    """Threads and NumPy for arrays on one CPU; neither under a trace, on accelerators or over a mesh."""
    arrays = list(arrays)
    if any(isinstance(x, jax.core.Tracer) for x in arrays):
        return Where()
    devices = {device for x in arrays if isinstance(x, jax.Array) for device in x.devices()}
    host = len(devices) <= 1 and all(d.platform == "cpu" for d in devices) and jax.default_backend() == "cpu"
    return Where(host, min(4, os.cpu_count() or 1) if host else 1, check=True)


class _Run(Passes):
    """One run of a chain: what is compiled, what is measured so far, and where leaves come from."""

    def __init__(self, transform: Transform | Chain, plan: Plan, leaf_of: Callable, rows_of: Callable, where: Where):
        super().__init__(transform, plan.info)
        self.own: dict[str, Stats] = {path: tuple({} for _ in self.stages) for path in plan.tensors}
        self.plan, self.rows_of, self.where = plan, rows_of, where
        self._leaf_of, self._last = leaf_of, threading.local()

    def leaf_of(self, path: str, rows: slice | None) -> Leaf:
        """A leaf or block; kept until this thread asks for another, so that a tensor in one piece is read once."""
        if getattr(self._last, "place", None) != (path, rows):
            self.forget()  # before the next is read
            self._last.leaf = self._leaf_of(path, rows)
            self._last.own = tuple({} for _ in self.stages)
            self._last.place = (path, rows)
        return self._last.leaf

    def forget(self) -> None:
        """Frees what this thread has kept."""
        self._last.place = self._last.leaf = self._last.own = None

    def known(self, path: str, rows: slice | None, upto: int) -> Stats:
        """The tensor's own measures in the first `upto` stages, and those that NumPy takes of this block."""
        self.leaf_of(path, rows)
        of_block = self._last.own[:upto]
        for at, stage in enumerate(self.stages[:upto]):
            for round_, measure in enumerate(stage.measures):
                position = self.position(at, round_)
                if measure.scope == "block" and self.by_host(measure) and position not in of_block[at]:
                    found, _ = self.part_on_host(path, rows, at, round_, False)
                    of_block[at][position] = jax.device_put(found)
        return tuple({**own, **more} for own, more in zip(self.own[path], of_block, strict=False))

    def by_host(self, measure: Measure) -> bool:
        return self.where.host and measure.host is not None

    def prepare(self, path: str, upto: tuple[int, int]) -> None:
        """Takes the tensor's own measures before `upto` that the compiled programs cannot take by themselves."""
        for at, stage in enumerate(self.stages[: upto[0] + 1]):
            own = [measure for measure in stage.measures if measure.scope == "tensor"]
            apart = len(self.rows_of(path)) > 1 or any(self.by_host(m) or (self.where.host and m.apart) for m in own)
            for round_, measure in enumerate(stage.measures):
                known = self.position(at, round_) in self.own[path][at]
                if (at, round_) < upto and measure.scope == "tensor" and apart and not known:
                    part, _ = self.part(path, at, round_, False)
                    self.own[path][at][self.position(at, round_)] = self.finish(path, at, round_, part)

    def finish(self, path: str, at: int, round_: int, part: Any) -> Any:
        tensor, measure = self.plan.tensors[path], self.stages[at].measures[round_]
        info = of_tensor(self.plan.info, tensor.shape)
        if not tensor.stacked:
            return measure.finish(part, info, self.earlier(path, at, round_))
        layers = range(len(tensor.depth))
        of_layer = lambda i: jax.tree.map(lambda a: a[i], part)
        done = [measure.finish(of_layer(i), info, self.earlier(path, at, round_, i)) for i in layers]
        return jax.tree.map(lambda *xs: (np if isinstance(xs[0], np.ndarray) else jnp).stack(xs), *done)

    def earlier(self, path: str, at: int, round_: int, layer: int | None = None) -> tuple:
        own = self.own[path][at]
        if layer is not None:
            own = jax.tree.map(lambda a: a[layer], own)
        return tuple({**self.shared[at], **own}.get(i) for i in range(self.position(at, round_)))

    def part(self, path: str, at: int, round_: int, check: bool) -> tuple[Any, bool]:
        """A tensor's part of a measure, over its blocks, and whether the tensor is finite."""
        measure, total, finite = self.stages[at].measures[round_], None, True
        for rows in self.rows_of(path):
            one, probe = self.part_of_block(path, rows, at, round_, check)
            finite = finite and (not check or bool(np.isfinite(probe)))
            total = one if total is None else jax.tree.map(measure.combine, total, one)
        return total, finite

    def part_of_block(self, path: str, rows: slice | None, at: int, round_: int, check: bool) -> tuple[Any, Any]:
        """The part of one block, whose arrays are free when this returns."""
        take = self.part_on_host if self.by_host(self.stages[at].measures[round_]) else self.part_compiled
        done = take(path, rows, at, round_, check)
        return jax.block_until_ready(done) if self.where.host else done

    def part_compiled(self, path: str, rows: slice | None, at: int, round_: int, check: bool) -> tuple[Any, Any]:
        upto, leaf, stacked = at + 1, self.leaf_of(path, rows), self.plan.tensors[path].stacked
        return measured(
            self.stages[:upto], round_, self.shared[:upto], self.known(path, rows, upto), leaf, stacked, check
        )

    def part_on_host(self, path: str, rows: slice | None, at: int, round_: int, check: bool) -> tuple[Any, Any]:
        measure, stacked = self.stages[at].measures[round_], self.plan.tensors[path].stacked
        leaf = self.leaf_of(path, rows)
        if at == 0 and isinstance(leaf.tau, tuple):
            base = np.asarray(leaf.theta0)
            x = [Difference(np.asarray(theta), base) for theta in leaf.tau]
            probe = sum(_squares(each) for each in (base, *leaf.tau)) if check else 0.0
        else:
            stats = self.shared[:at], self.known(path, rows, at)
            x, probe = applied(self.stages[:at], *stats, leaf, stacked, check, False, None, None)
            x = [np.asarray(x_n) for x_n in x]
        if not stacked:
            return measure.host(x, self.earlier(path, at, round_)), probe
        layers = range(len(leaf.theta0))
        parts = [measure.host([x_n[i] for x_n in x], self.earlier(path, at, round_, i)) for i in layers]
        if measure.scope != "model":
            return jax.tree.map(lambda *xs: np.stack(xs), *parts), probe
        return jax.tree.map(lambda *xs: functools.reduce(measure.combine, xs), *parts), probe


def run(
    transform: Transform | Chain,
    plan: Plan,
    leaf_of: Callable[[str, slice | None], Leaf],
    emit: Callable[[str, slice | None, Any], None],
    *,
    where: Where = Where(),
    rows_of: Callable[[str], Sequence[slice | None]] = lambda path: (None,),
    add: bool = True,
    dtype: Any = None,
    task: int | None = None,
    not_finite: Callable[[str], None] = lambda path: None,
    on_leaf: Callable[[str], None] = lambda path: None,
) -> None:
    """Runs a chain: all measuring passes first, then one pass that applies and emits.

    Args:
      transform: a transform or chain.
      plan: from `make_plan`.
      leaf_of: ``(path, rows) -> Leaf``, called from several threads if there are several workers.
      emit: receives ``(path, rows, result)``, one call at a time.
      where: see `Where`.
      rows_of: how a tensor is cut into blocks of rows; ``None`` is the whole tensor.
      add: whether results are merged weights ``theta_0 + x`` instead of vectors.
      dtype: of merged weights; that of the pretrained ones if ``None``.
      task: which task's weights a task-conditioned chain gives; ``None`` for its stored form.
      not_finite: called when a leaf seems to hold NaN or infinity; should find out and raise.
      on_leaf: called after each leaf of each pass.
    """
    state, lock = _Run(transform, plan, leaf_of, rows_of, where), threading.Lock()
    rounds = list(state.rounds())
    # The largest first, so that threads end together.
    paths = sorted(plan.tensors, key=lambda path: -_size(plan.tensors[path])) if where.workers > 1 else plan.tensors

    def part(path: str, at: int, round_: int, check: bool):
        state.prepare(path, (at, round_))
        total, finite = state.part(path, at, round_, check)
        if not finite:
            not_finite(path)
        return total

    def apply(path: str, check: bool) -> None:
        state.prepare(path, (len(state.stages), 0))
        for rows in rows_of(path):
            apply_to_block(path, rows, check)

    def apply_to_block(path: str, rows: slice | None, check: bool) -> None:
        flags = (plan.tensors[path].stacked, check, add, dtype, task)
        known = state.known(path, rows, len(state.stages))
        x, probe = applied(state.stages, state.shared, known, state.leaf_of(path, rows), *flags)
        del known
        state.forget()
        if check and not bool(np.isfinite(probe)):
            not_finite(path)
        x = jax.block_until_ready(x) if where.host else x
        with lock:
            emit(path, rows, x)

    with _pool(where.workers) as pool, one_lapack_thread() if pool else contextlib.nullcontext():
        for number, (at, round_) in enumerate(rounds):
            total, combine = None, state.stages[at].measures[round_].combine
            of_leaf = functools.partial(part, at=at, round_=round_, check=where.check and number == 0)
            for path, one in _in_order(pool, of_leaf, paths, where.workers):
                total = one if total is None else jax.tree.map(combine, total, one)
                on_leaf(path)
            state.finish_round(at, round_, total)
        of_leaf = functools.partial(apply, check=where.check and not rounds)
        for path, _ in _in_order(pool, of_leaf, paths, where.workers):
            on_leaf(path)


def _squares(x: Any) -> float:
    """Finite if, and but for overflow only if, all entries are."""
    flat = np.asarray(x).reshape(-1)
    return float(np.vdot(flat, flat)) if flat.dtype == np.float32 else float(np.isfinite(flat).all() or np.nan)


def _size(tensor: Tensor) -> int:
    return int(np.prod(tensor.shape)) * tensor.depth.size


def _pool(workers: int) -> Any:
    return concurrent.futures.ThreadPoolExecutor(workers) if workers > 1 else contextlib.nullcontext()


def _in_order(pool: Any, fn: Callable, items: Iterable[str], workers: int) -> Iterator[tuple[str, Any]]:
    """``(item, fn(item))`` in order, some items ahead in the threads of a pool if there is one."""
    if pool is None:
        yield from ((item, fn(item)) for item in items)
        return
    ahead: collections.deque = collections.deque()
    try:
        for item in items:
            ahead.append((item, pool.submit(fn, item)))
            if len(ahead) > 2 * workers:
                first, future = ahead.popleft()
                yield first, future.result()
        while ahead:
            first, future = ahead.popleft()
            yield first, future.result()
    finally:
        for _, future in ahead:
            future.cancel()


def transform_task_vectors(
    transform: Transform | Chain,
    theta0: Tree,
    tau: Tree,
    *,
    policy: LeafPolicy = LeafPolicy(),
    extras: Mapping[str, Tree] | None = None,
) -> Tree:
    """Runs a chain on task vectors in memory; pure, may be jitted and sharded.

    Args:
      transform: a transform or chain.
      theta0: pretrained parameters.
      tau: `vectors.task_vectors`: leaves ``[T, ...]``, stacked leaves ``[L, T, ...]``.
      policy: which leaves take part; the others are zero in the result.
      extras: further trees in the structure of `theta0` that the method asks for, by name: leaves ``[T, ...]``
        (``[L, T, ...]`` where stacked), only where there is something.

    Returns:
      The transformed vectors: with the task axis if the chain keeps it, without if it reduces it. A task-conditioned
      chain gives its vectors decoded, one per task.
    """
    flat0, flat_tau = trees.flatten(theta0), trees.flatten(tau)
    flat_extras = {name: trees.flatten(extra) for name, extra in (extras or {}).items()}
    first = next(path for path in flat0 if trees.is_float(flat0[path]))
    num_tasks = flat_tau[first].shape[1 if trees.is_stacked(first) else 0]
    plan = make_plan(chain(transform), flat0, num_tasks, policy)

    def leaf_of(path: str, rows: slice | None) -> Leaf:
        extra = {name: flat[path] for name, flat in flat_extras.items() if path in flat}
        return make_leaf(plan.tensors[path], plan.info, flat0[path], flat_tau[path], extra)

    out: dict[str, Any] = {}

    def keep(path: str, rows: slice | None, x: Any) -> None:
        stacked = plan.tensors[path].stacked
        if isinstance(x, Stored):
            x = tuple(decoded(x, task, stacked) for task in range(num_tasks))
        out[path] = jnp.stack(x, 1 if stacked else 0) if isinstance(x, tuple) else x

    place = where([*flat0.values(), *flat_tau.values()])._replace(check=False)
    run(transform, plan, leaf_of, keep, where=place, add=False)
    reduced = all(x.shape == flat0[path].shape for path, x in out.items())
    blank = flat0 if reduced else flat_tau
    return trees.unflatten({path: out.get(path, jnp.zeros_like(blank[path], jnp.float32)) for path in flat0})
