"""aTLAS at test time: coefficients from unlabelled rows, by UFM (unsupervised FixMatch). arXiv 2407.02880, section 4.3.

The pretrained model's predictions p on all rows make k rows per class trusted, those of the largest p_c, with their
most probable class as label. Batches are 3/4 other rows and 1/4 trusted ones. On a strongly augmented view of each row
the cross-entropy to a target q is taken, the trusted label or else the present prediction on the weak view, without
gradient, where it is certain:

    min_lam sum_b w_b CE(q_b, h(f(strong_b))) / sum_b w_b,    w_b = [max_c q_bc > 0.99]
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from taskvec import tree as trees
from taskvec.adaptive import atlas_parts as parts, objectives, rows as rows_lib
from taskvec.adaptive.fit import Loop
from taskvec.adaptive.keep import logits_of
from taskvec.adaptive.learn import Learned, Outputs, Problem
from taskvec.adaptive.registry import adaptive_method
from taskvec.adaptive.rows import Batch, Rows
from taskvec.adaptive.teachers import features_of
from taskvec.merging.registry import Card


def trusted_rows(logits_NxC: np.ndarray, per_class: int | None = None) -> np.ndarray:
    """Numbers of the rows with the k largest probabilities of some class, in order.

    Args:
      logits_NxC: of the pretrained model.
      per_class: k; by default ``min(N / C / 10, 100)`` rounded down, and at least 1 (our choice: the released code
        then trusts every row).
    """
    count, classes = logits_NxC.shape
    k = max(min(count // (10 * classes), 100), 1) if per_class is None else per_class
    # On the host, where every number of rows and classes would be a program of its own.
    shifted = logits_NxC - logits_NxC.max(1, keepdims=True)
    log_probability = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    order = np.argsort(-log_probability, axis=0, kind="stable")
    return np.unique(order[:k])


def two_streams(
    rows: Rows,
    others: np.ndarray,
    trusted: np.ndarray,
    labels: np.ndarray,
    batch_size: int,
    seed: int = 0,
    all_trusted: bool = False,
) -> tuple[Callable[[int], Batch], int]:
    """Batches of 3/4 other and 1/4 trusted rows of one task, and the number of them in an epoch through the others.

    Batches hold ``target_label`` and ``target_trusted`` ``[B]`` beside the inputs, of which there may be two views.
    With `all_trusted` the others count as trusted too.
    """
    minor = batch_size // 4
    major = batch_size - minor
    length = max(len(others) // major, 1)

    def part(which: np.ndarray, stream: int, round_: int, at: int, size: int) -> np.ndarray:
        order = rows_lib.generator("trusted", seed, stream, round_).permutation(which)
        return np.resize(order, max(len(order), size))[at * size : (at + 1) * size]

    def batch(step: int) -> Batch:
        epoch, at = divmod(step, length)
        rounds = max(len(trusted) // minor, 1)
        numbers = np.concatenate(
            [part(others, 0, epoch, at, major), part(trusted, 1, step // rounds, step % rounds, minor)]
        )
        known = (np.arange(batch_size) >= major) | all_trusted
        return rows.batch([numbers]) | {"target_label": labels[numbers], "target_trusted": known}

    return batch, length


@functools.lru_cache(1)
def certain_on_strong(threshold: float) -> Callable[[Outputs], jax.Array]:
    """The objective; logits ``[1, 2 B, C]`` are those of B weak and B strong views, or ``[1, B, C]`` of one view."""

    def objective(outputs: Outputs) -> jax.Array:
        trusted, label = outputs.batch["target_trusted"], outputs.batch["target_label"]
        size = label.shape[1]
        weak, strong = outputs.logits[:, :size], outputs.logits[:, -size:]
        guess = jnp.exp(objectives.log_probabilities(weak))
        target = jnp.where(trusted[..., None], jax.nn.one_hot(label, guess.shape[-1]), guess)
        return objectives.certain_target(strong, target, threshold)

    return objective


@adaptive_method(
    "atlas_ufm",
    Card(
        title=parts.TITLE,
        arxiv="2407.02880",
        year=2024,
        summary="a new task from unlabelled rows and the task vectors of other tasks, by self-training on certain rows",
        learns="one target",
        sees=("crops",),
        data="unlabelled test",
        released_code=(
            "marks every row as trusted, so that it trains on zero-shot labels alone (all_trusted=True); its "
            "sharpening of targets is "
            "undone by the normalisation after it; 0 / 0 where no row is certain; keeps the best epoch on labels"
        ),
    ),
)
def atlas_ufm(
    problem: Problem,
    rows: Rows,
    *,
    per_class: int | None = None,
    threshold: float = 0.99,
    all_trusted: bool = False,
    mode: trees.GroupMode = "tensor",
    partitions: int = 1,
    partitioned: parts.Partitioned = "all",
    epochs: int = 10,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.1,
    gradient_norm: float | None = 1.0,
    batch_size: int = 128,
    accumulate: int = 1,
    seed: int = 0,
    loop: Loop = Loop(),
) -> Learned:
    """Test-time adaptation; the method is meant as its paper describes it, see the card for the released code.

    Args:
      problem: a pool of T task vectors, and one head, the target's.
      rows: unlabelled rows of the target. Inputs may hold two views of every row, weak and strong (`rows.views`:
        ``x`` and ``second_x``); without, one view serves as both, at half the cost. Where the strong view is drawn
        anew whenever a row is taken, so are its augmentations.
      per_class: trusted rows per class, see `trusted_rows`.
      threshold: on the largest probability of a target.
      all_trusted: every row is trained on its pretrained label, as in the released code; see the card.
      mode, partitions, partitioned, weight_decay, gradient_norm: see `atlas.atlas`.
      epochs, batch_size: an epoch goes once through the rows that are not trusted.
      accumulate: batches a step of the optimiser; published 2 for ViT-L/14, of half the rows each.
      learning_rate: falls to 0 along a cosine.
      seed, loop: see `atlas.atlas`.

    Raises:
      ValueError: not one head and one set of rows, or a batch of fewer than 4 rows.
    """
    if (problem.heads.kernel.shape[0], len(rows.counts)) != (1, 1):
        raise ValueError("atlas_ufm takes one head and one set of rows, those of the target task")
    if batch_size < 4:
        raise ValueError(f"batch_size={batch_size}, must be at least 4: a quarter are trusted rows")
    parts.check_whole(loop, "atlas_ufm")
    rows = rows._replace(labels=None, targets=None)
    both = rows_lib.views(rows) if rows_lib.has_views(rows) else rows
    logits_NxC = logits_of(problem, features_of(problem, problem.theta0, first_views(rows), 0), 0)
    trusted = trusted_rows(logits_NxC, per_class)
    others = np.setdiff1d(np.arange(len(logits_NxC)), trusted)
    others = others if len(others) else trusted
    labels = logits_NxC.argmax(-1).astype(np.int32)
    batches, length = two_streams(both, others, trusted, labels, batch_size, seed, all_trusted)
    learner = parts.learner_of(
        problem.kind, certain_on_strong(threshold), mode, partitions, partitioned, seed if partitions > 1 else 0,
        learning_rate, weight_decay, gradient_norm, accumulate, loop.chunk,
    )  # fmt: skip
    return learner.run(problem, batches, epochs * length, seed=seed, loop=loop)


def first_views(rows: Rows) -> Rows:
    """Without the second views, if there are any."""
    first = lambda inputs: {k: x for k, x in inputs.items() if not k.startswith(rows_lib.SECOND)}
    return rows._replace(take=lambda t, numbers: first(rows.take(t, numbers)))
