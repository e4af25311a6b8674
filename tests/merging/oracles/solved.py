"""Oracles of methods that solve for a matrix, or weigh entries by statistics: RegMean, Fisher, WUDI, DOGE, CoPA."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from taskvec import tree as trees

CASES = {
    "regmean": [{}, {"reduce_nondiagonal": 0.1}, {"reduce_nondiagonal": 1.0, "ridge": 0.05}],
    "regmean_plusplus": [{}],
    "fisher": [
        {},
        {"normalize": False, "weights": (0.2, 1.0, 3.0)},
        {"floor": 0.3, "floor_rule": "first"},
        {"floor": 0.3, "floor_rule": "add"},
    ],
    "wudi": [
        {},
        {"solver": "exact", "scale": 0.5},
        {"steps": 7, "learning_rate": 1e-3, "norm_power": 1.0, "others": "pretrained"},
    ],
    "doge": [{}, {"steps": 5, "learning_rate": 1e-3, "density": 0.9, "subspace": 0.25, "eta": 0.3, "others": "mean"}],
    "copa": [{}, {"density": 0.5, "quantile": 0.0, "fuse": 1.0}],
}
EXPERT = {"regmean": {}, "regmean_plusplus": {}, "fisher": {}, "wudi": {}, "doge": None, "copa": None}


def _grams(pretrained, finetuned):
    """Gram matrices over the axis of inputs, some made-up function of each model's own weights."""
    out = {}
    for path, x in trees.flatten(pretrained).items():
        shape = x.shape[1:] if trees.is_stacked(path) else x.shape
        if len(shape) != 2 or "embed" in path:
            continue
        stack = []
        for params in finetuned:
            w = jnp.asarray(trees.flatten(params)[path], jnp.float32)
            w = w.swapaxes(-1, -2) if path.endswith("kernel") else w
            rows = jnp.concatenate([jnp.sin(20 * w), jnp.cos(13 * w), jnp.sin(5 * w + 1)], -2)
            stack.append(rows.swapaxes(-1, -2) @ rows / rows.shape[-2])
        out[path] = jnp.stack(stack, 1 if trees.is_stacked(path) else 0)
    return {"gram": trees.unflatten(out)}


def _fishers(pretrained, finetuned):
    def fisher(path, x, *each):
        axis = 1 if trees.is_stacked(path) else 0
        return jnp.stack([jnp.square(jnp.sin(30 * jnp.asarray(w, jnp.float32))) for w in each], axis)

    floats = [{p: x for p, x in trees.flatten(tree).items() if trees.is_float(x)} for tree in [pretrained, *finetuned]]
    flat = {path: fisher(path, *(tree[path] for tree in floats)) for path in floats[0] if path != "head/temperature"}
    return {"fisher": trees.unflatten(jax.tree.map(jnp.asarray, flat))}


def _adapters(pretrained, finetuned):
    """Factors of rank 3 made of rows and columns of the task vectors."""
    out = {"lora_a": {}, "lora_b": {}}
    for path, x in trees.flatten(pretrained).items():
        stacked = trees.is_stacked(path)
        if x.ndim != 2 + stacked or "embed" in path:
            continue
        base = jnp.asarray(x, jnp.float32)
        taus = [jnp.asarray(trees.flatten(params)[path], jnp.float32) - base for params in finetuned]
        taus = [tau.swapaxes(-1, -2) if path.endswith("kernel") else tau for tau in taus]
        out["lora_a"][path] = jnp.stack([4 * tau[..., :3, :] for tau in taus], int(stacked))
        out["lora_b"][path] = jnp.stack([4 * tau[..., :, 2:5] for tau in taus], int(stacked))
    return {name: trees.unflatten(flat) for name, flat in out.items()}


EXTRAS = {"regmean": _grams, "regmean_plusplus": _grams, "fisher": _fishers, "copa": _adapters}


def _is_linear(name, x):
    return x.ndim == 3 and not re.search("embed", name)


def _as_out_in(name, x):
    """The matrices [T, m, n] as [T, out, in]; its own inverse."""
    return np.swapaxes(x, -1, -2) if name.endswith("kernel") else x


def regmean(taus, depths, extras, reduce_nondiagonal=0.9, ridge=0.0):
    out = {}
    for name, x in taus.items():
        if name not in extras["gram"]:
            out[name] = x.mean(0)
            continue
        w = np.swapaxes(_as_out_in(name, x), -1, -2)  # [T, in, out]
        left, right = 0, 0
        for gram, w_t in zip(extras["gram"][name], w, strict=True):
            gram = reduce_nondiagonal * gram + (1 - reduce_nondiagonal) * np.diag(np.diag(gram))
            left, right = left + gram, right + gram @ w_t
        # The ridge stands on the diagonal of the sum scaled to a unit one, and draws to the mean.
        average, unit = w.mean(0), 1 / np.sqrt(np.diag(left))
        scaled = unit[:, None] * left * unit
        scaled = scaled + ridge * np.linalg.norm(scaled) * np.eye(len(unit))
        change = unit[:, None] * np.linalg.solve(scaled, unit[:, None] * (right - left @ average))
        out[name] = _as_out_in(name, (average + change).T)
    return out


def regmean_plusplus(taus, depths, extras, reduce_nondiagonal=0.95):
    return regmean(taus, depths, extras, reduce_nondiagonal)


def fisher(taus, depths, extras, weights=None, normalize=True, floor=1e-6, floor_rule="all"):
    information = {k: x + (floor if floor_rule == "add" else 0) for k, x in extras["fisher"].items()}
    out = {}
    for name, x in taus.items():
        if name not in information:
            out[name] = x.mean(0)
            continue
        above, below = 0, 0
        for t in range(len(x)):
            c = 1.0 if weights is None else weights[t]
            if normalize:
                c /= np.sqrt(sum((f[t] ** 2).sum() for f in information.values()))
            f = information[name][t]
            if floor_rule == "all" or (floor_rule == "first" and t == 0):
                f = np.maximum(f, floor)
            above, below = above + c * f * x[t], below + c * f
        out[name] = above / below
    return out


def _adam(gradient, x, steps, learning_rate):
    m, v = np.zeros_like(x), np.zeros_like(x)
    for i in range(1, steps + 1):
        g = gradient(x)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        x = x - learning_rate * (m / (1 - 0.9**i)) / (np.sqrt(v / (1 - 0.999**i)) + 1e-8)
    return x


def interference(x, taus, norm_power=2.0):
    """The loss of WUDI and its gradient, from the definition."""
    loss, gradient = 0.0, np.zeros_like(x)
    for tau in taus:
        norm = np.linalg.norm(tau) ** norm_power
        if norm == 0:
            continue
        product = (x - tau) @ tau.T
        loss += (product**2).sum() / norm
        gradient += 2 * product @ tau / norm
    return loss, gradient


def wudi(
    taus,
    depths,
    solver="adam",
    steps=300,
    learning_rate=1e-5,
    scale=1.0,
    norm_power=2.0,
    others="mean",
    cutoff=1e-5,
):
    def one(name, x):
        if not _is_linear(name, x):
            return x.mean(0) if others == "mean" else 0 * x[0]
        x = _as_out_in(name, x)
        start = x.sum(0)
        if solver == "adam":
            found = _adam(lambda y: interference(y, x, norm_power)[1], start, steps, learning_rate)
        else:
            changed = [t for t in x if t.any()]
            a = sum(t.T @ t / np.linalg.norm(t) ** norm_power for t in changed)
            r = sum((t - start) @ t.T @ t / np.linalg.norm(t) ** norm_power for t in changed)
            found = start + r @ np.linalg.pinv(a, rcond=cutoff, hermitian=True)
        return _as_out_in(name, found)

    return {name: scale * one(name, x) for name, x in taus.items()}


def doge(
    taus,
    depths,
    eta=0.07,
    density=0.3,
    subspace=1 / 6,
    steps=400,
    learning_rate=1e-4,
    scale=1.0,
    others="pretrained",
):
    thresholds = []
    for t in range(len(next(iter(taus.values())))):
        flat = np.sort(np.concatenate([np.abs(x[t]).ravel() for x in taus.values()]))
        thresholds.append(flat[len(flat) - int(density * len(flat)) - 1])

    def one(name, x):
        if not _is_linear(name, x):
            return x.mean(0) if others == "mean" else 0 * x[0]
        x = _as_out_in(name, x)
        share = [eta / np.linalg.norm(t) for t in x]
        rank = min(x.shape[1:])
        left = [np.linalg.svd(t, full_matrices=False)[0][:, : rank // len(x)] for t in x]
        u = np.linalg.svd(np.concatenate(left, 1), full_matrices=False)[0][:, : int(rank * subspace + 1e-9)]

        def gradient(delta):
            merged = sum(s * (t + delta) for s, t in zip(share, x, strict=True))
            g = np.zeros_like(delta)
            for t in x:
                g += -2 * sum(share) * (t * (t - merged)).sum(1, keepdims=True) * t
            return g - u @ u.T @ g

        delta = _adam(gradient, np.zeros_like(x[0]), steps, learning_rate)
        kept = [s * (np.abs(t) >= v) * (t + delta) for s, t, v in zip(share, x, thresholds, strict=True)]
        return _as_out_in(name, sum(kept))

    return {name: scale * one(name, x) for name, x in taus.items()}


def copa(taus, depths, extras, density=0.2, quantile=0.8, fuse=2.0):
    def prune(x):
        threshold = np.sort(np.abs(x).ravel())[int(x.size * (1 - density)) - 1]
        return np.where(np.abs(x) >= threshold, x, 0)

    out = {}
    for name, x in taus.items():
        if name not in extras["lora_a"]:
            out[name] = x.mean(0)
            continue
        a_sum, b_sum, s_sum = 0, 0, 0
        for a, b in zip(extras["lora_a"][name], extras["lora_b"][name], strict=True):
            left = np.abs(prune(a)).sum(1)
            s = np.array([np.abs(row).sum() / n if n else 1.0 for row, n in zip(a, left, strict=True)])
            s = np.maximum(s, np.sort(s)[int(len(s) * quantile)])
            a_sum, b_sum, s_sum = a_sum + prune(a), b_sum + prune(b) * s, s_sum + s
        out[name] = _as_out_in(name, fuse * b_sum / s_sum @ (fuse * a_sum))
    return out
