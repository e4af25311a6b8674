"""Parameter trees: paths, which leaves are what, block depth, and the two layouts of a layer.

A model's parameters are a nested dict of arrays. A leaf's *path* is its keys joined by "/". A tree stands in one
of two layouts that mean the same:

* per layer, as files name them: ``blocks/0/attention/query/kernel`` of shape ``[d, d]`` for every layer;
* stacked, as scanned models want them: ``blocks/attention/query/kernel`` of shape ``[L, d, d]``. The rule is
  the name: a dict called ``blocks`` whose children are not numbered (``0``, ``layer_0``) holds layers stacked on the
  leading axis, of one length in all its leaves.

Everything that speaks of a "tensor" or a "layer" means the per-layer tensor, in either layout.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

Tree = Any

STACK = "blocks"
_NUMBERED = re.compile(r"(?:\w*_)?\d+")
_DEPTH = re.compile(r"(?:^|[/._])(?:blocks?|layers?|resblocks|encoderblock|h)[/._](\d+)(?=[/._]|$)")


def flatten(tree: Tree) -> dict[str, Any]:
    """Returns ``{path: leaf}`` in the tree's own leaf order (sorted keys, as jax orders dicts)."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """Inverse of `flatten` for nested dicts with string keys."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)[name] = leaf
    return tree


def map_with_path(fn: Callable, tree: Tree, *rest: Tree) -> Tree:
    """Maps ``fn(path, leaf, *leaves_of_rest)`` over a tree."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: fn(jax.tree_util.keystr(path, simple=True, separator="/"), *leaves), tree, *rest
    )


def is_stacked(path: str) -> bool:
    """Whether the leaf at `path` carries the layers of a block stack on its leading axis."""
    keys = path.split("/")
    return STACK in keys[:-1] and not _NUMBERED.fullmatch(keys[keys.index(STACK) + 1])


def layer_path(path: str, layer: int) -> str:
    """The path of one layer's tensor of a stacked leaf: ``blocks/q/kernel`` -> ``blocks/3/q/kernel``."""
    keys = path.split("/")
    at = keys.index(STACK) + 1
    return "/".join([*keys[:at], str(layer), *keys[at:]])


def depth(path: str) -> int | None:
    """Block index of a per-layer path, ``None`` outside the blocks (embeddings, final norm, head).

    >>> depth("encoder.layer.3.attention.self.query.weight")
    3
    """
    found = _DEPTH.search(path)
    return int(found.group(1)) if found else None


def is_float(leaf: Any) -> bool:
    """Whether a leaf can be merged; integer and boolean leaves are copied from the pretrained model."""
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def tensors(tree: Tree) -> dict[str, tuple[str, int | None]]:
    """Every per-layer tensor of a tree: ``{per-layer path: (path of its leaf, layer or None)}``."""
    names = {}
    for path, leaf in flatten(tree).items():
        layers = range(leaf.shape[0]) if is_stacked(path) else [None]
        names.update({path if i is None else layer_path(path, i): (path, i) for i in layers})
    return names


def unstack_layers(tree: Tree) -> Tree:
    """Stacked layout to per-layer layout, so that leaves match the tensors of a file."""
    flat = flatten(tree)
    return unflatten({n: flat[path] if i is None else flat[path][i] for n, (path, i) in tensors(tree).items()})


def stack_layers(tree: Tree) -> Tree:
    """Per-layer layout to stacked layout; raises `ValueError` if layers are missing or differ in shape."""
    out, stacks = {}, {}
    for path, leaf in flatten(tree).items():
        keys = path.split("/")
        if STACK in keys[:-1] and keys[keys.index(STACK) + 1].isdigit():
            layer = int(keys.pop(keys.index(STACK) + 1))
            stacks.setdefault("/".join(keys), {})[layer] = leaf
        else:
            out[path] = leaf
    for path, layers in stacks.items():
        if sorted(layers) != list(range(len(layers))) or len({leaf.shape for leaf in layers.values()}) > 1:
            shapes = {i: leaf.shape for i, leaf in sorted(layers.items())}
            raise ValueError(f"cannot stack {path}: layers must be 0..L-1 of one shape, found {shapes}")
        out[path] = jnp.stack([layers[i] for i in range(len(layers))])
    return unflatten(out)


class Groups(NamedTuple):
    """Which coefficient every tensor uses.

    Attributes:
      ids: tree of int32 group numbers; a scalar for a plain leaf, ``[L]`` for a stacked one.
      names: one name a group, in order of the numbers.
      shared: whether all tasks share one coefficient, too.
    """

    ids: Tree
    names: tuple[str, ...]
    shared: bool = False


GROUP_MODES = ("global", "task", "block", "module", "tensor")
GroupMode = Literal[GROUP_MODES]


def groups(tree: Tree, mode: str) -> Groups:
    """Assigns every tensor of `tree` to a group of shared coefficients.

    Args:
      tree: parameters (arrays or `jax.ShapeDtypeStruct`), in either layout.
      mode: ``task`` (one group), ``global`` (one, and one coefficient for all tasks), ``block`` (one a transformer
        block, one for everything outside the blocks), ``module`` (tensors with the same parent dict), ``tensor`` (one
        each; "layer-wise" in the sense of AdaMerging, arXiv 2310.02575).
    """
    if mode not in GROUP_MODES:
        raise ValueError(f"unknown group mode {mode!r}; allowed: {', '.join(GROUP_MODES)}")
    name_of = {
        "global": lambda path: "all",
        "task": lambda path: "all",
        "block": lambda path: path[: found.end()] if (found := _DEPTH.search(path)) else "outside",
        "module": lambda path: path.rpartition("/")[0] or path,
        "tensor": lambda path: path,
    }[mode]
    number: dict[str, int] = {}
    ids = {path: number.setdefault(name_of(path), len(number)) for path in tensors(tree)}

    def leaf_ids(path, leaf):
        if is_stacked(path):
            return jnp.array([ids[layer_path(path, i)] for i in range(leaf.shape[0])], jnp.int32)
        return jnp.array(ids[path], jnp.int32)

    return Groups(map_with_path(leaf_ids, tree), tuple(number), mode == "global")
