"""ATM, alternating tuning and merging (arXiv 2411.03055): short fine-tunings and merges in turn.

    theta^(k+1) = merge(theta^(k), theta_1^(k), ..., theta_T^(k)),    theta_t^(k) = theta^(k) fine-tuned on task t

for a few steps. The published merge is the mean, ``theta + (1/T) sum_t tau_t``; any registered method or chain can take
its place. One round of one step of full-batch gradient descent is a step on the mean of the tasks' losses: rounds lead
from task arithmetic (one round) to joint training. At equal total steps, more and shorter rounds are better.

Refinement on validation data is the same: start from a merged model, with batches of the tasks' validation splits.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optax

from taskvec.adaptive.fit import FitResult, make_fit
from taskvec.merging.api import Which, merge
from taskvec.merging.results import PerTask
from taskvec.training.finetune import classify
from taskvec.training.heads import Heads
from taskvec.tree import Tree

# (params, task, steps of this task in earlier rounds, steps) -> params
Train = Callable[[Tree, int, int, int], Tree]


def budget(steps: int, rounds: int) -> list[int]:
    """Steps a task in every round, `steps` in all, as even as can be (longer rounds first)."""
    if not 1 <= rounds <= steps:
        raise ValueError(f"rounds={rounds} of {steps} steps per task: allowed 1 to {steps}")
    return [steps // rounds + (k < steps % rounds) for k in range(rounds)]


def atm(
    train: Train,
    params: Tree,
    num_tasks: int,
    *,
    steps: int,
    rounds: int = 10,
    method: Which = "task_arithmetic",
    settings: Mapping[str, Any] | None = None,
    done: int = 0,
    on_round: Callable[[int, Tree], None] | None = None,
) -> Tree:
    """Runs the rounds; returns the model after the last one.

    Args:
      train: fine-tunes on one task, with a fresh optimiser every time: `make_train`, or any function.
      params: where to start: the pretrained model, or a merged one.
      num_tasks: T.
      steps: a task, over all rounds; see `budget`.
      rounds: K. One round is plain fine-tuning and merging.
      method: a registered name or a chain; must give one model.
      settings: of a named method. For task arithmetic ``scale=1/T`` (the published mean) by default.
      done: rounds that an earlier run did, if `params` is the model after them.
      on_round: called with (rounds done, params).

    Raises:
      ValueError: more rounds than steps, or a method whose result depends on the task.
    """
    lengths = budget(steps, rounds)
    if settings is None:
        settings = {"scale": 1 / num_tasks} if method == "task_arithmetic" else {}
    for k in range(done, rounds):
        finetuned = [train(params, task, sum(lengths[:k]), lengths[k]) for task in range(num_tasks)]
        params = merge(method, params, finetuned, **settings)
        if isinstance(params, PerTask):
            raise ValueError(f"{method} gives a model for each task; rounds need one for all")
        if on_round is not None:
            on_round(k + 1, params)
    return params


def make_train(
    apply_fn: Callable[..., dict],
    optimiser: Callable[[int], optax.GradientTransformation],
    heads: Heads,
    batches: Sequence[Callable[[int], dict[str, np.ndarray]]],
    *,
    seed: int = 0,
    on_fit: Callable[[int, FitResult], None] | None = None,
) -> Train:
    """`atm`'s `train` for frozen heads. A task's batches go on where its earlier round ended.

    Args:
      apply_fn: ``(params, batch) -> {"features": [B, d], ...}``.
      optimiser: ``steps of the round -> optax optimiser``, so that a warm-up can be scaled to the round. Rounds of one
        length share a compiled step.
      heads: frozen heads of T tasks.
      batches: T functions ``step -> inputs`` and ``label`` int32 ``[B]``.
      seed: of the step's keys.
      on_fit: called with (task, result) after each fine-tuning.
    """

    loss_fn = lambda params, head, batch, key: classify(apply_fn(params, batch), head, batch)
    runner = functools.cache(lambda steps: make_fit(loss_fn, optimiser(steps)))

    def train(params: Tree, task: int, first: int, steps: int) -> Tree:
        head = (heads.kernel[task], heads.class_mask[task], np.float32(heads.scale))
        result = runner(steps)(params, lambda step: batches[task](first + step), steps, frozen=head, seed=seed)
        if on_fit is not None:
            on_fit(task, result)
        return result.learnables

    return train
