"""Branches of a search over training runs: each trains on tasks drawn at random, and keeps its optimiser."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import optax

from taskvec.adaptive.fit import Loop, make_fit
from taskvec.adaptive.optimisers import sharpness_aware
from taskvec.training.finetune import classify
from taskvec.training.heads import Heads
from taskvec.training.trainable import Trainable, full
from taskvec.tree import Tree

OnChunk = Callable[[int, dict[str, np.ndarray]], None]


class Trainer(NamedTuple):
    """How a branch is trained.

    Attributes:
      init: ``params -> state`` of an optimiser, arrays.
      train: ``(params, state, probabilities of the tasks [T], steps of the branch so far, steps, on_chunk) ->
        (params, state)``; `on_chunk` as in `adaptive.fit.fit`, or None.
    """

    init: Callable[[Tree], Tree]
    train: Callable[[Tree, Tree, np.ndarray, int, int, OnChunk | None], tuple[Tree, Tree]]


class _Pause:
    """A checkpoint in memory, for `fit`: gives a branch its optimiser back, at new weights."""

    def __init__(self, step: int, opt_state: Any):
        self._step, self._opt_state = step, opt_state

    def should_save(self, step: int) -> bool:
        return False

    def save(self, step: int, state: Any) -> None:
        pass

    def restore(self, state: Any) -> tuple[int, Any]:
        return self._step, state | {"state": state["state"]._replace(opt_state=self._opt_state)}


def make_branches(
    apply_fn: Callable[..., dict],
    optimiser: optax.GradientTransformation,
    heads: Heads,
    batches: Sequence[Callable[[int], dict[str, np.ndarray]]],
    *,
    trainable: Trainable | None = None,
    fixed: Tree = (),
    sam_rho: float = 0.0,
    seed: int = 0,
) -> Trainer:
    """A `Trainer` under frozen heads; all branches share a compiled step.

    Args:
      apply_fn: ``(params, batch) -> {"features": [B, d], ...}``.
      optimiser: of optax; its schedule runs over all steps of a branch.
      heads: frozen heads of T tasks.
      batches: T functions ``step -> inputs`` and ``label`` int32 ``[B]``, of one shape (others compile once more).
      trainable: what is trained, all weights by default. Weights that are merged by their learnables alone: not LoRA.
      fixed: of ``trainable.init``, whose learnables the branches then are.
      sam_rho: see `optimisers.sharpness_aware`; 0 for none.
      seed: of the tasks drawn and of the step's keys. The draw depends on the step alone, as in the released code.
    """
    trainable = trainable or full()

    def loss_fn(learnables, frozen, batch, key):
        fixed, heads = frozen
        task, batch = batch["task"], {name: x for name, x in batch.items() if name != "task"}
        head = (heads.kernel[task], heads.class_mask[task], heads.scale)
        return classify(trainable.apply(apply_fn, learnables, fixed, batch), head, batch)

    run = make_fit(sharpness_aware(sam_rho)(loss_fn) if sam_rho else loss_fn, optimiser)
    frozen = fixed, heads._replace(scale=np.float32(heads.scale))

    def train(
        params: Tree, state: Tree, chances: np.ndarray, first: int, steps: int, on_chunk: OnChunk | None = None
    ) -> tuple[Tree, Tree]:
        def batch(step: int) -> dict[str, np.ndarray]:
            task = int(np.random.default_rng([seed, step]).choice(len(batches), p=chances))
            return batches[task](step) | {"task": np.int32(task)}

        loop = Loop(checkpoint=_Pause(first, state), on_chunk=on_chunk)
        done = run(params, batch, first + steps, frozen=frozen, seed=seed, loop=loop)
        return done.learnables, done.opt_state

    return Trainer(optimiser.init, train)
