"""What merges ask for besides weights, from rows of a benchmark: Gram matrices and Fisher information.

A method's card names its extras and the function of `taskvec.merging.collect` that makes them. Every fine-tuned model
sees rows of its own task, without labels. Besides a method's own settings its row in the table has

* ``data``: ``unlabelled train`` (held-out training rows, unless the card says otherwise) or ``unlabelled test``;
* ``rows``: of every task, at most, drawn by the benchmark's seed;
* those of the function: ``include`` of `collect_gram`; ``estimator``, ``samples`` and ``chunk`` of `collect_fisher`.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import learning
from experiments.prepare import FIXED, Bench
from taskvec.adaptive.rows import Batch
from taskvec.evaluation import rows as rows_lib
from taskvec.merging import collect, registry
from taskvec.training import heads as heads_lib
from taskvec.tree import Tree

DATA = rows_lib.DATA_ACCESS[1:3]
ROWS = 256  # FusionBench's number of pictures, for both statistics
CHOICES = {"estimator": collect.ESTIMATORS}


def gram(bench: Bench, batches: Sequence[Sequence[Batch]], *, include: str | None = None) -> Tree:
    """Of every expert on its own rows."""
    apply_fn, mask_of = bench.base.model.apply, _mask_of(bench)
    grams = [
        collect.collect_gram(apply_fn, params, mine, mask_of=mask_of, include=include)
        for params, mine in zip(bench.experts, batches, strict=True)
    ]
    return collect.stack_tasks(grams)


def gram_plusplus(bench: Bench, batches: Sequence[Sequence[Batch]], *, reduce_nondiagonal: float, ridge: float) -> Tree:
    """Of every expert on the blocks merged so far; the settings are the method's."""
    return collect.collect_gram_plusplus(
        bench.base.model.apply,
        bench.base.pretrained,
        bench.experts,
        [lambda mine=mine: mine for mine in batches],
        mask_of=_mask_of(bench),
        reduce_nondiagonal=reduce_nondiagonal,
        ridge=ridge,
    )


def fisher(
    bench: Bench, batches: Sequence[Sequence[Batch]], *, estimator: str = "exact", samples: int = 1, chunk: int = 1
) -> Tree:
    """Of every expert's encoder under the task's fixed head."""
    log_probs = _log_probs(bench.base.model.apply)
    options = {"estimator": estimator, "samples": samples, "chunk": chunk, "seed": bench.seed}
    found = [
        collect.collect_fisher(log_probs, {"encoder": params, "head": _head(bench, t)}, batches[t], **options)
        for t, params in enumerate(bench.experts)
    ]
    return collect.stack_tasks([each["encoder"] for each in found])


class Collector(NamedTuple):
    """How a function of `taskvec.merging.collect` is called on a benchmark.

    Attributes:
      make: ``(bench, batches of every task, *, settings) -> tree``. Settings without a default are the method's.
      heads: the values of ``config.heads`` that it works with.
    """

    make: Callable[..., Tree]
    heads: tuple[str, ...]


COLLECT = {
    "collect_gram": Collector(gram, (*FIXED, "trained")),
    "collect_gram_plusplus": Collector(gram_plusplus, (*FIXED, "trained")),
    "collect_fisher": Collector(fisher, tuple(FIXED)),
}


def settings_of(name: str) -> dict[str, Any]:
    """The settings, but ``data``, that a config may give a merge besides the method's, with their defaults."""
    card = registry.get(name).card
    if not card.collect:
        return {}
    options = _options(card.collect)
    return {"rows": ROWS, **{key: value for key, value in options.items() if value is not inspect.Parameter.empty}}


def _options(function: str) -> dict[str, Any]:
    parameters = inspect.signature(COLLECT[function].make).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def collector(bench: Bench, name: str, data: str) -> Callable[[Mapping[str, Any]], dict[str, Tree]]:
    """``settings -> extras`` of a merge; what is collected with the settings of the call before is not collected anew.

    Args:
      bench: with its experts.
      name: of a registered method; its extras are none where it needs none.
      data: which rows may be looked at.
    """
    method = registry.get(name)
    if not method.card.collect:
        return lambda settings: {}
    (extra,), options = method.card.extras, _options(method.card.collect)

    @functools.lru_cache(maxsize=1)
    def made(rows: int, **settings: Any) -> Tree:
        return COLLECT[method.card.collect].make(bench, _batches(bench, data, rows), **settings)

    known = {**method.defaults, **settings_of(name)}
    return lambda settings: {extra: made(**{key: {**known, **settings}[key] for key in ("rows", *options)})}


def checked(config: Any, label: str, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a merge's own, without those of what is collected for it.

    Args:
      config: of the benchmark.
      label, name: of the row, and of its method.
      settings: all of the row but ``method``; a tuple stands for values that are searched.

    Raises:
      ValueError: the method's extras cannot be collected on this benchmark, or not with these settings.
    """
    card, own = registry.get(name).card, settings_of(name)
    if card.extras and not card.collect:
        raise ValueError(f"{label}: {name} needs {', '.join(card.extras)}, which no rows give: merge by taskvec.merge")
    if not own:
        return dict(settings)
    allowed, data = COLLECT[card.collect].heads, settings.get("data", card.data)
    if config.heads not in allowed:
        raise ValueError(f"{label}: {card.collect} works with config.heads {', '.join(allowed)}, not {config.heads!r}")
    if data not in DATA:
        raise ValueError(f"{label}: data is {data!r}; allowed: {', '.join(DATA)}")
    if data == "unlabelled train" and config.suite.held_out == 0:
        raise ValueError(
            f"{label} collects from held-out training rows, but config.suite.held_out is 0: raise it, or set "
            "data='unlabelled test'"
        )
    for key in own.keys() & settings.keys():
        for value in settings[key] if isinstance(settings[key], tuple | list) else (settings[key],):
            if key in CHOICES and value not in CHOICES[key]:
                raise ValueError(f"{label}: {key} is {value!r}; allowed: {', '.join(CHOICES[key])}")
            if isinstance(own[key], int) and not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{label}: {key} is {value!r}; it is a whole number, 1 or more")
    return {key: value for key, value in settings.items() if key not in ("data", *own)}


def _batches(bench: Bench, data: str, rows: int) -> list[list[Batch]]:
    """Rows of every task, without labels: each once, so the last batch may be smaller."""
    given, size = learning.rows(bench, data, packed=False), bench.config.eval_batch_size
    out = []
    for t, count in enumerate(given.counts):
        chosen = np.random.default_rng([bench.seed, t]).permutation(count)[:rows]
        out.append([given.only([t]).batch([chosen[at : at + size]]) for at in range(0, len(chosen), size)])
    return out


def _mask_of(bench: Bench) -> Callable | None:
    return _tokens if bench.config.suite.kind == "text" else None


def _tokens(batch: Batch) -> jax.Array:
    return batch["mask"]


def _head(bench: Bench, task: int) -> dict[str, jax.Array]:
    """One task's head without the classes that only others have, so that no pass is spent on them."""
    heads = bench.heads
    classes = int(np.asarray(heads.class_mask[task]).sum())
    head = {"kernel": heads.kernel[task, :, :classes], "scale": jnp.asarray(heads.scale, jnp.float32)}
    return head if heads.bias is None else {**head, "bias": heads.bias[task, :classes]}


@functools.lru_cache(maxsize=1)
def _log_probs(apply_fn: Callable) -> Callable:
    """``(encoder and head, batch) -> [B, C]``; the head is an argument, so that tasks share the compiled program."""

    def log_probs(params: Tree, batch: Batch) -> jax.Array:
        head = params["head"]
        mask_C = jnp.ones(head["kernel"].shape[1], bool)
        features_Bxd = apply_fn(params["encoder"], batch)["features"]
        logits_BxC = heads_lib.logits(head["kernel"], mask_C, head["scale"], features_Bxd, head.get("bias"))
        return jax.nn.log_softmax(logits_BxC)

    return log_probs
