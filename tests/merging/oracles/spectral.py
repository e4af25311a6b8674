"""Oracles of the spectral methods: TSV, Iso, KnOTS, CART, SVC, and compression by SVD."""

import re

import numpy as np

import taskvec as tv
from taskvec import tree as trees

CASES = {
    "tsv_m": [{}, {"solver": "svd"}, {"matrices": "attention"}],
    "tsv_compress": [{}, {"solver": "svd"}],
    "iso_c": [{}, {"scale": 1.5, "solver": "svd"}, {"matrices": "attention"}],
    "iso_cts": [{}, {"scale": 1.5, "common": 0.4}, {"solver": "svd"}, {"matrices": "^(?!.*embed)"}],
    "knots_ties": [{}, {"density": 0.05, "aggregate": "sum", "rule": "released"}, {"density": 1.0, "scale": 1.0}],
    "knots_dare_ties": [{}, {"density": 0.5, "trim_density": 0.5}],
    "cart": [{}, {"density": 0.5, "strength": 0.7}, {"matrices": "attention"}],
    "svc_ta": [{}, {"scale": 1.0, "alpha": 0.1}],
    "twin_compress": [{}, {"density": 0.5, "shared_scale": 0.5}],
    "graft_compress": [{}, {"ranks": (("attention", 3), ("mlp", 0))}, {"ranks": (("", 2),), "solver": "svd"}],
}
EXPERT = {
    "tsv_m": {},
    "tsv_compress": {},
    "iso_c": None,
    "iso_cts": None,
    "knots_ties": {"density": 1.0, "scale": 1.0},
    "knots_dare_ties": {"density": 1.0, "scale": 1.0},
    "cart": {},
    "svc_ta": {"scale": 1.0},
    "twin_compress": {"density": 1.0},
    "graft_compress": {},
}


def _drop_masks(pretrained, finetuned, settings):
    """The masks that a drop draws; for kernels, which are square here, they are those of the coordinates."""
    flat = trees.unstack_layers(pretrained)
    ones = trees.map_with_path(lambda p, x: np.ones((len(finetuned), *x.shape), np.float32), flat)
    dropped = tv.transform_task_vectors(tv.drop(settings.get("density", 0.9), rescale="none"), flat, ones)
    return {"masks": {k: np.asarray(v) != 0 for k, v in trees.flatten(dropped).items()}}


RANDOM = {"knots_dare_ties": _drop_masks}


def _svd(a):
    return np.linalg.svd(a, full_matrices=False)


def _polar(a):
    u, _, vt = _svd(a)
    return u @ vt


def _low_rank(a, rank):
    u, s, vt = _svd(a)
    return u[:, :rank] @ np.diag(s[:rank]) @ vt[:rank]


def _outputs_first(name, x):
    """The layout [out, in], and back."""
    return x.swapaxes(-1, -2) if name.endswith("kernel") else x


def tsv_m(taus, depths, scale=1.0, solver=None, matrices=""):
    def one(name, x):
        tasks = len(x)
        rank = min(x.shape[1:]) // tasks if x.ndim == 3 and matrices in name else 0
        if rank == 0:
            return x.mean(0)
        parts = [_svd(x[t]) for t in range(tasks)]
        u = np.concatenate([p[0][:, :rank] for p in parts], axis=1)
        s = np.concatenate([p[1][:rank] for p in parts])
        vt = np.concatenate([p[2][:rank] for p in parts], axis=0)
        return _polar(u) @ np.diag(s) @ _polar(vt)

    return {k: scale * one(k, x) for k, x in taus.items()}


def tsv_compress(taus, depths, solver=None):
    tasks = len(next(iter(taus.values())))
    rank = lambda x: min(x.shape[1:]) // tasks if x.ndim == 3 else 0
    return [{k: _low_rank(x[t], rank(x)) if rank(x) else x[t] for k, x in taus.items()} for t in range(tasks)]


def iso_c(taus, depths, scale=1.0, solver=None, matrices=""):
    def one(name, x):
        if x.ndim != 3 or matrices not in name:
            return x.mean(0)
        u, s, vt = _svd(x.sum(0))
        return u @ np.diag(np.full(len(s), s.mean())) @ vt

    return {k: scale * one(k, x) for k, x in taus.items()}


def iso_cts(taus, depths, scale=1.0, common=0.8, solver=None, matrices=""):
    def one(name, x):
        if x.ndim != 3 or not re.search(matrices, name):
            return x.mean(0)
        tasks, r = len(x), min(x.shape[1:])
        total = round((r - int(r * common)) / tasks) * tasks
        c, own = r - total, total // tasks
        u, s, vt = (part[..., :c, :] if i == 2 else part[..., :c] for i, part in enumerate(_svd(x.sum(0))))
        us, ss, vts = [], [], []
        for t in range(tasks):
            ut, st, vtt = _svd(x[t] - u @ (u.T @ x[t]))
            us.append(ut[:, :own])
            ss.append(st[:own])
            vts.append(vtt[:own])
        u, s, vt = np.concatenate([*us, u], 1), np.concatenate([*ss, s]), np.concatenate([*vts, vt], 0)
        return _polar(u) @ np.diag(np.full(len(s), s.mean())) @ _polar(vt)

    return {k: scale * _outputs_first(k, one(k, _outputs_first(k, x) if x.ndim == 3 else x)) for k, x in taus.items()}


def _in_basis(taus):
    """Coordinates ``{name: [T, rank, in]}`` and bases; other tensors as they are, with basis ``None``."""
    coordinates, bases = {}, {}
    for k, x in taus.items():
        coordinates[k], bases[k] = x, None
        if x.ndim == 3:
            x = _outputs_first(k, x)
            u, s, vt = _svd(np.concatenate(list(x), axis=1))
            kept = s > 1e-5
            bases[k] = u[:, kept]
            coordinates[k] = np.stack(np.split((s[:, None] * vt)[kept], len(x), axis=1))
    return coordinates, bases


def _ties(x, density, aggregate, rule="paper"):
    """TIES where rows that are zero in all tasks do not count."""
    if density < 1:
        rows = {k: v.reshape(len(v), v.shape[1] if v.ndim > 1 else 1, -1) for k, v in x.items()}
        rows = {k: v[:, (v != 0).any((0, 2))] for k, v in rows.items()}
        x = dict(x)
        for t in range(len(next(iter(x.values())))):
            ordered = np.sort(np.concatenate([np.abs(v[t]).ravel() for v in rows.values()]))[::-1]
            threshold = ordered[round(density * 100) * len(ordered) // 100 - (rule == "paper")]
            for k in x:
                x[k] = np.concatenate([x[k][:t], (x[k][t] * (np.abs(x[k][t]) >= threshold))[None], x[k][t + 1 :]])
    out = {}
    for k, v in x.items():
        v = np.where(np.sign(v) == np.sign(v.sum(0)), v, 0)
        out[k] = v.sum(0) / (np.maximum((v != 0).sum(0), 1) if aggregate == "mean" else 1)
    return out


def _out_of_basis(merged, bases, scale):
    return {k: scale * (v if bases[k] is None else _outputs_first(k, bases[k] @ v)) for k, v in merged.items()}


def knots_ties(taus, depths, density=0.2, scale=0.6, aggregate="mean", rule="paper"):
    coordinates, bases = _in_basis(taus)
    return _out_of_basis(_ties(coordinates, density, aggregate, rule), bases, scale)


def knots_dare_ties(taus, depths, masks, density=0.9, scale=0.7, trim_density=1.0):
    coordinates, bases = _in_basis(taus)
    thin = {k: x * (masks[k][:, : x.shape[1]] if bases[k] is not None else masks[k]) for k, x in coordinates.items()}
    # Signs are not determined by an SVD, but what follows does not depend on them.
    return _out_of_basis(_ties({k: x / density for k, x in thin.items()}, trim_density, "mean"), bases, scale)


def cart(taus, depths, density=0.12, strength=2.0, matrices=""):
    def one(name, x):
        mean = x.mean(0)
        if x.ndim != 3 or matrices not in name:
            return mean
        rank = max(1, int(density * min(x.shape[1:])))
        return mean + strength * sum(_low_rank(x[t] - mean, rank) for t in range(len(x)))

    return {k: one(k, x) for k, x in taus.items()}


def svc_ta(taus, depths, scale=0.3, alpha=None):
    def one(x):
        merged, tasks = scale * x.sum(0), len(x)
        if x.ndim != 3:
            return merged
        u, s, vt = _svd(merged)
        for r in range(len(s)):
            response, total = u[:, r] @ merged, 0.0
            for t in range(tasks):
                own = u[:, r] @ x[t]
                total += max(alpha or 1 / tasks, response @ own / (own @ own))
            s[r] *= tasks / total
        return u @ np.diag(s) @ vt

    return {k: _outputs_first(k, one(_outputs_first(k, x))) if x.ndim == 3 else one(x) for k, x in taus.items()}


def twin_compress(taus, depths, density=0.1, shared_scale=0.29):
    def one(x, t):
        shared = shared_scale * x.sum(0)
        rest = x[t] - shared
        return shared + (_low_rank(rest, max(1, int(density * min(rest.shape)))) if x.ndim == 3 else rest)

    return [{k: one(x, t) for k, x in taus.items()} for t in range(len(next(iter(taus.values()))))]


def graft_compress(taus, depths, ranks=(("attn", 1000), ("attention", 1000), ("mlp", 1400)), solver=None):
    def one(name, x):
        rank = next((rank for part, rank in ranks if part in name), None)
        return x if x.ndim != 2 or rank is None else _low_rank(x, rank)

    return [{k: one(k, x[t]) for k, x in taus.items()} for t in range(len(next(iter(taus.values()))))]
