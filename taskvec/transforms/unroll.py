"""Evaluates a function of ``[T, ...]`` arrays task by task.

Transforms are written on arrays with the task axis first. XLA on a CPU is slow at that: it assembles the stacked
array, cuts it up again, and reduces a leading axis without vector instructions. `unrolled` traces such a function and
evaluates it with every array that has the task axis kept as T arrays; elementwise operations, reductions and indexing
act on these, anything else on the stacked array. The result is the same, in a small part of the time.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

Array = jax.Array

_NAMES = (
    "abs add and bitcast_convert_type cbrt ceil clamp convert_element_type copy cos div eq erf exp exp2 expm1 floor ge "
    "gt integer_pow is_finite le log log1p logistic lt max min mul ne neg nextafter not or pow rem round rsqrt "
    "select_n shift_left shift_right_arithmetic shift_right_logical sign sin sqrt square stop_gradient sub tanh xor"
)
_ELEMENTWISE = frozenset(_NAMES.split())
_REDUCTIONS = {
    "reduce_sum": jax.lax.add,
    "reduce_max": jax.lax.max,
    "reduce_min": jax.lax.min,
    "reduce_prod": jax.lax.mul,
    "reduce_and": jax.lax.bitwise_and,
    "reduce_or": jax.lax.bitwise_or,
}
_STARTS = {"reduce_sum": 0, "reduce_max": -jnp.inf, "reduce_min": jnp.inf}
_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr"}


class Tasks(list):
    """The slices of an array along its leading axis."""


def unrolled(fn: Callable, tasks: Sequence[Array]) -> Any:
    """``fn(jnp.stack(tasks))``; arrays in the result that have the task axis may come as `Tasks`."""
    whole = jax.ShapeDtypeStruct((len(tasks), *tasks[0].shape), tasks[0].dtype)
    closed, shape = jax.make_jaxpr(fn, return_shape=True)(whole)
    outs = _evaluate(closed.jaxpr, closed.consts, [Tasks(tasks)])
    return jax.tree.unflatten(jax.tree.structure(shape), outs)


def stacked(tree: Any) -> Any:
    """Turns every `Tasks` of a tree into one array."""
    return jax.tree.map(_stack, tree, is_leaf=lambda x: isinstance(x, Tasks))


def _stack(x: Any) -> Any:
    return jnp.stack(x) if isinstance(x, Tasks) else x


def _evaluate(jaxpr: core.Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    read = lambda var: var.val if isinstance(var, core.Literal) else env[var]
    for eqn in jaxpr.eqns:
        values = [read(var) for var in eqn.invars]
        outs = _equation(eqn, values)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(var) for var in jaxpr.outvars]


def _equation(eqn: Any, values: list[Any]) -> list[Any]:
    name, params = eqn.primitive.name, eqn.params
    if name in _CALLS and any(isinstance(x, Tasks) for x in values):
        inner = params[_CALLS[name]]
        return _evaluate(inner.jaxpr, inner.consts, values)
    if name == "stack" and params["axis"] == 0:
        return [Tasks(_stack(x) for x in values)]
    if any(isinstance(x, Tasks) for x in values):
        shapes = [var.aval.shape for var in eqn.invars]
        out = _by_task(eqn, name, params, values, shapes, eqn.outvars[0].aval.shape)
        if out is not None:
            return [out]
    values = [_stack(x) for x in values]
    out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(params))
    return list(out) if eqn.primitive.multiple_results else [out]


def _by_task(eqn: Any, name: str, params: dict, values: list, shapes: list, shape: tuple) -> Any:
    """The result of one operation kept by task, or ``None`` if it needs the stacked array."""
    x, size = values[0], shapes[0][0] if shapes[0] else 0
    if name in _ELEMENTWISE:
        operands = list(zip(values, shapes, strict=True))
        part = lambda task: [_part(value, its, task, len(shape)) for value, its in operands]
        return Tasks(eqn.primitive.bind(*part(task), **params) for task in range(shape[0]))
    if not isinstance(x, Tasks):
        return None
    if name in _REDUCTIONS:
        axes = tuple(int(axis) for axis in params["axes"])
        inner = tuple(axis - 1 for axis in axes if axis)
        if inner and len(inner) == x[0].ndim and name in _STARTS:
            parts = _reduced_together(x, _REDUCTIONS[name], _STARTS[name])
        else:
            parts = [eqn.primitive.bind(part, **{**params, "axes": inner}) if inner else part for part in x]
        return _fold(_REDUCTIONS[name], parts) if 0 in axes else Tasks(parts)
    if name == "reshape" and shape and shape[0] == size and params.get("dimensions") is None:
        return Tasks(jnp.reshape(part, shape[1:]) for part in x)
    if name == "transpose" and params["permutation"][0] == 0:
        return Tasks(jnp.transpose(part, [axis - 1 for axis in params["permutation"][1:]]) for part in x)
    if name == "squeeze":
        dims = tuple(int(d) for d in params["dimensions"])
        parts = [jnp.squeeze(part, tuple(d - 1 for d in dims if d)) for part in x]
        return parts[0] if 0 in dims else Tasks(parts)
    if name == "slice":
        start, limit, strides = (params[k] for k in ("start_indices", "limit_indices", "strides"))
        strides = strides or (1,) * len(start)
        chosen = x[start[0] : limit[0] : strides[0]]
        if all(a == 0 and b == n for a, b, n in zip(start[1:], limit[1:], shapes[0][1:], strict=True)):
            return Tasks(chosen)
        return Tasks(jax.lax.slice(part, start[1:], limit[1:], strides[1:]) for part in chosen)
    if name == "broadcast_in_dim" and params["broadcast_dimensions"] and params["broadcast_dimensions"][0] == 0:
        inner = tuple(d - 1 for d in params["broadcast_dimensions"][1:])
        parts = [jax.lax.broadcast_in_dim(part, shape[1:], inner) for part in x]
        return Tasks(parts * (shape[0] // size))
    if name == "concatenate" and params["dimension"] == 0:
        return Tasks(part for value in values for part in value)
    return None


def _reduced_together(parts: Tasks, combine: Callable, start: float) -> list[Array]:
    """Reduces every part to a number in one loop, so that what the parts have in common is computed once."""
    kind = parts[0].dtype
    if jnp.issubdtype(kind, jnp.integer) and start:
        start = jnp.iinfo(kind).min if start < 0 else jnp.iinfo(kind).max
    each = lambda a, b: tuple(combine(p, q) for p, q in zip(a, b, strict=True))
    starts = (jnp.asarray(start, kind),) * len(parts)
    return list(jax.lax.reduce(tuple(parts), starts, each, range(parts[0].ndim)))


def _part(value: Any, shape: tuple, task: int, ndim: int) -> Any:
    """What task `task` sees of an operand that broadcasts against `ndim` axes."""
    if len(shape) < ndim:
        return value
    return value[task if shape[0] > 1 else 0]


def _fold(combine: Callable, parts: list[Array]) -> Array:
    total = parts[0]
    for part in parts[1:]:
        total = combine(total, part)
    return total
