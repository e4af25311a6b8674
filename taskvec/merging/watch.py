"""Finds the inputs of dense layers in any function, by reading the program that jax makes of it.

The function is traced to a jaxpr and interpreted. Which variables hold a weight matrix of the parameters is followed
through casts, transposes, slices of one layer out of a stack, calls (`jit`, `checkpoint`, custom derivatives) and
`scan`, over stacked layers or not. Where one operand of a product is such a matrix, the other is the layer's input.

Not recognised: matrices that are changed before use (added to, normalised, reshaped, gathered by a traced index),
products inside `cond`, `switch` and `while_loop`, convolutions, look-ups in tables, products over several axes at once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from taskvec import tree as trees
from taskvec.transforms.matrices import input_first
from taskvec.tree import Tree

Array = jax.Array

LAYER, DONE = -1, -2  # the axis of layers, before and after one of them is sliced out
_SAME = ("convert_element_type", "copy", "copy_p", "sharding_constraint", "reduce_precision")


class Mark(NamedTuple):
    """What a variable holds of the parameters.

    Attributes:
      path: of the leaf.
      axes: for every axis of the variable, the axis of the per-layer matrix (0, 1), `LAYER` or `DONE`.
      layer: which layer of a stack, if a slice took one.
    """

    path: str
    axes: tuple[int, ...]
    layer: int | None = None


def watch_inputs(
    fn: Callable[[Tree, Any], Any], params: Tree, batch: Any, mask: Array | None = None
) -> dict[str, tuple[Array, Array]]:
    """``{path: (sum of x^T x, number of rows x)}`` over the products of ``fn(params, batch)`` with parameters.

    Args:
      fn: a pure function.
      params: nested dict; watched are its two-axis leaves, and the layers of stacked ones.
      batch: any pytree of arrays.
      mask: bool; where the rows of a layer's input are as many as its entries, only those that are true count.

    Returns:
      ``[in, in]`` and a scalar for every leaf met; with a leading layer axis for stacked leaves.

    Raises:
      ValueError: a matrix is used the other way round than `input_first` takes it, or not all layers of a stack are.
    """
    closed = jax.make_jaxpr(fn)(params, batch)
    paths = list(trees.flatten(params))
    marks: list[Mark | None] = []
    for path, leaf in trees.flatten(params).items():
        stacked = trees.is_stacked(path)
        matrix = trees.is_float(leaf) and leaf.ndim == (3 if stacked else 2)
        marks.append(Mark(path, (LAYER, 0, 1) if stacked else (0, 1)) if matrix else None)
    values = jax.tree.leaves((params, batch))
    marks += [None] * (len(values) - len(paths))
    found = _Watcher(mask).run(closed.jaxpr, closed.consts, values, marks)[2]
    return _joined(
        found, {path: leaf.shape[0] for path, leaf in trees.flatten(params).items() if trees.is_stacked(path)}
    )


def _joined(found: dict[str, tuple], layers: dict[str, int]) -> dict[str, tuple]:
    """Puts layers that were sliced out one by one together."""
    out = {key: value for key, value in found.items() if "#" not in key}
    for path, number in layers.items():
        parts = [found.get(f"{path}#{i}") for i in range(number)]
        if any(part is None for part in parts) and any(part is not None for part in parts):
            raise ValueError(f"only some of the {number} layers of {path} are used in a product that is recognised")
        if parts and parts[0] is not None:
            out[path] = tuple(jnp.stack(each) for each in zip(*parts, strict=True))
    return out


class _Watcher:
    """Interprets a jaxpr; returns its outputs, their marks, and what was found."""

    def __init__(self, mask: Array | None):
        self.mask = mask

    def run(self, jaxpr, consts, args: list, arg_marks: list) -> tuple[list, list, dict]:
        values, marks, found = {}, {}, {}
        values.update(zip(jaxpr.constvars, consts, strict=True))
        values.update(zip(jaxpr.invars, args, strict=True))
        marks.update((var, mark) for var, mark in zip(jaxpr.invars, arg_marks, strict=True) if mark is not None)
        read = lambda atom: atom.val if isinstance(atom, core.Literal) else values[atom]
        mark_of = lambda atom: None if isinstance(atom, core.Literal) else marks.get(atom)
        for eqn in jaxpr.eqns:
            ins, in_marks = [read(atom) for atom in eqn.invars], [mark_of(atom) for atom in eqn.invars]
            outs, out_marks, here = self.equation(eqn, ins, in_marks)
            values.update(zip(eqn.outvars, outs, strict=True))
            marks.update((var, mark) for var, mark in zip(eqn.outvars, out_marks, strict=True) if mark is not None)
            _add(found, here)
        return [read(atom) for atom in jaxpr.outvars], [mark_of(atom) for atom in jaxpr.outvars], found

    def equation(self, eqn, ins: list, in_marks: list) -> tuple[list, list, dict]:
        name = eqn.primitive.name
        if name == "scan" and any(in_marks):
            return self.scan(eqn, ins, in_marks)
        inner = _called(eqn)
        if inner is not None and any(in_marks):
            return self.run(inner.jaxpr, inner.consts, ins, in_marks)
        outs = eqn.primitive.bind(*ins, **eqn.primitive.get_bind_params(eqn.params))
        outs = list(outs) if eqn.primitive.multiple_results else [outs]
        out_marks = [_moved(name, eqn.params, in_marks[0], ins[0])] if any(in_marks) and len(outs) == 1 else []
        found = self.product(eqn.params, ins, in_marks) if name == "dot_general" else {}
        return outs, out_marks or [None] * len(outs), found

    def product(self, params: dict, ins: list, in_marks: list) -> dict:
        """The input of a layer, if one of the operands is a marked matrix, contracted over one axis."""
        contracted, batched = params["dimension_numbers"]
        for weight, other in ((1, 0), (0, 1)):
            mark = in_marks[weight]
            if mark is None or sorted(mark.axes) != [0, 1] or any(batched) or len(contracted[weight]) != 1:
                continue
            axis = mark.axes[contracted[weight][0]]
            if (axis == 0) != input_first(mark.path, (0, 0)):
                first = "[in, out]" if axis == 0 else "[out, in]"
                raise ValueError(
                    f"{mark.path} is used as {first}, but its name stands for the other: leaves named kernel are "
                    "[in, out], all others [out, in]"
                )
            x = jnp.moveaxis(ins[other], contracted[other][0], -1)
            key = mark.path if mark.layer is None else f"{mark.path}#{mark.layer}"
            return {key: self.gram(x.reshape(-1, x.shape[-1]).astype(jnp.float32))}
        return {}

    def gram(self, x_RxI: Array) -> tuple[Array, Array]:
        rows = jnp.float32(x_RxI.shape[0])
        if self.mask is not None and self.mask.size == x_RxI.shape[0]:
            x_RxI = jnp.where(self.mask.reshape(-1, 1), x_RxI, 0.0)
            rows = self.mask.sum().astype(jnp.float32)
        return jnp.dot(x_RxI.T, x_RxI, precision="highest"), rows

    def scan(self, eqn, ins: list, in_marks: list) -> tuple[list, list, dict]:
        """A scan whose body is watched: found along a scanned stack stays a layer each, all else is summed."""
        p, body = eqn.params, _closed(eqn.params["jaxpr"])
        # Arguments are constants, carry and scanned arrays; what is scanned has one axis more outside than inside.
        outer = lambda outside, inside: sum(a.aval.ndim > b.aval.ndim for a, b in zip(outside, inside, strict=True))
        num_carry = len(eqn.outvars) - outer(eqn.outvars, body.jaxpr.outvars)
        num_consts = len(ins) - num_carry - outer(eqn.invars, body.jaxpr.invars)
        parts = (slice(num_consts), slice(num_consts, num_consts + num_carry), slice(num_consts + num_carry, None))
        split = lambda items: [items[part] for part in parts]
        consts, carry, xs = split(ins)
        const_marks, _, xs_marks = split(in_marks)
        of_layer = lambda mark: mark._replace(axes=mark.axes[1:]) if mark and mark.axes[0] == LAYER else None
        inner_marks = [*const_marks, *[None] * num_carry, *map(of_layer, xs_marks)]
        by_layer = {mark.path for mark in map(of_layer, xs_marks) if mark}

        def step(carry: list, xs: list) -> tuple:
            outs, _, found = self.run(body.jaxpr, body.consts, [*consts, *carry, *xs], inner_marks)
            return outs[:num_carry], (outs[num_carry:], found)

        options = {"length": p["length"], "reverse": p["reverse"], "unroll": p["unroll"]}
        carry, (ys, found) = jax.lax.scan(step, carry, xs, **options)
        total = {k: v if k in by_layer else tuple(each.sum(0) for each in v) for k, v in found.items()}
        outs = [*carry, *ys]
        return outs, [None] * len(outs), total


def _add(found: dict, here: dict) -> None:
    for key, value in here.items():
        found[key] = jax.tree.map(jnp.add, found[key], value) if key in found else value


def _called(eqn) -> Any:
    """The program inside a call, as a closed jaxpr, or ``None`` if the equation is no plain call."""
    if eqn.primitive.name in ("cond", "while", "scan"):
        return None
    inner = [eqn.params[name] for name in ("jaxpr", "call_jaxpr", "fun_jaxpr") if name in eqn.params]
    if not inner:
        return None
    closed = _closed(inner[0])
    return closed if len(closed.jaxpr.invars) == len(eqn.invars) else None


def _closed(jaxpr) -> Any:
    return jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else core.ClosedJaxpr(jaxpr, ())


def _moved(name: str, params: dict, mark: Mark | None, value: Array) -> Mark | None:
    """The mark of the result of a one-operand operation that moves a matrix without changing it."""
    if mark is None:
        return None
    if name in _SAME:
        return mark
    if name == "transpose":
        return mark._replace(axes=tuple(mark.axes[i] for i in params["permutation"]))
    if name == "slice" and LAYER in mark.axes:
        at = mark.axes.index(LAYER)
        starts, ends = params["start_indices"], params["limit_indices"]
        whole = all(
            s == 0 and e == n for i, (s, e, n) in enumerate(zip(starts, ends, value.shape, strict=True)) if i != at
        )
        if whole and ends[at] == starts[at] + 1:
            axes = tuple(DONE if axis == LAYER else axis for axis in mark.axes)
            return mark._replace(axes=axes, layer=int(starts[at]))
    if name == "squeeze" and all(mark.axes[i] == DONE for i in params["dimensions"]):
        return mark._replace(axes=tuple(np.delete(mark.axes, params["dimensions"]).tolist()))
    return None
