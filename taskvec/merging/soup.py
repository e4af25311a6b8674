"""Greedy soup: an average of those fine-tunings of one task that improve it."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from taskvec import tree as trees
from taskvec.merging import protocols
from taskvec.merging.protocols import Score
from taskvec.merging.trials import Evaluate, Record, Trial
from taskvec.tree import Tree
from taskvec.vectors import check_same_model


class Soup(NamedTuple):
    """The end of a greedy soup.

    Attributes:
      params: the average.
      ingredients: indices of the models in it, in the order in which they were added.
      score: of the average.
      trials: the models one by one, then the proposed averages, by ``{"ingredients": indices}``.
    """

    params: Tree
    ingredients: tuple[int, ...]
    score: float
    trials: list[Trial]


def greedy_soup(
    models: Sequence[Tree | Callable[[], Tree]],
    evaluate: Evaluate,
    *,
    score: Score = protocols.mean,
    earlier: Iterable[Trial | Mapping] = (),
    on_trial: Callable[[Trial], None] | None = None,
) -> Soup:
    """Averages those of several fine-tunings of one task that help (Model soups, arXiv 2203.05482, recipe 1).

    Models are taken from the best to the worst (the first of equal ones first); each is added to the running mean if
    the score on held-out data becomes strictly better. Integers come from the best model.

    Args:
      models: parameter trees, or functions without arguments that load them, one at a time.
      evaluate, score, earlier, on_trial: as in `grid`.
    """
    if not models:
        raise ValueError("a soup needs at least one model")
    load = lambda i: models[i]() if callable(models[i]) else models[i]
    record = Record(evaluate, score, earlier, on_trial)
    alone = [record.run({"ingredients": (i,)}, lambda i=i: load(i)) for i in range(len(models))]
    first, *others = sorted(range(len(models)), key=lambda i: -alone[i].worth)
    if alone[first].worth == -math.inf:
        raise ValueError(f"none of {len(models)} models has a finite score")
    start, best, ingredients = load(first), alone[first].worth, (first,)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), start)
    cast = lambda params: jax.tree.map(lambda x, y: x.astype(y.dtype), params, like)
    soup = _in_float32(start)
    del start
    for i in others:
        params = load(i)
        check_same_model(like, params, f"model {i}")
        proposed = _add_to_mean(soup, params, len(ingredients))
        trial = record.run({"ingredients": (*ingredients, i)}, lambda proposed=proposed: cast(proposed))
        if trial.worth > best:
            soup, best, ingredients = proposed, trial.score, (*ingredients, i)
    return Soup(cast(soup), ingredients, best, record.trials)


@jax.jit
def _in_float32(params: Tree) -> Tree:
    return jax.tree.map(lambda x: x.astype(jnp.float32) if trees.is_float(x) else x, params)


@jax.jit
def _add_to_mean(soup: Tree, params: Tree, number: int) -> Tree:
    """``(n soup + params) / (n + 1)`` in float32."""
    share = 1.0 / (number + 1.0)
    add = lambda x, y: x + share * (y.astype(jnp.float32) - x) if trees.is_float(x) else x
    return jax.tree.map(add, soup, params)
