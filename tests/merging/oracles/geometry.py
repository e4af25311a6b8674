"""Oracles of the geometric methods, in the space of the vectors themselves (the library works on Gram matrices)."""

import numpy as np

CASES = {
    "slerp": [{}, {"t": 0.3}, {"t": 0.9, "linear_above": 0.99999}],
    "nuslerp": [{}, {"weights": (0.7, 0.3)}, {"weights": (0.7, 0.3), "axis": -1}, {"weights": (1.0, 3.0), "axis": 0}],
    "multi_slerp": [{}, {"weights": (0.5, 1.0, 0.25)}, {"weights": (0.5, 1.0, 0.25), "iterations": 1, "scale": 0.5}],
    "karcher": [{}, {"weights": (0.2, 0.5, 0.3)}, {"iterations": 1}],
    "model_stock": [{}, {"axis": -1}, {"clip": True}],
    "nearswap": [{}, {"limit": 0.03}, {"limit": 0.02, "floor": 0.05}],
    "arcee_fusion": [{}, {"spread": 0.5}],
}
EXPERT = {
    "slerp": None,
    "nuslerp": None,
    "multi_slerp": {},
    "karcher": {},
    "model_stock": None,
    "nearswap": {"limit": 1e6},
    "arcee_fusion": None,
}


def _on_circle(a, b, t, linear_above):
    """Two 1-D arrays."""
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    cosine = a @ b / lengths if lengths > 0 else 0.0
    if abs(cosine) > linear_above:
        return (1 - t) * a + t * b
    angle = np.arccos(cosine)
    return np.sin((1 - t) * angle) / np.sin(angle) * a + np.sin(t * angle) / np.sin(angle) * b


def _along(fn, x, axis):
    """Applies ``fn([T, n]) -> [n]`` to whole tensors (``tensor``), to every row (-1) or every column (0)."""
    if axis == "tensor" or x.ndim < 3:
        return fn(x.reshape(len(x), -1)).reshape(x.shape[1:])
    moved = np.moveaxis(x, axis % (x.ndim - 1) + 1, -1)
    lines = moved.reshape(len(x), -1, moved.shape[-1])
    out = np.stack([fn(lines[:, i]) for i in range(lines.shape[1])]).reshape(moved.shape[1:])
    return np.moveaxis(out, -1, axis)


def slerp(taus, depths, base, t=0.5, linear_above=0.9995):
    interpolate = lambda v: _on_circle(v[0], v[1], t, linear_above)
    return {k: _along(interpolate, x + base[k], "tensor") - base[k] for k, x in taus.items()}


def nuslerp(taus, depths, weights=(1.0, 1.0), axis="tensor"):
    t = weights[1] / sum(weights)
    interpolate = lambda v: _on_circle(v[0], v[1], t, 1 - 1e-7)
    return {k: _along(interpolate, x, axis) for k, x in taus.items()}


def _mean(v, weights, iterations, tolerance=0.0):
    """Karcher mean of the rows of ``[T, n]``, by logarithms and exponentials of vectors."""
    weights = np.full(len(v), 1 / len(v)) if weights is None else np.asarray(weights) / np.sum(weights)
    lengths = np.linalg.norm(v, axis=1)
    some = lengths > 0
    if not some.any():
        return np.zeros(v.shape[1])
    units, share = v[some] / lengths[some, None], weights[some] / weights[some].sum()
    m = share @ units
    m = m / np.linalg.norm(m)
    for _ in range(iterations):
        step = np.zeros_like(m)
        for w, u in zip(share, units, strict=True):
            cosine = np.clip(u @ m, -1, 1)
            angle = np.arccos(cosine)
            if 1e-9 < angle < np.pi - 1e-9:
                step += w * angle / np.sin(angle) * (u - cosine * m)
        size = np.linalg.norm(step)
        if size < tolerance:
            break
        if size > 1e-12:
            m = np.cos(size) * m + np.sin(size) / size * step
    return weights @ lengths * m


def multi_slerp(taus, depths, weights=None, iterations=0, scale=1.0):
    return {k: scale * _along(lambda v: _mean(v, weights, iterations), x, "tensor") for k, x in taus.items()}


def karcher(taus, depths, base, weights=None, iterations=10, tolerance=0.0):
    mean = lambda v: _mean(v, weights, iterations, tolerance)
    return {k: _along(mean, x + base[k], "tensor") - base[k] for k, x in taus.items()}


def model_stock(taus, depths, axis="tensor", clip=False):
    def one(v):
        cosines = []
        for i in range(len(v)):
            for j in range(i):
                lengths = np.linalg.norm(v[i]) * np.linalg.norm(v[j])
                cosines.append(v[i] @ v[j] / lengths if lengths > 0 else 0.0)
        cosine = np.mean(cosines)
        t = len(v) * cosine / (1 + (len(v) - 1) * cosine)
        return (np.clip(t, 0, 1) if clip else t) * v.mean(0)

    return {k: _along(one, x, axis) for k, x in taus.items()}


def nearswap(taus, depths, base, limit=1e-4, floor=1e-300):
    out = {}
    for k, x in taus.items():
        a, b = base[k], base[k] + x[0]
        share = np.clip(limit / np.maximum(np.abs(a - b), floor), 0, 1)
        out[k] = share * b + (1 - share) * a - a
    return out


def arcee_fusion(taus, depths, base, spread=1.5):
    def softmax(x):
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    out = {}
    for k, x in taus.items():
        a, b = np.atleast_1d(base[k]), np.atleast_1d(base[k] + x[0])
        p, q = softmax(b), softmax(a)
        importance = np.abs(b - a) * (p * np.log(p / q)).sum(-1, keepdims=True)
        ordered = np.sort(importance.ravel())
        lower, median, upper = (ordered[int(f * (len(ordered) - 1))] for f in (0.25, 0.5, 0.75))
        kept = np.where(importance >= median + spread * (upper - lower) - 1e-15, b - a, 0)
        out[k] = kept.reshape(x.shape[1:])
    return out
