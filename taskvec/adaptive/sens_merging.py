"""Sens-Merging: coefficients by task and layer from sensitivities, without a search. arXiv 2502.12420 (ACL 2025).

    alpha_{t,g} = s_{t,g} / |s_t|_2,      s_{t,g} = E_{x in X_t} sum_{p in g} |theta_p dL/dtheta_p|     at theta_t
    rho_t = d_t / sum_u d_u,              d_t = sum_{u != t} E_{x in X_u} |logits_t(x) - logits_u(x)|_2
    lam[g, .] = T softmax_t(alpha_{t,g} rho_t / temperature),     theta = theta0 + sum_t lam[g(.), t] tau_t

*Second-hand*: the paper's equations were not seen and there is no code of its authors. That there are these two factors
is certain; the norms, the temperature and the factor T are those of a third party's program for two language models.
Its second factor grows where a model's logits *differ* from those of the other tasks' experts, though the paper's
summary speaks of alignment. ``cross_task=None`` leaves that factor out (rho = 1). Do not quote results as the paper's.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from taskvec import tree as trees
from taskvec.adaptive import atlas_parts as parts, objectives
from taskvec.adaptive.coefficients import coefficients
from taskvec.adaptive.fit import Loop
from taskvec.adaptive.learn import Learned, Problem, heads_of
from taskvec.adaptive.registry import adaptive_method
from taskvec.adaptive.rows import Rows
from taskvec.adaptive.teachers import expert, features_of
from taskvec.merging.registry import Card
from taskvec.training import heads as heads_lib
from taskvec.tree import Groups, Tree


def sensitivities(
    problem: Problem, rows: Rows, groups: Groups, shots: int | None = None, loop: Loop = Loop()
) -> np.ndarray:
    """``s`` of the module's docstring: ``[T, G]``, one backward pass per row of the first `shots` of a task."""
    ids = [np.asarray(x) for x in jax.tree.leaves(groups.ids)]

    def loss(floats, others, head, batch):
        logits = heads_lib.all_logits(head, apply(floats, others, batch)["features"][None])
        return objectives.cross_entropy(logits[0], batch["label"])

    def apply(floats, others, batch):
        return problem.apply_fn(trees.unflatten({**floats, **others}), batch)

    @jax.jit
    def one(params: Tree, head, batch):
        flat = trees.flatten(params)
        floats = {path: x for path, x in flat.items() if trees.is_float(x)}
        others = {path: x for path, x in flat.items() if path not in floats}
        grads = jax.grad(loss)(floats, others, head, batch)
        total = jnp.zeros(len(groups.names))
        for own, (path, x) in zip(ids, flat.items(), strict=True):
            if path in floats:
                each = jnp.abs(x.astype(jnp.float32) * grads[path].astype(jnp.float32))
                total = total.at[own].add(each.reshape(*own.shape, -1).sum(-1))
        return total

    found = []
    for t, count in enumerate(rows.counts):
        params, head = expert(problem, t), heads_of(problem.heads, [t])
        plain = rows._replace(targets=None)
        taken = range(count if shots is None else min(shots, count))
        numbers = loop.phase(f"sensitivities of task {t + 1} of {len(rows.counts)}", taken)
        each = [np.asarray(one(params, head, plain.batch([np.array([i])], [t]))) for i in numbers]
        found.append(np.mean(each, axis=0, dtype=np.float64))
    return np.stack(found)


def distances(problem: Problem, rows: Rows, loop: Loop = Loop()) -> np.ndarray:
    """``d`` of the module's docstring: ``[T]``."""
    tasks = range(problem.num_tasks)

    def logits(params: Tree, u: int) -> np.ndarray:
        features = jnp.asarray(features_of(problem, params, rows, u, loop=loop))
        return np.asarray(heads_lib.task_logits(problem.heads, u, features), np.float64)

    own, found = [logits(expert(problem, u), u) for u in tasks], []
    for t in tasks:
        params = expert(problem, t)
        found.append(sum(np.linalg.norm(logits(params, u) - own[u], axis=1).mean() for u in tasks if u != t))
    return np.array(found)


@adaptive_method(
    "sens_merging",
    Card(
        title="Sens-Merging: Sensitivity-Guided Parameter Balancing for Merging Large Language Models",
        arxiv="2502.12420",
        year=2025,
        summary="coefficients by task and layer from gradient times parameter and the experts' logits; second-hand",
        steps=False,
        data="few labelled",
        released_code="none; norms and temperature are those of a third party's program",
    ),
)
def sens_merging(
    problem: Problem,
    rows: Rows,
    *,
    mode: trees.GroupMode = "block",
    cross_task: Literal["distance"] | None = "distance",
    temperature: float = 1.0,
    shots: int | None = 100,
    seed: int = 0,
    loop: Loop = Loop(),
) -> Learned:
    """Takes coefficients from a few calibration rows of every task.

    Args:
      problem: what is merged.
      rows: labelled.
      mode: what a layer is, of `taskvec.tree.groups`.
      cross_task: ``distance``, or ``None`` for 1 in the place of rho.
      temperature: of the softmax over tasks.
      shots: rows of a task, the first ones, that gradients are taken of, as the third party's program does; ``None``
        for all. The second factor sees all rows.
      seed: not used; nothing is drawn.
      loop: of `on_phase`; nothing is iterated.

    Raises:
      ValueError: numbers of tasks do not fit, rows have no labels, or a setting is unknown; a loop with what is not
        heeded.
    """
    problem.check(rows)
    problem.check_not_linear("sens_merging")
    loop.refuse("sens_merging", **dict.fromkeys(("checkpoint", "evaluate", "place", "pieces"), "it takes no steps"))
    parts.check_labels(rows, "sens_merging")
    groups = trees.groups(problem.theta0, mode)
    s_TxG = sensitivities(problem, rows, groups, shots, loop)
    alpha_TxG = s_TxG / np.maximum(np.linalg.norm(s_TxG, axis=1, keepdims=True), 1e-30)
    rho_T = np.ones(problem.num_tasks)
    if cross_task is not None and problem.num_tasks > 1:
        d_T = distances(problem, rows, loop)
        rho_T = d_T / max(d_T.sum(), 1e-30)
    e_TxG = np.exp(alpha_TxG * rho_T[:, None] / temperature)
    lam_GxT = (problem.num_tasks * e_TxG / e_TxG.sum(0)).T.astype(np.float32)
    made = coefficients(groups, problem.num_tasks, lam_GxT, "identity")
    params = jax.jit(made.merge)(problem.theta0, problem.tau, made.init())
    return Learned(params, {"lam": lam_GxT}, {}, coefficients=lam_GxT, groups=groups.names)
