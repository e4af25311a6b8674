"""Oracles of the sparse and signed methods: pruning, DELLA, PCB, CABS, MagMax, SCE, RAM, LT-SFT."""

import math

import numpy as np

import taskvec as tv
from taskvec import tree as trees

CASES = {
    "magnitude_pruning": [{}, {"density": 0.3, "scope": "model", "weights": (1.0, -0.5, 2.0)}],
    "della": [
        {},
        {"rescale": "l1", "zero": "positive", "weights": (0.5, 1.0, 0.25), "seed": 3},
        {"election": "none", "axis": -2, "rescale": "none"},
        {"election": "none", "weights": (0.5, 1.0, 0.25), "density": 0.5, "window": 0.9, "axis": "tensor"},
        {"election": "none", "aggregate": "sum", "axis": 1, "rescale": "l1"},
    ],
    "pcb": [
        {},
        {"density": 0.5, "weights": (0.8, 1.1, 1.3)},
        {"variant": "released"},
        {"variant": "released_vision", "density": 0.05},
        {"variant": "released_search", "density": 0.3},
    ],
    "cabs": [
        {},
        {"n": 1, "m": 4, "leftover": "drop", "blocks": "tensor", "weights": (0.5, 0.4, 0.3)},
        {"n": 2, "m": 3},
        {"n": 2, "m": 4, "overlap": "half", "blocks": "tensor"},
    ],
    "magmax": [{}],
    "sce": [
        {},
        {"density": 0.4},
        {"density": 0.4, "mixed": "all", "normalize": False},
        {"density": 0.01, "guards": "mergekit"},
    ],
    "ram": [{}, {"threshold": 0.04}],
    "ram_plus": [{}, {"threshold": 0.04}, {"threshold": 0.06, "r": 0.5, "alpha": 2.0, "scope": "tensor"}],
    "lt_sft": [{}, {"density": 0.08}],
}
EXPERT = {
    "magnitude_pruning": {"density": 1.0, "scale": 1.0},
    "della": {"density": 1.0, "scale": 1.0},
    "pcb": {"density": 1.0, "scale": 1.0},
    "cabs": {"n": 32},
    "magmax": {"scale": 1.0},
    "sce": {},
    "ram": {"threshold": 0.0},
    "ram_plus": {"threshold": 0.0},
    "lt_sft": {},
}


def _uniform(pretrained, finetuned, settings):
    """The random numbers that a leaf gives for a seed."""
    flat = trees.unstack_layers(pretrained)
    tau = trees.map_with_path(lambda p, x: np.ones((len(finetuned), *x.shape), np.float32), flat)
    draw = tv.transforms.Transform("draw", lambda x, leaf, stats: leaf.uniform(settings.get("seed", 0)))
    drawn = tv.transform_task_vectors(draw, flat, tau)
    return {"uniform": {k: np.asarray(v) for k, v in trees.flatten(drawn).items()}}


RANDOM = {"della": _uniform}


def _tasks(taus):
    return range(len(next(iter(taus.values()))))


def _whole(taus):
    """``[T, n]`` and the function that cuts a ``[n]`` or ``[T, n]`` back into tensors."""
    flat = np.concatenate([x.reshape(len(x), -1) for x in taus.values()], axis=1)

    def back(v):
        out, at = {}, 0
        for k, x in taus.items():
            size = x[0].size
            out[k] = v[..., at : at + size].reshape(v.shape[:-1] + x.shape[1:])
            at += size
        return out

    return flat, back


def _keep_largest(row, density):
    kept = max(int(density * row.size), 1)
    return np.where(np.abs(row) >= np.sort(np.abs(row).ravel())[row.size - kept], row, 0)


def magnitude_pruning(taus, depths, density=0.1, scale=0.3, scope="tensor", weights=None):
    w = weights or (1,) * len(_tasks(taus))
    if scope == "model":
        flat, back = _whole(taus)
        return back(scale * sum(w[t] * _keep_largest(flat[t], density) for t in _tasks(taus)))
    return {k: scale * sum(w[t] * _keep_largest(x[t], density) for t in _tasks(taus)) for k, x in taus.items()}


def lt_sft(taus, depths, density=1.0):
    return magnitude_pruning(taus, depths, density, 1.0, "model")


def _rows(x, axis):
    """``[rows, n]``, and the way back."""
    if axis == "tensor" or not -x.ndim <= axis < x.ndim:
        return x.reshape(1, -1), lambda rows: rows.reshape(x.shape)
    moved = np.moveaxis(x, axis, -1)
    return moved.reshape(-1, x.shape[axis]), lambda rows: np.moveaxis(rows.reshape(moved.shape), -1, axis)


def _keep_probability(x, density, window, axis):
    """Of one task's tensor."""
    rows, back = _rows(x, axis)
    p = np.zeros(rows.shape)
    for i, row in enumerate(np.abs(rows)):
        for rank, at in enumerate(np.argsort(row, kind="stable")):
            p[i, at] = density + window * (rank / (row.size - 1) - 0.5 if row.size > 1 else 0)
    return back(p)


def _kept(x, u, density, window, axis):
    """Which entries stay, where equal magnitudes share their ranks: then the fraction of the number drawn decides."""
    (rows, back), (draws, _) = _rows(np.abs(np.float32(x)), axis), _rows(u.astype(np.float64), axis)
    n, out = rows.shape[1], np.zeros(rows.shape, bool)
    if n == 1:
        return back(draws < density)
    for (i, j), value in np.ndenumerate(rows):
        t = (draws[i, j] - (density - window / 2)) * (n - 1) / window  # the number drawn, as a rank from 0
        below, equal = (rows[i] < value).sum(), (rows[i] == value).sum()
        nearest = np.clip(np.round(t), 0, n - 1)
        out[i, j] = nearest < below or (nearest < below + equal and t < nearest)
    return back(out)


def della(
    taus,
    depths,
    uniform,
    density=0.7,
    window=0.14,
    scale=1.1,
    election="sum",
    aggregate="mean",
    zero="zero",
    rescale="inverse_probability",
    axis=-1,
    seed=0,
    weights=None,
):
    w, out = np.array(weights or (1.0,) * len(_tasks(taus))), {}
    for k, x in taus.items():
        kept = np.zeros_like(x)
        for t in _tasks(taus):
            p = _keep_probability(x[t], density, window, axis)
            mask = uniform[k][t] < p
            if rescale != "inverse_probability":
                mask = _kept(x[t], uniform[k][t], density, window, axis)
            kept[t] = mask * x[t] / (p if rescale == "inverse_probability" else 1)
            if rescale == "l1" and np.abs(kept[t]).sum() > 0:
                kept[t] = kept[t] * (np.abs(x[t]).sum() / np.abs(kept[t]).sum())
            kept[t] = kept[t] * w[t]
        if election == "sum":
            sign = np.sign(kept.sum(0))
            if zero == "positive":
                sign = np.where(sign == 0, 1, sign)
            kept = np.where(np.sign(kept) == sign, kept, 0)
            divisor = np.tensordot(w, (kept != 0).astype(float), 1)
        else:
            divisor = np.full(x.shape[1:], w.sum())
        total = kept.sum(0)
        out[k] = scale * (total if aggregate == "sum" else total / np.where(divisor == 0, 1, divisor))
    return out


def _min_max(v):
    low, high = v.min(-1, keepdims=True), v.max(-1, keepdims=True)
    return (v - low) / (high - low)


def _softmax(v):
    e = np.exp(v - v.max())
    return e / e.sum()


def pcb(taus, depths, density=0.1, scale=1.2, variant="paper", weights=None):
    x, back = _whole(taus)
    tasks, n = x.shape
    share = np.zeros_like(x)
    if variant == "paper":
        for t in range(tasks):
            intra = _softmax(tasks * _min_max(x[t] ** 2))
            claim = intra * sum(_softmax(_min_max(x[t] * x[k])) for k in range(tasks))
            share[t] = np.where(claim >= np.sort(claim)[int(n * (1 - density))], claim, 0)
    else:
        edge = {"released": 1e-4, "released_vision": 0.01, "released_search": 0.01}[variant]
        ordered = np.sort(np.abs(x), axis=1)
        magnitude = np.clip(np.abs(x), ordered[:, [int(n * edge)]], ordered[:, [int(n * (1 - edge) - 1)]])
        signed, before = np.sign(x) * _min_max(magnitude), x
        inter = {
            "released": lambda t: np.tanh(before[t] * before.sum(0)),
            "released_vision": lambda t: np.tanh(before[t] * signed.sum(0)),
            "released_search": lambda t: sum(np.tanh(signed[t] * signed[k]) for k in range(tasks)),
        }[variant]
        for t in range(tasks):
            claim = np.exp(tasks * _min_max(magnitude[t]) ** 2) * inter(t)
            ordered_claims = np.sort(claim)
            share[t] = _min_max(np.clip(claim, ordered_claims[int(n * (1 - density))], ordered_claims[-1]))
        x = np.sign(x) * magnitude
    w = np.array(weights or (1.0,) * tasks)[:, None]
    total = share.sum(0)
    return back(scale * (w * x * share).sum(0) / np.where(total > 0, total, 1))


def _take_blocks(rows, n, m, leftover, overlap):
    """``[T, length]``: the tasks one after the other."""
    out, taken = np.zeros_like(rows), np.zeros(rows.shape[1], bool)
    largest = lambda v, count: np.array([i for i in np.argsort(-np.abs(v), kind="stable")[:count] if v[i] != 0], int)
    for t, row in enumerate(rows):
        for start in range(0, len(row), m):
            block = slice(start, min(start + m, len(row)))
            if leftover == "drop" and start + m > len(row):
                continue
            was = taken[block].copy()
            chosen = largest(np.where(was, 0, row[block]), n)
            if overlap == "half" and n >= m / 2 and was.any():
                chosen = np.union1d(np.flatnonzero(~was), largest(np.where(was, row[block], 0), m // 2))
            out[t, start + chosen] = row[start + chosen]
            taken[start + chosen] = True
    return out


def cabs(taus, depths, n=3, m=32, leftover="short", blocks="row", overlap="none", weights=None):
    w, out = weights or (1.0,) * len(_tasks(taus)), {}
    for k, x in taus.items():
        rows = x.shape[1] if blocks == "row" and x.ndim > 2 else 1
        flat = x.reshape(len(x), rows, -1)
        kept = np.stack([_take_blocks(flat[:, i], n, m, leftover, overlap) for i in range(rows)], axis=1)
        out[k] = sum(w[t] * kept[t] for t in _tasks(taus)).reshape(x.shape[1:])
    return out


def magmax(taus, depths, scale=0.5):
    out = {}
    for k, x in taus.items():
        best = np.zeros_like(x[0])
        for x_t in x:
            best = np.where(np.abs(x_t) >= np.abs(best), x_t, best)
        out[k] = scale * best
    return out


def sce(taus, depths, density=1.0, normalize=True, mixed="selected", guards="none"):
    out = {}
    for k, x in taus.items():
        chosen = x
        if density < 1:
            # Times T^2; exact for the tensor whose entries are multiples of 1/64, so that ties stay ties.
            variance = np.asarray(len(x) * (x**2).sum(0) - x.sum(0) ** 2)
            variance = np.where((x == x[0]).all(0), 0, variance)
            count = int(density * np.count_nonzero(variance))
            threshold = np.sort(variance.ravel())[-count] if count else math.inf
            chosen = np.where(variance >= threshold * (1 - 1e-9), x, 0)
        energy = np.array([(c**2).mean() for c in chosen])
        few = energy.sum() < 1e-6 if guards == "mergekit" else energy.sum() == 0
        w = np.full(len(x), 1 / len(x)) if few else energy / energy.sum()
        merged = chosen if mixed == "selected" else x
        sign = np.where(merged.sum(0) >= 0, 1, -1)
        agree = np.sign(merged) == sign
        total, left = np.tensordot(w, merged * agree, 1), np.tensordot(w, agree.astype(float), 1)
        if normalize:
            total = total / np.maximum(left, 1e-6) if guards == "mergekit" else total / np.where(left > 0, left, 1)
        out[k] = total
    return out


def ram_plus(taus, depths, threshold=1e-5, r=0.1, alpha=0.2, scope="model"):
    changed = {k: np.abs(x) > threshold for k, x in taus.items()}
    count = {k: c.sum(0) for k, c in changed.items()}
    out = {}
    for k, x in taus.items():
        total = np.zeros(x.shape[1:])
        for t in _tasks(taus):
            names = [k] if scope == "tensor" else list(taus)
            shared = sum((changed[name][t] & (count[name] > 1)).sum() for name in names)
            unique = sum((changed[name][t] & (count[name] == 1)).sum() for name in names)
            factor = 1 + r * min(shared / unique if unique else math.inf, alpha)
            own = np.where(changed[k][t], x[t], 0)
            total += np.where(count[k] == 1, factor * own, own / np.maximum(count[k], 1))
        out[k] = total
    return out


def ram(taus, depths, threshold=1e-5):
    return ram_plus(taus, depths, threshold, r=0.0)
