"""Oracles of TALL-masks and EMR: lists of one dict of vectors for each task."""

import numpy as np

from tests.merging.oracles.basic import ties

CASES = {
    "tall_masks": [{}, {"threshold": 0.2}, {"threshold": (0.2, 0.5, 0.4)}, {"threshold": [0.5]}],
    "tall_masks_ties": [{}, {"density": 0.5, "threshold": (0.5, 0.2, 0.4), "aggregate": "mean", "rule": "released"}],
    "emr": [{}, {"rescale": "released"}, {"rescale": "none"}],
}
EXPERT = {"tall_masks": {}, "tall_masks_ties": {"density": 1.0}, "emr": {}}


def _masked(merged, taus, threshold):
    tasks = len(next(iter(taus.values())))
    given = list(threshold) if isinstance(threshold, tuple | list) else [threshold]
    thresholds = given * (tasks // len(given))
    results = []
    for t in range(tasks):
        needs = lambda k, t=t: np.abs(taus[k][t]) > thresholds[t] * np.abs(merged[k] - taus[k][t])
        results.append({k: np.where(needs(k), merged[k], 0.0) for k in taus})
    return results


def tall_masks(taus, depths, threshold=0.4):
    return _masked({k: x.sum(0) for k, x in taus.items()}, taus, threshold)


def tall_masks_ties(taus, depths, density=0.2, threshold=0.4, aggregate="sum", rule="paper"):
    return _masked(ties(taus, depths, density, 1.0, aggregate, rule=rule), taus, threshold)


def emr(taus, depths, rescale="paper"):
    tasks = len(next(iter(taus.values())))
    unified, masks = {}, {}
    for k, x in taus.items():
        sign = np.where(x.mean(0) > 0, 1, -1)
        masks[k] = x * sign > 0
        unified[k] = sign * np.abs(x * masks[k]).max(0)
    results = []
    for t in range(tasks):
        if rescale == "paper":
            own = sum(np.abs(x[t]).sum() for x in taus.values())
            kept = sum(np.abs(masks[k][t] * unified[k]).sum() for k in taus)
        else:
            own = sum(np.abs(x[t]).mean() for x in taus.values())
            kept = sum(np.abs(masks[k][t] * unified[k]).mean() for k in taus)
        factor = 1.0 if rescale == "none" else own / kept
        results.append({k: factor * masks[k][t] * unified[k] for k in taus})
    return results
