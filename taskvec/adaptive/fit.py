"""The one optimisation loop: jitted steps, scanned in chunks, resumable, and a pure function of its inputs.

A step's batch and random key depend on the step's number alone, so a run that was killed and resumed from a checkpoint
gives the same bits as one that was not.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from taskvec import tree as trees
from taskvec.tree import Tree

Array = jax.Array
LossFn = Callable[[Tree, Any, Any, Array], tuple[Array, dict[str, Array]]]


class Gradient(NamedTuple):
    """A loss that is differentiated in a way of its own: per task, at another point, with a memory.

    Attributes:
      init: ``learnables -> state``, what it remembers from step to step (arrays).
      apply: ``(state, learnables, frozen, batch, key) -> (loss, {name: array}, gradients, state)``.
    """

    init: Callable[[Tree], Tree]
    apply: Callable[..., tuple[Array, dict[str, Array], Tree, Tree]]


def plain_gradient(loss_fn: LossFn) -> Gradient:
    """The gradient of a loss; it remembers nothing."""

    def apply(state, learnables, frozen, batch, key):
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(learnables, frozen, batch, key)
        return loss, metrics, grads, state

    return Gradient(lambda learnables: (), apply)


class FitState(NamedTuple):
    """What changes from step to step, and is donated to it."""

    learnables: Tree
    opt_state: Tree
    memory: Tree  # of the `Gradient`


class FitResult(NamedTuple):
    """What a run ends with.

    Attributes:
      learnables, opt_state: after the last step.
      history: ``{metric: [steps, ...] numpy}``, before each step's update; of the steps done.
      evaluations: ``{steps done: what `Evaluate.call` gave}``.
    """

    learnables: Tree
    opt_state: Tree
    history: dict[str, np.ndarray]
    evaluations: dict[int, Any] | None = None


class Evaluate(NamedTuple):
    """``call(steps done, learnables)`` after every `every` steps and after the last.

    Where ``stop(what call gave)`` is true, the run ends there.
    """

    every: int
    call: Callable[[int, Tree], Any]
    stop: Callable[[Any], bool] | None = None


class Placement(NamedTuple):
    """Where arrays live on several devices: functions of the batches of a chunk ``[n, rows, ...]`` and of the state."""

    batches: Callable[[Any], Any]
    state: Callable[[Any], Any]


class Loop(NamedTuple):
    """How a run is watched and kept; no result depends on it.

    Attributes:
      chunk: most steps in one call of the compiled program, by default `default_chunk`.
      checkpoint: object with ``should_save(step)``, ``save(step, state)`` and ``restore(state) -> (step, state)`` or
        None, such as `taskvec.io.checkpoints.Checkpoint`; for what takes a `part` of a loop also with ``part(name)``,
        another one. One with ``of({what: text})`` is told what a method's run depends on, to refuse another.
      on_start: called with the number of steps, before the first.
      on_chunk: called with (steps done, metrics of the chunk ``{name: [n, ...]}``), one chunk late.
      on_phase: called with (what, done, total) during long work before and between steps: experts that run on all
        rows, gradients of a pool, matrices that are factorised.
      evaluate: see `Evaluate`; what it gives is in `FitResult.evaluations`. A resumed run evaluates where it resumes,
        where that is due, and what is left.
      place: on several devices, see `taskvec.adaptive.mesh`.
      pieces: a step takes its batch in that many pieces, each with a part of every task's rows, one after the other,
        and averages their gradients: the memory of activations is divided, the merge repeated. Equal to one piece but
        for rounding where objectives are means over rows (`learn.learn`).
    """

    chunk: int | None = None
    checkpoint: Any = None
    on_start: Callable[[int], None] | None = None
    on_chunk: Callable[[int, dict[str, np.ndarray]], None] | None = None
    evaluate: Evaluate | None = None
    place: Placement | None = None
    pieces: int = 1
    on_phase: Callable[[str, int, int], None] | None = None

    def phase(self, what: str, items: Iterable, total: int | None = None) -> Iterator:
        """The items, one after the other; `on_phase` is called when the work on one ends. `total` if they have none."""
        total = len(items) if total is None else total
        for done, item in enumerate(items, 1):
            yield item
            if self.on_phase is not None:
                self.on_phase(what, done, total)

    def refuse(self, name: str, **why: str) -> None:
        """Raises `ValueError` if a field is set that method `name` cannot heed: the fields, and why it cannot."""
        for field, reason in why.items():
            if getattr(self, field) != Loop._field_defaults[field]:
                raise ValueError(f"{name} takes no Loop({field}=...): {reason}. Leave it out")

    def part(self, name: str) -> "Loop":
        """The loop of one of several fits, or of what else is kept, with checkpoints of its own.

        A method of several fits runs all of them again when it resumes; those that had ended give what they gave.
        """
        return self if self.checkpoint is None else self._replace(checkpoint=self.checkpoint.part(name))

    def after(self, before: int) -> "Loop":
        """The loop of one of several fits, its steps counted on from those `before`; `on_start` was called for all."""
        tell = self.on_chunk and (lambda step, metrics: self.on_chunk(before + step, metrics))
        return self._replace(on_start=None, on_chunk=tell)


class FitDiverged(FloatingPointError):
    """A loss, metric or gradient became NaN or infinite.

    Attributes:
      step: the first step (from 0) at which it happened.
      metrics: names of the metrics that were not finite.
      learnables: paths of the learnables whose gradients were not finite.
    """

    def __init__(self, step: int, metrics: list[str], learnables: list[str]):
        self.step, self.metrics, self.learnables = step, metrics, learnables
        found = [f"{kind} {', '.join(names[:4])}" + (f" and {len(names) - 4} more" if len(names) > 4 else "")
                 for kind, names in (("metrics", metrics), ("gradients of", learnables)) if names]  # fmt: skip
        hint = (
            "the first step already: look for NaN in weights, inputs and batches (vectors.check_finite)"
            if step == 0
            else "try a smaller learning rate or step size, or optax.clip_by_global_norm in the optimiser"
        )
        super().__init__(f"not finite at step {step}: {'; '.join(found)}. {hint[0].upper()}{hint[1:]}.")


def default_chunk() -> int:
    """Steps in one call of the compiled program: 4 on CPU, where steps are long and progress is wanted, else 10."""
    return 4 if jax.default_backend() == "cpu" else 10


def make_fit(
    loss_fn: LossFn | Gradient,
    optimiser: optax.GradientTransformation,
    *,
    chunk: int | None = None,
    project: Callable[[Tree], Tree] | None = None,
    accumulate: int = 1,
) -> Callable[..., FitResult]:
    """Returns a runner ``run(learnables, batches, steps, *, frozen=(), seed=0, loop=Loop()) -> FitResult``.

    Its compiled step is shared by all calls with equal shapes: build it once, run it for every task. See `fit`.

    Args:
      loss_fn: ``(learnables, frozen, batch, key) -> (scalar, {name: array})``, or a `Gradient`.
      optimiser: of optax. Its update gets ``num_steps``, int32, the steps it takes in the whole run: schedules that
        depend on it then need no program of their own for every length.
      chunk: most steps in one call of the compiled program, by default `default_chunk`. A chunk ends early where the
        shape of the batches changes; that costs no further compilation, and no result depends on it.
      project: ``learnables -> learnables`` after every step.
      accumulate: n. The optimiser steps once every n batches, along the mean of their gradients; steps, batches and
        metrics count batches, schedules of the optimiser its own steps.
    """
    chunk = chunk or default_chunk()
    optimiser = optax.with_extra_args_support(optimiser)
    optimiser = optax.MultiSteps(optimiser, accumulate) if accumulate > 1 else optimiser
    gradient = loss_fn if isinstance(loss_fn, Gradient) else plain_gradient(loss_fn)
    step = _step(gradient, optimiser, project)
    advance = jax.jit(_many(step, chunk), donate_argnums=0)

    def run(
        learnables: Tree,
        batches: Callable[[int], Any],
        steps: int,
        *,
        frozen: Any = (),
        seed: int = 0,
        loop: Loop = Loop(),
    ) -> FitResult:
        checkpoint, evaluate, place = loop.checkpoint, loop.evaluate, loop.place
        if loop.on_start is not None:
            loop.on_start(steps)
        # Copies: the caller's arrays must outlive the donation of the state. No other reference is kept to what is as
        # large as the learnables.
        copied = lambda *parts: FitState(*jax.tree.map(jnp.array, parts))
        state = copied(learnables, optimiser.init(learnables), gradient.init(learnables))
        # Host arrays would go to the device again with every chunk.
        frozen = jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, frozen)
        key, start, evaluations, record = jax.random.key(seed), 0, {}, _Record(loop.on_chunk)
        num_steps = np.int32(steps // accumulate)
        if steps > 0:
            record.begin(steps, jax.eval_shape(step, state, frozen, batches(0), key, num_steps)[1][0])
        saved = checkpoint and checkpoint.restore({"state": state, "history": record.history})
        if saved:
            start, state = saved[0], copied(*saved[1]["state"])
            record.history = {name: np.array(x) for name, x in saved[1]["history"].items()}
        state = state if place is None else place.state(state)

        def ended(done: int) -> bool:
            """Evaluates where that is due; whether the run ends there."""
            if evaluate is None or not (done == steps or done % evaluate.every == 0):
                return False
            record.flush()  # first, so that no diverged model is evaluated
            evaluations[done] = evaluate.call(done, state.learnables)
            if stop := evaluate.stop is not None and evaluate.stop(evaluations[done]):
                record.history = {name: x[:done] for name, x in record.history.items()}
            return stop

        # It may have been killed before or after it was evaluated there, and may have ended there.
        steps_left = steps if not (saved and ended(start)) else start
        del saved
        for first, count, stacked in _chunks(batches, start, steps_left, chunk, evaluate.every if evaluate else steps):
            stacked = stacked if place is None else place.batches(stacked)
            state, metrics = advance(state, frozen, stacked, key, num_steps, np.uint32(first), np.int32(count))
            record.add(first, count, metrics)
            done = first + count
            if checkpoint is not None and (done == steps or checkpoint.should_save(done)):
                record.flush()  # first, so that no checkpoint holds a diverged state
                checkpoint.save(done, {"state": state, "history": record.history})
            if ended(done):
                break
        record.flush()
        return FitResult(state.learnables, state.opt_state, record.history, evaluations)

    return run


def _step(
    gradient: Gradient, optimiser: optax.GradientTransformation, project: Callable[[Tree], Tree] | None
) -> Callable[..., tuple[FitState, Any]]:
    """One step: ``(state, frozen, batch, key, num_steps) -> (state, (metrics, which gradients are finite))``."""

    def step(state: FitState, frozen: Any, batch: Any, key: Array, num_steps: Array) -> tuple[FitState, Any]:
        loss, metrics, grads, memory = gradient.apply(state.memory, state.learnables, frozen, batch, key)
        updates, opt_state = optimiser.update(grads, state.opt_state, state.learnables, num_steps=num_steps)
        learnables = optax.apply_updates(state.learnables, updates)
        finite = {path: jnp.isfinite(g).all() for path, g in trees.flatten(grads).items()}
        learnables = project(learnables) if project else learnables
        return FitState(learnables, opt_state, memory), ({"loss": loss} | metrics, finite)

    return step


def _many(step: Callable[..., tuple[FitState, Any]], chunk: int) -> Callable[..., tuple[FitState, Any]]:
    """Up to `chunk` steps as one program: ``(state, frozen, batches [chunk, ...], key, num_steps, first, count)``."""

    def many(
        state: FitState, frozen: Any, batches: Any, key: Array, num_steps: Array, first: Array, count: Array
    ) -> tuple[FitState, Any]:
        def one(i, carry):
            state, recorded = carry
            batch = jax.tree.map(lambda x: x[i], batches)
            state, metrics = step(state, frozen, batch, jax.random.fold_in(key, first + i), num_steps)
            return state, jax.tree.map(lambda all_, x: all_.at[i].set(x), recorded, metrics)

        shapes = jax.eval_shape(step, state, frozen, jax.tree.map(lambda x: x[0], batches), key, num_steps)[1]
        recorded = jax.tree.map(lambda x: jnp.zeros((chunk, *x.shape), x.dtype), shapes)
        # `count` is dynamic: one program a shape of batch, however many steps of a chunk are asked for.
        return jax.lax.fori_loop(0, count, one, (state, recorded))

    return many


class _Record:
    """The history of a run. A chunk's metrics are fetched when the next comes, while the device works on that one."""

    def __init__(self, on_chunk: Callable[[int, dict[str, np.ndarray]], None] | None):
        self.history: dict[str, np.ndarray] = {}
        self._on_chunk, self._pending = on_chunk, None

    def begin(self, steps: int, shapes: dict[str, jax.ShapeDtypeStruct]) -> None:
        """Makes room."""
        self.history = {name: np.zeros((steps, *x.shape), x.dtype) for name, x in shapes.items()}

    def add(self, first: int, count: int, metrics: Any) -> None:
        """Takes a chunk, and writes the one before."""
        self.flush()
        self._pending = first, count, metrics

    def flush(self) -> None:
        """Writes what is pending; raises `FitDiverged` if it is not finite."""
        if self._pending is None:
            return
        (first, count, metrics), self._pending = self._pending, None
        values, finite = jax.tree.map(lambda x: x[:count], jax.device_get(metrics))
        _check_finite(first, values, finite)
        for name, value in values.items():
            self.history[name][first : first + count] = value
        if self._on_chunk is not None:
            self._on_chunk(first + count, values)


def fit(
    loss_fn: LossFn | Gradient,
    learnables: Tree,
    optimiser: optax.GradientTransformation,
    batches: Callable[[int], Any],
    steps: int,
    *,
    frozen: Any = (),
    project: Callable[[Tree], Tree] | None = None,
    accumulate: int = 1,
    seed: int = 0,
    loop: Loop = Loop(),
) -> FitResult:
    """Minimises ``loss_fn(learnables, frozen, batch, key)`` over `learnables`.

    Args:
      loss_fn: gives ``(scalar loss, {name: array})``; everything in the dict is recorded, beside ``loss``. Or a
        `Gradient`.
      learnables: tree of float arrays; left intact.
      optimiser: of optax.
      batches: ``step -> batch`` of host arrays, a pure function of the step.
      steps: number of steps of the whole run, those of a restored checkpoint included.
      frozen: any tree; an argument of the compiled step, never a constant of it.
      project, accumulate: see `make_fit`.
      seed: of the key, which is folded with the step.
      loop: see `Loop`; not `pieces`, which `learn.learn` takes.

    Raises:
      ValueError: a loop with `pieces`.
      FitDiverged: a metric or gradient is NaN or infinite.
    """
    loop.refuse("fit", pieces="`learn.learn` cuts batches")
    run = make_fit(loss_fn, optimiser, chunk=loop.chunk, project=project, accumulate=accumulate)
    return run(learnables, batches, steps, frozen=frozen, seed=seed, loop=loop)


def _chunks(
    batches: Callable[[int], Any], start: int, steps: int, chunk: int, every: int
) -> Iterator[tuple[int, int, Any]]:
    """Yields (first step, number n of steps, their batches stacked and padded to ``[chunk, ...]``).

    A chunk ends at every multiple of `every`, and where the shape of the batches changes.
    """
    signature = lambda batch: str(jax.tree.map(lambda x: (x.shape, x.dtype), batch))
    group, first = [], start
    for step in range(start, steps):
        batch = jax.tree.map(np.asarray, batches(step))
        if group and (len(group) == chunk or step % every == 0 or signature(batch) != signature(group[0])):
            count, stacked = len(group), _stack(group, chunk)
            group, first, before = [], step, first  # the single batches are not held while the chunk runs
            yield before, count, stacked
        group.append(batch)
    if group:
        yield first, len(group), _stack(group, chunk)


def _stack(group: list[Any], size: int) -> Any:
    return jax.tree.map(lambda *x: np.stack(x + (x[-1],) * (size - len(x))), *group)


def _check_finite(first: int, values: dict[str, np.ndarray], finite: dict[str, np.ndarray]) -> None:
    for i in range(len(values["loss"])):
        metrics = [name for name, value in values.items() if not np.isfinite(value[i]).all()]
        learnables = [path for path, ok in finite.items() if not ok[i]]
        if metrics or learnables:
            raise FitDiverged(first + i, metrics, learnables)
