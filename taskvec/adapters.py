"""Your own flax module as the two things every method needs: a function ``apply_fn(params, batch)`` and a nested dict.

Parameters become a dict of dicts with text for keys; list positions become "0", "1", ... Whatever else the module holds
(batch statistics, random states, caches) stays as it is in the module given: a merge does not touch it, and what a call
changes of it is thrown away.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from taskvec import tree as trees
from taskvec.tree import Tree


class Adapted(NamedTuple):
    """A module as functions.

    Attributes:
      apply_fn: ``(params, batch) -> {"features": [B, d], ...}``, to be jitted and differentiated at will.
      params: nested dict of arrays.
      back: ``params -> `` what the module came as: linen variables, or a new nnx module.
    """

    apply_fn: Callable[[Tree, Any], dict[str, Any]]
    params: Tree
    back: Callable[[Tree], Any]


def from_linen(module: Any, variables: Mapping, call: Callable[[Any, Any], Any], stacked: str | None = None) -> Adapted:
    """A `flax.linen` module and its variables.

    Args:
      module: unbound.
      variables: collections; ``params`` is what is merged.
      call: ``(bound module, batch) -> `` an array, then called ``features``, or a dict of outputs. Says how a batch
        enters the module, without dropout and with running statistics: ``lambda m, batch: m(batch["x"], train=False)``.
      stacked: path of a submodule whose layers lie stacked on a leading axis (`nn.scan`), such as ``encoder/layers``;
        named ``blocks`` in the params, which makes every method see its layers one by one.

    Raises:
      ValueError: see `from_nnx`.
    """
    from flax import linen
    from flax.core import meta, unfreeze

    boxed, rest = variables["params"], {name: x for name, x in variables.items() if name != "params"}
    params, original = _named(unfreeze(meta.unbox(boxed)), stacked)
    run = linen.apply(call, module)
    back = lambda params: {"params": meta.replace_boxed(boxed, original(params)), **rest}
    return Adapted(lambda params, batch: _outputs(run({"params": original(params), **rest}, batch)), params, back)


def from_nnx(module: Any, call: Callable[[Any, Any], Any], stacked: str | None = None) -> Adapted:
    """A `flax.nnx` module; its `nnx.Param` are merged.

    Args:
      module: left intact; call its ``eval()`` first if it has dropout or batch statistics.
      call, stacked: as in `from_linen`.

    Raises:
      ValueError: `stacked` is no submodule; or a dict named ``blocks``, as only stacked layers may be named, does not
        hold leaves of one length.
    """
    from flax import nnx

    graph, state, rest = nnx.split(module, nnx.Param, ...)
    params, original = _named(nnx.to_pure_dict(state), stacked)

    def back(params: Tree) -> Any:
        filled = nnx.clone(state)
        nnx.replace_by_pure_dict(filled, original(params))
        # Copied, so that a call under jit may write statistics that nobody reads.
        return nnx.merge(graph, filled, rest, copy=True)

    return Adapted(lambda params, batch: _outputs(call(back(params), batch)), params, back)


def _outputs(found: Any) -> dict[str, Any]:
    return found if isinstance(found, dict) else {"features": found}


def _named(tree: Tree, stacked: str | None) -> tuple[Tree, Callable[[Tree], Tree]]:
    """The tree with text for keys and `stacked` renamed, and the function that undoes the renaming."""
    flat, old = trees.flatten(tree), {}
    for path in flat:
        new = path
        if stacked is not None and path.startswith(f"{stacked}/"):
            new = "/".join([*stacked.split("/")[:-1], trees.STACK, path[len(stacked) + 1 :]])
        old[new] = path
    if stacked is not None and all(new == path for new, path in old.items()) and stacked.split("/")[-1] != trees.STACK:
        raise ValueError(f"no submodule {stacked!r} to take as stacked layers; there is {', '.join(sorted(tree))}")
    lengths = {new: flat[path].shape[:1] for new, path in old.items() if trees.is_stacked(new)}
    if len(set(lengths.values())) > 1 or () in lengths.values():
        raise ValueError(
            f"a submodule named {trees.STACK!r} is taken for layers stacked on a leading axis, but its leaves have the "
            f"leading axes {lengths}; rename it, or number its children (0, 1, ...)"
        )
    original = lambda params: trees.unflatten({old[new]: x for new, x in trees.flatten(params).items()})
    return trees.unflatten({new: flat[path] for new, path in old.items()}), original
