"""What comes out of a merge says how it is used: static, task-conditioned or input-conditioned."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from taskvec.merging.results import PerTask
from taskvec.tree import Tree

Array = jax.Array

KINDS = ("static", "task-conditioned", "input-conditioned")


class Merged(NamedTuple):
    """A merged model as `taskvec.evaluation.evaluate` takes it.

    Attributes:
      kind: ``static`` (one parameter tree for everything), ``task-conditioned`` (weights, masks or adapters chosen by
        the task's number) or ``input-conditioned`` (chosen by the model from the input).
      params_for: ``task -> params``; a static result gives the same tree object for all tasks.
      features_for: ``(task, features [N, d]) -> [N, d]``, a correction behind the encoder.
      apply_fn: runs what `params_for` gives, where that is no tree of the model's own (weights with adapters);
        ``None`` for the model's.
    """

    kind: str
    params_for: Callable[[int], Tree]
    features_for: Callable[[int, Array], Array] = lambda task, features: features
    apply_fn: Callable | None = None


def static(params: Tree) -> Merged:
    """One model for all tasks."""
    return Merged("static", lambda task: params)


def per_task(params: Sequence[Tree]) -> Merged:
    """One parameter tree per task, such as the fine-tuned experts themselves."""
    return Merged("task-conditioned", lambda task: params[task])


def of_merge(merged: Tree | PerTask) -> Merged:
    """What `taskvec.merge` gives; a task's weights are decoded from their stored form when they are asked for."""
    return Merged("task-conditioned", merged.params) if isinstance(merged, PerTask) else static(merged)


def corrected(merged: Merged, features_for: Callable[[int, Array], Array]) -> Merged:
    """A result whose features are corrected for each task (Surgery), on top of an earlier result."""
    both = lambda task, features: features_for(task, merged.features_for(task, features))
    return merged._replace(kind="task-conditioned", features_for=both)
