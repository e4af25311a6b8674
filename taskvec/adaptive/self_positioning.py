"""Self Positioning: weights of embedding models from pairs of texts, arXiv 2410.15035.

    theta = theta0 + s sum_t softmax(w)_t tau_t,    min_{w, s} E -log softmax_j(cos(z_i, y_j) / temperature)[i]

over a small probe set that holds every kind of data in balance. A row is a *pair* of texts (query and passage, two
sentences that mean the same): its inputs hold both, the second under names that start with ``second_``
(`rows.views`). The other pairs of a batch are the negatives.

The abstract says a search "within the interpolation space of task vectors using stochastic gradient descent". How the
paper keeps weights there, its rates, steps and temperature were not seen: softmax, and the defaults, are ours.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from taskvec import tree as trees
from taskvec.adaptive import atlas_parts as parts, objectives
from taskvec.adaptive.coefficients import coefficients
from taskvec.adaptive.fit import Loop
from taskvec.adaptive.learn import Learned, Outputs, Problem, learn
from taskvec.adaptive.parametrisation import Parametrisation
from taskvec.adaptive.registry import adaptive_method
from taskvec.adaptive.rows import Rows, together, views
from taskvec.merging.registry import Card
from taskvec.training.heads import Heads
from taskvec.tree import Tree


def scaled(parametrisation: Parametrisation, scale: float, train: bool = True) -> Parametrisation:
    """All coefficients times one number s, which is learned as well: learnables have a ``scale`` beside ``lam``."""

    def init() -> Tree:
        return parametrisation.init() | ({"scale": jnp.float32(scale)} if train else {})

    def spread(learnables: Tree, key=None) -> Tree:
        s = learnables.get("scale", jnp.float32(scale))
        return jax.tree.map(lambda coef: s * coef, parametrisation.spread({"lam": learnables["lam"]}, key))

    def project(learnables: Tree) -> Tree:
        return learnables | parametrisation.project({"lam": learnables["lam"]})

    def table(learnables: Tree) -> tuple:
        groups, values = parametrisation.table(learnables)
        return groups, learnables.get("scale", scale) * values

    return parametrisation._replace(init=init, spread=spread, project=project, table=table)


def without_heads(problem: Problem, sets: int, rows: Rows) -> Problem:
    """The problem with heads of one class for as many sets of rows: only features matter."""
    batch = rows.batch([np.zeros(1, int)] * sets)
    width = jax.eval_shape(problem.apply_fn, problem.theta0, batch)["features"].shape[-1]
    return problem._replace(heads=Heads(jnp.zeros((sets, width, 1)), jnp.ones((sets, 1), bool), 1.0))


@adaptive_method(
    "self_positioning",
    Card(
        title="Improving General Text Embedding Model: Tackling Task Conflict and Data Imbalance through Model Merging",
        arxiv="2410.15035",
        year=2024,
        summary="one weight per task on the simplex, and a scale, from contrastive learning on pairs of texts",
        sees=("pairs",),
        data="unlabelled train",
        released_code="none; the parametrisation's details and all rates are ours",
    ),
)
def self_positioning(
    problem: Problem,
    rows: Rows,
    *,
    constraint: Literal["softmax", "simplex", "identity"] = "softmax",
    scale: float = 1.0,
    train_scale: bool = True,
    temperature: float = 0.05,
    steps: int = 200,
    learning_rate: float = 0.1,
    per_set: int = 32,
    seed: int = 0,
    loop: Loop = Loop(),
) -> Learned:
    """Learns task-level weights from pairs; the sum over sets of their contrastive losses.

    Args:
      problem: what is merged; its heads are not used.
      rows: pairs (see above) of one or several sets.
      constraint: ``softmax``, ``simplex`` (projected after every step) or ``identity`` (free weights).
      scale: of the sum of task vectors, at the start; weights start at 1 / T.
      train_scale: whether it is learned.
      temperature: of the contrastive loss.
      steps: of plain stochastic gradient descent.
      learning_rate: its step size.
      per_set: pairs of a set in a step.
      seed: of the rows drawn.
      loop: see `fit.Loop`.

    Returns:
      ``coefficients`` ``[1, T]``: the scale included.

    Raises:
      ValueError: rows hold no pairs, or the constraint is unknown.
    """
    parts.check_whole(loop, "self_positioning")
    num_tasks, pairs = problem.num_tasks, views(rows._replace(labels=None, targets=None))
    groups = trees.groups(problem.theta0, "task")
    start = 0.0 if constraint == "softmax" else 1 / num_tasks

    def objective(outputs: Outputs) -> jax.Array:
        return objectives.info_nce(*jnp.split(outputs.features, 2, axis=1), temperature)

    return learn(
        without_heads(problem, len(rows.counts), pairs),
        scaled(coefficients(groups, num_tasks, start, constraint), scale, train_scale),
        objective,
        together(pairs, per_set, seed),
        optax.sgd(learning_rate),
        steps,
        seed=seed,
        loop=loop,
    )
