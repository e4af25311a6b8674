"""SuperMerge: bounded coefficients by task and tensor from a few labelled rows. arXiv 2412.10416.

    theta_l = theta0_l + sum_t tanh(w[l, t]) tau_{l,t},    min_w sum_t E CE(h_t(f(x)), y)

*Hierarchical* merging holds fewer task vectors at a time: groups of tasks are merged first, each on its own rows; then
what they gave, whose task vectors are ``merged - theta0``, is merged in turn. The result is linear in the task vectors
still: a task's coefficient is the product of those on its way up. Task vectors that are given as host arrays stay on
the host until their group's turn.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax

from taskvec import tree as trees, vectors
from taskvec.adaptive import atlas_parts as parts
from taskvec.adaptive.coefficients import coefficients
from taskvec.adaptive.fit import Loop
from taskvec.adaptive.learn import Learned, Learner, Problem, heads_of, make_learner
from taskvec.adaptive.registry import adaptive_method
from taskvec.adaptive.rows import Rows, together
from taskvec.merging.registry import Card
from taskvec.tree import Tree


def tasks_of(node: int | Sequence) -> list[int]:
    """All tasks at or under a node of nested groups, in order.

    Raises:
      ValueError: a group holds tasks and groups side by side.
    """
    if not isinstance(node, int) and len({isinstance(child, int) for child in node}) > 1:
        raise ValueError(f"members of a group must be all tasks or all groups, got {node}")
    return [node] if isinstance(node, int) else [task for child in node for task in tasks_of(child)]


@jax.jit
def _stacked(theta0: Tree, models: list[Tree]) -> Tree:
    return vectors.task_vectors(theta0, models)


@adaptive_method(
    "supermerge",
    Card(
        title="SuperMerge: An Approach For Gradient-Based Model Merging",
        arxiv="2412.10416",
        year=2024,
        summary="tanh-bounded coefficients by task and tensor from labelled rows, in groups if memory is short",
        pieces=True,
        data="few labelled",
        released_code="none; init, optimiser, rates and steps of the paper were not seen and are ours",
    ),
)
def supermerge(
    problem: Problem,
    rows: Rows,
    *,
    mode: trees.GroupMode = "tensor",
    groups: Sequence[Any] | None = None,
    init: float = 0.3,
    steps: int = 500,
    learning_rate: float = 1e-3,
    per_task: int = 16,
    seed: int = 0,
    loop: Loop = Loop(),
) -> Learned:
    """Learns bounded coefficients.

    Args:
      problem: what is merged.
      rows: labelled; published, 32 rows in all for 11 tasks of T0-3B.
      mode: ``tensor``, or another of `taskvec.tree.groups`.
      groups: nested groups of task numbers, such as ``((0, 1, 2), (3, 4))``; ``None`` merges all at once. The members
        of a group are either all tasks or all groups.
      init: of w (ours), in every merge: with groups of groups, coefficients start at ``tanh(init)`` to the power of the
        levels.
      steps: of Adam in every merge (ours).
      learning_rate: of Adam (ours).
      per_task: rows of a task in a step (ours).
      seed: of the rows drawn.
      loop: see `fit.Loop`; of every merge in turn.

    Returns:
      ``history`` is that of the last merge; ``learnables`` too.

    Raises:
      ValueError: numbers of tasks do not fit, rows have no labels, or groups do not hold every task once.
    """
    problem.check(rows)
    parts.check_labels(rows, "supermerge")
    everything = list(range(problem.num_tasks))
    nodes = everything if groups is None else groups
    if sorted(tasks_of(nodes)) != everything:
        raise ValueError(f"groups must hold each of the tasks 0..{len(everything) - 1} once, got {groups}")
    tensor_groups = trees.groups(problem.theta0, mode)

    @functools.cache
    def learner(members: int) -> Learner:
        kind, made = problem.kind._replace(num_tasks=members), coefficients(tensor_groups, members, init, "tanh")
        return make_learner(kind, made, parts.cross_entropies, optax.adam(learning_rate), loop=loop)

    def fold(node: Sequence, loop: Loop) -> tuple[Learned, np.ndarray]:
        """Merges a group: what `learn` gave, and coefficients ``[G, T]`` of the task vectors that are under it."""
        tasks = tasks_of(node)
        if isinstance(node[0], int):
            tau = problem.tau if tasks == everything else vectors.take(problem.tau, tasks)
            below_GxTxN = np.tile(np.eye(len(everything))[:, tasks], (len(tensor_groups.names), 1, 1))
        else:
            inner = [fold(child, loop.part(f"group{i}")) for i, child in enumerate(node)]
            tau = _stacked(problem.theta0, [found.params for found, _ in inner])
            below_GxTxN = np.stack([coef for _, coef in inner], axis=-1)
        own = problem._replace(tau=tau, heads=heads_of(problem.heads, tasks))
        batches = together(rows.only(tasks), per_task, seed)
        found = learner(len(node)).run(own, batches, steps, seed=seed, loop=loop)
        return found, np.einsum("gn,gtn->gt", found.coefficients, below_GxTxN)

    found, coef_GxT = fold(nodes, loop)
    return found._replace(coefficients=coef_GxT.astype(np.float32), groups=tensor_groups.names)
