"""Adaptive merging on many devices: rows of a batch over one axis of a mesh, large arrays over another.

Methods do not change: weights, task vectors, learnables and batches are placed, and XLA divides the work.

    mesh = make_mesh(data=2, model=4)
    problem = problem._replace(theta0=sharded(problem.theta0, mesh), tau=sharded(problem.tau, mesh))
    adamerging(problem, rows, loop=Loop(place=placement(mesh)))

A task vector is divided as its weight is, and never by task: merging stays local, and what devices exchange for the
coefficients is one sum of ``[G, T]`` numbers. (CPU devices, which take vectors flat, exchange a layer of them.)
"""

import math
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from taskvec.adaptive.fit import Placement
from taskvec.tree import Tree

SMALL = 2**14  # arrays of fewer entries are copied to every device


def make_mesh(data: int, model: int) -> Mesh:
    """A mesh of ``data * model`` devices in which XLA works out shardings by itself."""
    automatic = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((data, model), ("data", "model"), axis_types=automatic)


def sharded(tree: Tree, mesh: Mesh, axis: str = "model") -> Tree:
    """Arrays divided over one axis of a mesh along their longest dimension that it divides; others are copied.

    Of equally long dimensions the last, so that weights ``[L, in, out]`` and task vectors ``[L, T, in, out]`` agree.
    """
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, _spec(x.shape, mesh, axis))), tree)


def _spec(shape: tuple[int, ...], mesh: Mesh, axis: str) -> PartitionSpec:
    size = mesh.shape[axis]
    fitting = [(n, i) for i, n in enumerate(shape) if n % size == 0]
    if not fitting or math.prod(shape) < SMALL:
        return PartitionSpec()
    _, at = max(fitting)
    return PartitionSpec(*(axis if i == at else None for i in range(len(shape))))


def placement(mesh: Mesh, data: str = "data", model: str = "model") -> Placement:
    """For `fit.Loop`: batches divided by rows over the axis `data`, learnables and optimiser as `sharded` over `model`.

    Arrays of a batch whose rows the axis does not divide are copied to all of it.
    """

    def batches(stacked: Any) -> Any:
        def one(x):
            divides = x.ndim > 1 and x.shape[1] % mesh.shape[data] == 0
            return jax.device_put(x, NamedSharding(mesh, PartitionSpec(None, data) if divides else PartitionSpec()))

        return jax.tree.map(one, stacked)

    return Placement(batches, lambda state: sharded(state, mesh, model))
