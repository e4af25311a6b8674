"""SurgeryV2: a low-rank correction after every block, one per task. arXiv 2410.14389.

    x_l <- x_l - U_{t,l} relu(D_{t,l} x_l)    for every token behind block l,    z <- z - U_t relu(D_t z),
    min  sum_l E_x |m(x_l) - m(x_l^expert)|_1 / D  +  E_x |z - z^expert|_1 / d

with m the mean over tokens, on unlabelled rows. Later blocks see corrected tokens. The merged weights are frozen.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from taskvec.adaptive import blocks, objectives
from taskvec.adaptive.fit import Loop, make_fit
from taskvec.adaptive.learn import Learned, Problem
from taskvec.adaptive.registry import adaptive_method
from taskvec.adaptive.rows import Rows, split_tasks, together
from taskvec.adaptive.teachers import with_targets
from taskvec.merging.registry import Card
from taskvec.modular.results import Merged
from taskvec.modular.surgery import NOT_HEEDED, merged_model
from taskvec.tree import Tree

Array = jax.Array


def init_adapters(num_layers: int, num_tasks: int, width: int, features: int, rank: int, seed: int) -> Tree:
    """Adapters that change nothing yet, for L layers of width D, T tasks, d features and rank r.

    D is uniform in ``+-1/sqrt(width)`` (torch's kaiming_uniform with a = sqrt 5), U is 0.

    Returns:
      ``{"blocks": {"down": [L, T, r, D], "up": [L, T, D, r]}, "features": {"down": [T, r, d], "up": [T, d, r]}}``.
    """

    def pair(key: Array, size: int, *axes: int) -> Tree:
        down = jax.random.uniform(key, (*axes, rank, size), jnp.float32, -1, 1) / np.float32(np.sqrt(size))
        return {"down": down, "up": jnp.zeros((*axes, size, rank), jnp.float32)}

    of_blocks, of_features = jax.random.split(jax.random.key(seed))
    return {"blocks": pair(of_blocks, width, num_layers, num_tasks), "features": pair(of_features, features, num_tasks)}


def correct(adapter: Tree, x: Array) -> Array:
    """``x - U_t relu(D_t x)`` of T tasks: ``[T * B, ..., D] -> [T * B, ..., D]``, rows task after task."""
    one = lambda a, x: x - (jax.nn.relu(x @ a["down"].T) @ a["up"].T).astype(x.dtype)
    return jax.vmap(one)(adapter, split_tasks(x, adapter["down"].shape[0])).reshape(x.shape)


def with_adapters(params: Tree, adapters: Tree) -> Tree:
    """What `run` takes: the model's params, with adapters in the stack of blocks, and those of the features."""
    path = blocks.stack_of(params)
    stack = {"weights": blocks.get(params, path), "adapter": adapters["blocks"]}
    return {"model": blocks.replaced(params, path, stack), "adapter": adapters["features"]}


def run(apply_fn: Callable, params: Tree, batch: Mapping[str, Any], **options: Any) -> dict[str, Array]:
    """Runs a model with the adapters of S tasks on S B rows, task after task; captured blocks are corrected ones."""
    hook = lambda run, given, x: correct(given["adapter"], run(given["weights"], x))
    out = apply_fn(params["model"], batch, hooks={"block": hook}, **options)
    return {**out, "features": correct(params["adapter"], out["features"])}


def taps(apply_fn: Callable, params: Tree, batch: Mapping[str, Any]) -> dict[str, Array]:
    """``blocks`` ``[B, L, D]``, means over tokens behind every block, and ``features`` ``[B, d]``."""
    return _means(apply_fn(params, batch, capture=("block",)), batch)


def _means(out: Mapping[str, Array], batch: Mapping[str, Any]) -> dict[str, Array]:
    x_LxBxNxD = out["block"]
    weight_BxN = blocks.token_weights(x_LxBxNxD[0], batch)
    weight_BxN = weight_BxN / weight_BxN.sum(1, keepdims=True)
    return {"blocks": jnp.einsum("lbnd,bn->bld", x_LxBxNxD, weight_BxN), "features": out["features"]}


def task_losses(student: Mapping[str, Array], batch: Mapping[str, Array], num_tasks: int) -> Array:
    """The loss of every task, ``[T]``: unweighted sum over blocks and features of mean absolute differences."""
    mine = {name: split_tasks(student[name], num_tasks) for name in ("blocks", "features")}
    theirs = {name: split_tasks(batch[f"target_{name}"], num_tasks) for name in mine}
    num_layers = mine["blocks"].shape[2]
    # The mean over blocks, times their number, is the sum of the blocks' means.
    of_blocks = num_layers * jnp.abs(mine["blocks"] - theirs["blocks"]).mean((1, 2, 3))
    return of_blocks + objectives.l1(mine["features"], theirs["features"])


@adaptive_method(
    "surgery_v2",
    Card(
        title="SurgeryV2: Bridging the Gap Between Model Merging and Multi-Task Learning with Deep Representation "
        "Surgery",
        arxiv="2410.14389",
        year=2024,
        summary="a low-rank correction of all tokens after every block, one per task, trained to the experts'",
        sees=("tokens",),
        data="unlabelled test",
        result="task-conditioned",
        released_code=(
            "has the numbers of blocks and their width of ViT-B written in, also for ViT-L; its comment says rank=4 "
            "for ViT-L/14"
        ),
    ),
)
def surgery_v2(
    problem: Problem,
    rows: Rows,
    *,
    on: str | Tree = "task_arithmetic",
    rank: int = 16,
    steps: int = 1000,
    learning_rate: float = 1e-3,
    per_task: int = 16,
    seed: int = 0,
    loop: Loop = Loop(),
) -> Learned:
    """Corrects a merged model after every block, for each task by itself.

    A step moves the adapters of all tasks, each by its own batch: Adam works entry by entry, so that these are the
    published steps task by task. What the experts give is computed once for all rows, ``L D + d`` numbers per row.

    ``Learned.params`` is the merged model, ``Learned.merged`` the corrected result: ``merged.apply_fn`` runs what
    ``merged.params_for(task)`` gives.

    Args:
      problem: what is merged; a model of ours, scanned, whose blocks are one stack. Its heads are not used.
      rows: unlabelled; a few hundred a task are enough, and cost less memory than a whole test set.
      on: see `surgery.merged_model`.
      rank: r.
      steps: of Adam, each on one batch of every task: 500 iterations of two batches, as published.
      learning_rate: of Adam.
      per_task: rows of a task in a step.
      seed: of the rows drawn, and of D.
      loop: see `fit.Loop`; not `evaluate` and `pieces`.

    Raises:
      ValueError: see `surgery.merged_model`; the model has no blocks, or several stacks of them; a loop with what is
        not heeded.
    """
    if not problem.scanned:
        raise ValueError("surgery_v2 hooks into stacked blocks: it needs a model with scanned=True")
    problem.check_not_linear("surgery_v2")
    loop.refuse("surgery_v2", **NOT_HEEDED)
    if len(rows.counts) != problem.num_tasks:
        raise ValueError(f"{problem.num_tasks} task vectors but rows of {len(rows.counts)} tasks")
    blocks.stack_of(problem.theta0)
    params = merged_model(problem, on)
    rows = with_targets(problem, rows, give=taps, loop=loop)
    (_, num_layers, width), (_, features) = (rows.targets[0][name].shape for name in ("blocks", "features"))
    start = init_adapters(num_layers, problem.num_tasks, width, features, rank, seed)
    apply_fn = functools.partial(run, problem.apply_fn)

    def loss_fn(adapters: Tree, frozen: Tree, batch: Mapping[str, Array], key: Array):
        out = apply_fn(with_adapters(frozen, adapters), batch, capture=("block",), remat="dots")
        l1_T = task_losses(_means(out, batch), batch, problem.num_tasks)
        return l1_T.sum(), {"l1": l1_T}

    fit = make_fit(loss_fn, optax.adam(learning_rate), chunk=loop.chunk)
    done = fit(start, together(rows, per_task, seed), steps, frozen=params, seed=seed, loop=loop)
    adapters = done.learnables

    def params_for(task: int) -> Tree:
        own = {
            "blocks": jax.tree.map(lambda x: x[:, task : task + 1], adapters["blocks"]),
            "features": jax.tree.map(lambda x: x[task : task + 1], adapters["features"]),
        }
        return with_adapters(params, own)

    merged = Merged("task-conditioned", params_for, apply_fn=apply_fn)
    return Learned(params, jax.tree.map(np.asarray, adapters), done.history, merged=merged)
