"""Oracles of averages, norm weights, chosen experts, layer swapping and LiNeS' edit."""

import numpy as np

CASES = {
    "checkpoint_average": [{}],
    "run_average": [{}],
    "metagpt": [{}],
    "elm": [{}, {"select": (2, 0)}, {"select": [1]}],
    "culturemert": [{}, {"scale": 0.5, "weights": (1.0, 2.0, 0.0)}],
    "layer_swapping": [
        {},
        {"bottom": 1, "top": 0, "transition": 0},
        {"bottom": 0, "top": 1, "transition": 1, "weight": 0.25, "outside": "task"},
        {"bottom": 1, "top": 1, "transition": 0, "outside": "mean"},
    ],
    "coefficients": [
        {},
        {"rest": 0.4},
        {"table": [["blocks/1/mlp/down", [0.5, -1.0, 0.2]], ["stem/conv", (0.0, 0.0, 2.0)]], "rest": 0.1},
    ],
    "lines_edit": [{}, {"alpha": 0.5, "scale": 0.7}, {"alpha": 1.0}],
}
EXPERT = {
    "checkpoint_average": {},
    "run_average": {},
    "metagpt": {},
    "elm": {},
    "culturemert": {"scale": 1.0},
    "layer_swapping": None,
    "coefficients": {"rest": 1.0},
    "lines_edit": {"alpha": 1.0},
}


def checkpoint_average(taus, depths, base):
    """Of the weights themselves, as in the paper."""
    return {k: np.mean([base[k] + x[t] for t in range(len(x))], 0) - base[k] for k, x in taus.items()}


run_average = checkpoint_average


def _squared_norms(taus):
    tasks = len(next(iter(taus.values())))
    return [sum((x[t] ** 2).sum() for x in taus.values()) for t in range(tasks)]


def metagpt(taus, depths):
    squares = _squared_norms(taus)
    return {k: sum(n * x[t] for t, n in enumerate(squares)) / sum(squares) for k, x in taus.items()}


def elm(taus, depths, base, select=()):
    chosen = list(select) or range(len(next(iter(taus.values()))))
    return {k: np.mean([base[k] + x[t] for t in chosen], 0) - base[k] for k, x in taus.items()}


def culturemert(taus, depths, scale=0.2, weights=None):
    out = {}
    for k, x in taus.items():
        out[k] = scale * sum((1.0 if weights is None else weights[c]) * x[c] for c in range(len(x)))
    return out


def layer_swapping(taus, depths, bottom=1, top=1, transition=1, weight=0.5, outside="language"):
    """The default fractions give one block each in a model of three blocks."""
    blocks = max(d for d in depths.values() if d is not None) + 1
    language = {"language": 1.0, "task": 0.0, "mean": 0.5}
    zones = []
    for block in range(blocks):
        from_end = blocks - 1 - block
        if block < bottom or from_end < top:
            zones.append(1.0)
        elif block < bottom + transition or from_end < top + transition:
            zones.append(weight)
        else:
            zones.append(0.0)
    share = lambda depth: language[outside] if depth is None else zones[depth]
    return {k: (1 - share(depths[k])) * x[0] + share(depths[k]) * x[1] for k, x in taus.items()}


def lines_edit(taus, depths, alpha=0.1, scale=1.0):
    blocks = max(d for d in depths.values() if d is not None) + 1
    factor = lambda d: alpha if d is None else alpha + (1 - alpha) * d / (blocks - 1)
    return {k: scale * factor(depths[k]) * x.mean(0) for k, x in taus.items()}


def coefficients(taus, depths, table=(), rest=0.0):
    weights = dict(table)
    return {k: sum(w * x[t] for t, w in enumerate(weights.get(k, [rest] * len(x)))) for k, x in taus.items()}
