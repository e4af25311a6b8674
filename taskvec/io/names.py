"""Names of tensors in Hugging Face files and paths in our trees: one table a model, read in both directions.

A rule pairs a name with a path; ``{}`` stands for a layer number in both. The op says how the array differs:

* ``none``: the same array;
* ``transpose``: a matrix, ``[out, in]`` in the file and ``[in, out]`` here;
* ``conv``: a convolution kernel, ``[out, in, h, w]`` in the file and ``[h, w, in, out]`` here.

A name that no rule covers is an error, unless the table lists it as ignored: then it is no part of the model here (it
is not merged), and saving copies it from the source file. Names listed as copies hold another tensor once more (tied
embeddings): reading leaves them out, saving writes that tensor under both names.

Old files of BERT (google-bert's on the hub) call scale and bias of a norm gamma and beta, as TensorFlow does. They are
read as if they had the usual names (`current`); saving writes these, or what the source file has.
"""

import collections
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from taskvec import tree as trees
from taskvec.messages import some
from taskvec.tree import Tree

_AXES = {"none": None, "transpose": (1, 0), "conv": (2, 3, 1, 0)}
_OLD = {"gamma": "weight", "beta": "bias"}
_AXES_BACK = {"none": None, "transpose": (1, 0), "conv": (3, 2, 0, 1)}


class Rule(NamedTuple):
    """A name in the file, its path in the tree (``{}`` is the same number in both) and the op between them."""

    name: str
    path: str
    op: str = "none"


class Table(NamedTuple):
    """The rules of an architecture.

    Attributes:
      rules: one a kind of tensor.
      ignore: regular expressions of names that are left out of the tree.
      prefix: of names in files of models with a head (``bert.`` in BertForSequenceClassification); optional in a file.
        A rule whose name begins with it writes it.
      copies: pairs of a name and the path of another rule, whose array stands under that name once more.
    """

    rules: tuple[Rule, ...]
    ignore: tuple[str, ...] = ()
    prefix: str = ""
    copies: tuple[tuple[str, str], ...] = ()


class Place(NamedTuple):
    """Where a tensor of a file belongs: a per-layer path and an op."""

    path: str
    op: str


def current(name: str) -> str:
    """The usual name of a tensor, for ``LayerNorm.gamma`` and ``LayerNorm.beta``."""
    module, _, last = name.rpartition(".")
    return f"{module}.{_OLD[last]}" if last in _OLD and module.endswith("LayerNorm") else name


def places(table: Table, names: Iterable[str]) -> dict[str, Place]:
    """Finds the place of every name of a file; ignored names and copies are left out.

    Raises:
      ValueError: names that no rule or several rules cover, or two names for one path; lists them.
    """
    rules = [(_pattern(rule.name.removeprefix(table.prefix)), rule) for rule in table.rules]
    names = list(names)
    second = copies(table, names)
    found, unknown, ambiguous = {}, [], []
    for name in names:
        if name in second:
            continue
        bare = current(name.removeprefix(table.prefix))
        if any(re.fullmatch(pattern, bare) for pattern in table.ignore):
            continue
        matches = [(match, rule) for pattern, rule in rules if (match := pattern.fullmatch(bare))]
        if len(matches) == 1:
            match, rule = matches[0]
            found[name] = Place(rule.path.format(*match.groups()), rule.op)
        else:
            (ambiguous if matches else unknown).append(name)
    claims = collections.Counter(place.path for place in found.values())
    twice = [name for name, place in found.items() if claims[place.path] > 1]
    problems = {"no rule covers": unknown, "several rules cover": ambiguous, "one path is claimed by": twice}
    told = "; ".join(f"{what} {some(sorted(which))}" for what, which in problems.items() if which)
    if told:
        raise ValueError(
            f"{told}. The file is of another architecture, or the table needs a rule or an `ignore` entry."
        )
    return found


def copies(table: Table, names: Iterable[str]) -> dict[str, str]:
    """The names of a file that hold another tensor once more, and that tensor's path."""
    path_of = dict(table.copies)
    return {n: path_of[bare] for n in names if (bare := n.removeprefix(table.prefix)) in path_of}


def to_paths(table: Table, tensors: Mapping[str, Any]) -> Tree:
    """Tensors of a file to a tree with stacked layers; raises `ValueError` as `places` and for missing layers."""
    flat = {place.path: to_tree_array(tensors[name], place.op) for name, place in places(table, tensors).items()}
    return trees.stack_layers(trees.unflatten(flat))


def to_names(table: Table, tree: Tree) -> dict[str, np.ndarray]:
    """Inverse of `to_paths`: host arrays under the names of the table, without the prefix.

    Raises:
      ValueError: leaves that no rule or several rules cover; lists them.
    """
    flat = trees.flatten(trees.unstack_layers(jax.tree.map(np.asarray, tree)))
    return {place.path: to_file_array(flat[path], place.op) for path, place in places(inverse(table), flat).items()}


def inverse(table: Table) -> Table:
    """The rules read from paths to names, without what a table says of names alone; for `places`."""
    return Table(tuple(Rule(rule.path, rule.name, rule.op) for rule in table.rules))


def to_tree_array(array: Any, op: str) -> Any:
    """An array as the tree has it, from one as the file has it."""
    return array if _AXES[op] is None else array.transpose(_AXES[op])


def to_file_array(array: Any, op: str) -> Any:
    """An array as the file has it, from one as the tree has it."""
    return array if _AXES_BACK[op] is None else array.transpose(_AXES_BACK[op])


def file_axes(op: str, ndim: int) -> tuple[int, ...]:
    """For every axis of a tensor of the file its axis in the tree."""
    return tuple(range(ndim)) if _AXES_BACK[op] is None else _AXES_BACK[op]


def _pattern(template: str) -> re.Pattern:
    return re.compile(r"(\d+)".join(re.escape(part) for part in template.split("{}")))


def dense(name: str, path: str, bias: bool = True) -> tuple[Rule, ...]:
    """Rules of a dense layer: ``NAME.weight`` ``[out, in]`` and ``NAME.bias``."""
    kernel = Rule(f"{name}.weight", f"{path}/kernel", "transpose")
    return (kernel, Rule(f"{name}.bias", f"{path}/bias")) if bias else (kernel,)


def norm(name: str, path: str, bias: bool = True) -> tuple[Rule, ...]:
    """Rules of a normalisation: ``NAME.weight`` and ``NAME.bias``."""
    scale = Rule(f"{name}.weight", f"{path}/scale")
    return (scale, Rule(f"{name}.bias", f"{path}/bias")) if bias else (scale,)
