"""Oracles of the methods that came first: arithmetic, TIES, DARE, Breadcrumbs, LiNeS, Consensus."""

import numpy as np

import taskvec as tv
from taskvec import tree as trees

CASES = {
    "weight_average": [{}],
    "task_arithmetic": [{}, {"scale": 0.7, "weights": (0.5, -1.0, 2.0)}],
    "task_negation": [{}],
    "task_analogy": [{"scale": 0.5}],
    "ties": [
        {},
        {"density": 0.05, "aggregate": "sum", "scale": 0.3},
        {"aggregate": "max"},
        {"density": 0.9, "rule": "released", "zero": "majority"},
        {"density": 0.3, "scope": "tensor", "zero": "positive"},
    ],
    "dare": [{}, {"density": 0.8}, {"density": 0.5, "rescale": "none", "seed": 3}, {"rescale": "l1", "scale": 1.0}],
    "dare_ties": [
        {"density": 0.5},
        {"density": 0.5, "rescale": "none", "trim_density": 0.2, "aggregate": "max"},
        {"density": 0.4, "rescale": "l1", "trim_density": 0.3, "aggregate": "sum", "seed": 2},
    ],
    "breadcrumbs": [{}, {"axis": "row"}, {"density": 0.3, "gamma": 0.2}],
    "lines": [{}, {"scale": 0.9}],
    "lines_ties": [{}, {"scale": 0.8, "density": 0.5, "aggregate": "mean"}],
    "consensus_ta": [{}, {"threshold": 0.2, "at_least": 1}, {"at_least": 3}],
    "consensus_ties": [{}, {"density": 0.5, "scale": 0.8, "threshold": (0.2, 0.6, 0.3), "at_least": 1}],
}
EXPERT = {
    "weight_average": {},
    "task_arithmetic": {"scale": 1.0},
    "task_negation": None,
    "task_analogy": None,
    "ties": {"density": 1.0},
    "dare": {"density": 1.0, "scale": 1.0},
    "dare_ties": {"density": 1.0},
    "breadcrumbs": {"density": 1.0, "gamma": 0.0, "scale": 1.0},
    "lines": None,
    "lines_ties": None,
    "consensus_ta": {"scale": 1.0, "threshold": 1e-6, "at_least": 1},
    "consensus_ties": {"density": 1.0, "scale": 1.0, "threshold": 1e-6, "at_least": 1},
}


def _drop_masks(pretrained, finetuned, settings):
    """The masks that a drop of this density and seed draws, found by dropping a vector of ones."""
    flat = trees.unstack_layers(pretrained)
    ones = trees.map_with_path(lambda p, x: np.ones((len(finetuned), *x.shape), np.float32), flat)
    drop = tv.drop(settings.get("density", 0.1), rescale="none", seed=settings.get("seed", 0))
    dropped = tv.transform_task_vectors(drop, flat, ones)
    return {"masks": {k: np.asarray(v) != 0 for k, v in trees.flatten(dropped).items()}}


RANDOM = {"dare": _drop_masks, "dare_ties": _drop_masks}


def _flat(taus, t):
    return np.concatenate([np.abs(x[t]).ravel() for x in taus.values()])


def _trim(taus, density, scope="model", rule="paper"):
    if scope == "tensor":
        return {k: _trim({k: x}, density, "model", rule)[k] for k, x in taus.items()}
    out = {k: x.copy() for k, x in taus.items()}
    for t in range(len(next(iter(taus.values())))):
        ordered = np.sort(_flat(taus, t))
        n, kept = len(ordered), int(density * len(ordered))
        # The released code takes torch.kthvalue(n - kept), which counts from 1; at least one entry is kept.
        threshold = ordered[n - kept - 1] if rule == "released" else ordered[n - max(kept, 1)]
        for x in out.values():
            x[t] = np.where(np.abs(x[t]) >= threshold, x[t], 0)
    return out


def _elect(taus, zero="zero"):
    signs = {k: np.sign(x.sum(0)) for k, x in taus.items()}
    if zero == "zero":
        return {k: np.where(np.sign(x) == signs[k], x, 0) for k, x in taus.items()}
    instead = np.sign(sum(sign.sum() for sign in signs.values())) if zero == "majority" else 1
    signs = {k: np.where(sign == 0, instead, sign) for k, sign in signs.items()}
    # As the released code chooses: what is not positive keeps the negative entries.
    return {k: np.where(np.where(signs[k] > 0, x > 0, x < 0), x, 0) for k, x in taus.items()}


def _reduced(kept, scale, aggregate):
    if aggregate == "sum":
        return {k: scale * x.sum(0) for k, x in kept.items()}
    if aggregate == "max":
        pick = lambda x: np.where(x.max(0) >= -x.min(0), x.max(0), x.min(0))
        return {k: scale * pick(x) for k, x in kept.items()}
    return {k: scale * x.sum(0) / np.maximum((x != 0).sum(0), 1) for k, x in kept.items()}


def weight_average(taus, depths):
    return {k: x.mean(0) for k, x in taus.items()}


def task_arithmetic(taus, depths, scale=0.3, weights=None):
    w = np.ones(99) if weights is None else np.asarray(weights)
    return {k: scale * sum(w[t] * x[t] for t in range(len(x))) for k, x in taus.items()}


def task_negation(taus, depths, scale=1.0):
    return {k: -scale * x.sum(0) for k, x in taus.items()}


def task_analogy(taus, depths, scale=1.0):
    return {k: scale * (x[2] + x[1] - x[0]) for k, x in taus.items()}


def ties(taus, depths, density=0.2, scale=1.0, aggregate="mean", scope="model", rule="paper", zero="zero"):
    return _reduced(_elect(_trim(taus, density, scope, rule), zero), scale, aggregate)


def breadcrumbs(taus, depths, density=0.14, gamma=0.01, scale=0.3, axis="tensor"):
    def one(x):
        if x.ndim == 0:
            return x
        rows = x.reshape(1, -1) if axis == "tensor" else x.reshape(-1, x.shape[-1])
        out = np.zeros_like(rows)
        for i, row in enumerate(rows):
            ordered = np.sort(np.abs(row))[::-1]
            top = int(gamma * len(row))
            kept = ordered[top : top + max(int(density * len(row)), 1)]
            between = (np.abs(row) <= kept[0]) & (np.abs(row) >= kept[-1])
            out[i] = row * between
        return out.reshape(x.shape)

    return {k: scale * sum(one(x[t]) for t in range(len(x))) for k, x in taus.items()}


def _lines(merged, taus, depths, scale):
    tasks = len(next(iter(taus.values())))
    l1 = lambda vectors: sum(np.abs(v).sum() for v in vectors)
    alpha = l1([x.sum(0) for x in taus.values()]) / l1(merged.values()) / tasks
    blocks = max(d for d in depths.values() if d is not None) + 1
    factor = lambda d: alpha if d is None else alpha + scale * d / (blocks - 1)
    return {k: factor(depths[k]) * x for k, x in merged.items()}


def lines(taus, depths, scale=0.3):
    return _lines({k: x.sum(0) for k, x in taus.items()}, taus, depths, scale)


def lines_ties(taus, depths, scale=0.3, density=0.2, aggregate="sum"):
    return _lines(ties(taus, depths, density, 1.0, aggregate), taus, depths, scale)


def _consensus(merged, taus, scale, threshold, at_least):
    out = {}
    for k, x in taus.items():
        above = np.broadcast_to(threshold, len(x))
        count = sum((np.abs(x[t]) > above[t] * np.abs(merged[k] - x[t])).astype(int) for t in range(len(x)))
        out[k] = scale * merged[k] * (count >= at_least)
    return out


def consensus_ta(taus, depths, scale=0.3, threshold=0.4, at_least=2):
    return _consensus({k: x.sum(0) for k, x in taus.items()}, taus, scale, threshold, at_least)


def consensus_ties(taus, depths, density=0.2, scale=0.3, threshold=0.4, at_least=2):
    return _consensus(ties(taus, depths, density, 1.0, "sum"), taus, scale, threshold, at_least)


def _drop(taus, masks, density, rescale):
    out = {}
    for k, x in taus.items():
        out[k] = x * masks[k] / (density if rescale == "inverse_density" else 1)
        if rescale == "l1":
            lengths = [np.abs(v).reshape(len(v), -1).sum(1) for v in (x, out[k])]
            factor = np.where(lengths[1] > 0, lengths[0] / np.where(lengths[1] > 0, lengths[1], 1), 1)
            out[k] = out[k] * factor.reshape(-1, *[1] * (x.ndim - 1))
    return out


def dare(taus, depths, masks, density=0.1, scale=0.3, rescale="inverse_density", seed=0):
    return {k: scale * x.sum(0) for k, x in _drop(taus, masks, density, rescale).items()}


def dare_ties(
    taus,
    depths,
    masks,
    density=0.1,
    scale=1.0,
    trim_density=1.0,
    aggregate="mean",
    rescale="inverse_density",
    seed=0,
):
    return ties(_drop(taus, masks, density, rescale), depths, trim_density, scale, aggregate)
