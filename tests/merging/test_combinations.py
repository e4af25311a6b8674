"""Chains that users would write: every one against NumPy, and the same in memory, jitted and streamed by rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import taskvec as tv
from taskvec import tree as trees, vectors
from taskvec.merging import merge_streamed
from tests.merging.battery import ArrayReader, assert_close
from tests.merging.oracles import basic, geometry, sparse, spectral
from tests.models_for_tests import random_models

TASKS = 3


def _total(vectors, factor=1.0):
    return {k: factor * x.sum(0) for k, x in vectors.items()}


def _lines_on(merged, taus, depths, beta):
    return basic._lines(merged, taus, depths, beta)


def _l1_restored(taus, kept):
    norm = lambda x: np.abs(x).sum(tuple(range(1, x.ndim)), keepdims=True)
    return {
        k: kept[k] * np.where(norm(kept[k]) > 0, norm(x) / np.maximum(norm(kept[k]), 1e-300), 1)
        for k, x in taus.items()
    }


def _trim_each(x, density):
    """The largest magnitudes of each task's part of one tensor, at least one."""
    out = np.zeros_like(x)
    for t in range(len(x)):
        ordered = np.sort(np.abs(x[t]).ravel())
        out[t] = np.where(np.abs(x[t]) >= ordered[-max(int(density * ordered.size), 1)], x[t], 0)
    return out


def _crumbs(x):
    return np.stack([basic.breadcrumbs({"x": x[t : t + 1]}, None, 0.5, 0.1, 1.0)["x"] for t in range(TASKS)])


def _dropped(taus, density, seed):
    """The masks depend on names and shapes alone."""
    like = trees.unflatten({k: jnp.zeros(x.shape[1:]) for k, x in taus.items()})
    masks = basic._drop_masks(like, [like] * TASKS, {"density": density, "seed": seed})["masks"]
    return {k: x * masks[k] / density for k, x in taus.items()}


# name -> (chain, oracle of (taus, depths))
COMBINATIONS = {
    "consensus on ties": (
        tv.chain(tv.trim(0.3), tv.elect_signs(), tv.disjoint_mean(), tv.consensus(0.4, 2), tv.scale(0.7)),
        lambda taus, depths: basic._consensus(basic.ties(taus, depths, 0.3), taus, 0.7, 0.4, 2),
    ),
    "lines after tsv": (
        tv.chain(tv.merge_singular_vectors(), tv.scale_by_depth(0.5)),
        lambda taus, depths: _lines_on(spectral.tsv_m(taus, depths), taus, depths, 0.5),
    ),
    "lines after iso_c": (
        tv.chain(tv.flatten_spectrum(), tv.scale_by_depth(0.5, alpha=0.2)),
        lambda taus, depths: {
            k: x * (0.2 + 0.5 * (depths[k] or 0) / 2) for k, x in spectral.iso_c(taus, depths).items()
        },
    ),
    "trim then tsv": (
        tv.chain(tv.trim(0.6), tv.merge_singular_vectors(), tv.scale(0.5)),
        lambda taus, depths: spectral.tsv_m(basic._trim(taus, 0.6), depths, 0.5),
    ),
    "trim, elect, magmax": (
        tv.chain(tv.trim(0.5), tv.elect_signs(), tv.largest_change()),
        lambda taus, depths: sparse.magmax(basic._elect(basic._trim(taus, 0.5)), depths, scale=1.0),
    ),
    "crumbs then ties": (
        tv.chain(tv.crumbs(0.5, 0.1), tv.elect_signs(), tv.disjoint_mean()),
        lambda taus, depths: basic.ties({k: _crumbs(x) for k, x in taus.items()}, depths, 1.0),
    ),
    "trim restoring norms, weighed": (
        tv.chain(tv.trim(0.4, scope="tensor", rescale="l1"), tv.weigh((0.2, -0.5, 1.0)), tv.sum_tasks()),
        lambda taus, depths: {
            k: sum(w * x[t] for t, w in enumerate((0.2, -0.5, 1.0)))
            for k, x in _l1_restored(taus, {k: _trim_each(x, 0.4) for k, x in taus.items()}).items()
        },
    ),
    "two masks": (
        tv.chain(tv.trim(0.8), tv.trim(0.5), tv.mean_tasks()),
        lambda taus, depths: basic.weight_average(basic._trim(basic._trim(taus, 0.8), 0.5), depths),
    ),
    "consensus twice": (
        tv.chain(tv.sum_tasks(), tv.consensus(0.3, 2), tv.consensus(0.6, 1)),
        lambda taus, depths: basic._consensus(basic._consensus(_total(taus), taus, 1.0, 0.3, 2), taus, 1.0, 0.6, 1),
    ),
    "scaled, lines, scaled": (
        tv.chain(tv.scale(2.0), tv.sum_tasks(), tv.scale_by_depth(0.5, 0.1), tv.scale(-1.0)),
        lambda taus, depths: {k: -2 * x.sum(0) * (0.1 + 0.5 * (depths[k] or 0) / 2) for k, x in taus.items()},
    ),
    "masks on lines": (
        tv.chain(tv.sum_tasks(), tv.scale_by_depth(0.5), tv.consensus(0.4, 1)),
        lambda taus, depths: basic._consensus(_lines_on(_total(taus), taus, depths, 0.5), taus, 1.0, 0.4, 1),
    ),
    "dare + model stock": (
        tv.chain(tv.drop(0.5, seed=3), tv.model_stock()),
        lambda taus, depths: geometry.model_stock(_dropped(taus, 0.5, 3), depths),
    ),
    "layers chosen by depth, then ties": (
        tv.chain(tv.scale_by_depth(1.0, alpha=0.0), tv.trim(0.3), tv.elect_signs(), tv.disjoint_mean()),
        lambda taus, depths: basic.ties({k: x * (depths[k] or 0) / 2 for k, x in taus.items()}, depths, 0.3),
    ),
    "nested chains": (
        tv.chain(tv.chain(tv.trim(0.3), tv.elect_signs()), tv.chain(tv.sum_tasks(), tv.scale(0.3))),
        lambda taus, depths: basic.ties(taus, depths, 0.3, 0.3, "sum"),
    ),
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_combination(name):
    transform, oracle = COMBINATIONS[name]
    pretrained, finetuned = random_models(11, TASKS)
    pretrained, finetuned = trees.unstack_layers(pretrained), [trees.unstack_layers(f) for f in finetuned]
    merged = tv.merge(transform, pretrained, finetuned)

    flat, flats = trees.flatten(merged), [trees.flatten(f) for f in finetuned]
    base = {k: np.asarray(x, np.float64) for k, x in trees.flatten(pretrained).items() if trees.is_float(x)}
    taus = {k: np.stack([np.asarray(f[k], np.float64) - x for f in flats]) for k, x in base.items()}
    depths = {k: trees.depth(k) for k in base}
    for k, x in oracle(taus, depths).items():
        np.testing.assert_allclose(np.asarray(flat[k], np.float64) - base[k], x, atol=3e-6, err_msg=f"{name} {k}")

    tau = tv.task_vectors(pretrained, finetuned)
    jitted = jax.jit(lambda theta0, tau: tv.transform_task_vectors(transform, theta0, tau))(pretrained, tau)
    assert_close(vectors.apply(pretrained, jitted), merged)

    readers, out = [ArrayReader(trees.flatten(m)) for m in (pretrained, *finetuned)], {}
    by_rows = all(stage.by_rows for stage in transform.stages)
    write = lambda path, x, rows: out.setdefault(path, []).append(np.asarray(x))
    merge_streamed(transform, readers[0], readers[1:], write, memory=30_000 if by_rows else 1 << 30)
    whole = {path: jnp.asarray(parts[0] if len(parts) == 1 else np.concatenate(parts)) for path, parts in out.items()}
    assert_close(trees.unflatten(whole), merged)
