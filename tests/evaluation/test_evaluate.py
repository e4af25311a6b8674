"""Evaluation: row order, padding, padded classes, corrections, one compilation."""

import concurrent.futures
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

from taskvec.evaluation import scorers
from taskvec.evaluation.evaluate import evaluate, scored
from taskvec.evaluation.scorers import encode
from taskvec.modular import results
from taskvec.training.heads import make_heads

RNG = np.random.default_rng(0)
X = [RNG.normal(size=(n, 3)).astype(np.float32) for n in (10, 7)]
Y = [RNG.integers(0, c, len(x)) for x, c in zip(X, (4, 2), strict=True)]
KERNELS = [RNG.normal(size=(5, c)) for c in (4, 2)]
W = [RNG.normal(size=(3, 5)).astype(np.float32) for _ in range(2)]


def batches(t, size=4):
    order = np.random.default_rng(1).permutation(len(X[t]))
    for at in range(0, len(order), size):
        rows = order[at : at + size]
        index = np.full(size, -1, np.int32)
        index[: len(rows)] = rows
        rows = np.where(index < 0, rows[0], index)
        yield {"x": X[t][rows], "label": Y[t][rows], "index": index, "weight": (index >= 0).astype(np.float32)}


def model(traces=None):
    def apply_fn(params, batch):
        assert set(batch) == {"x"}
        if traces is not None:
            traces.append(1)
        return {"features": batch["x"] @ params["w"], "tokens": batch["x"]}

    return apply_fn


def expected(t, w, shift=0.0):
    z = X[t].astype(np.float64) @ w + shift
    return z, (z @ KERNELS[t]).argmax(1) == Y[t]  # the norm of z changes no arg max


def test_static_and_task_conditioned_results():
    traces = []
    apply_fn, heads = model(traces), make_heads(KERNELS)
    params = [{"w": jnp.asarray(w)} for w in W]
    shifted = results.corrected(results.static(params[0]), lambda t, z: z + t)
    cases = [
        (results.static(params[0]), lambda t: expected(t, W[0])),
        (results.per_task(params), lambda t: expected(t, W[t])),
        (shifted, lambda t: expected(t, W[0], t)),
    ]
    for merged, wanted in cases:
        found = evaluate(apply_fn, merged, [batches(0), batches(1)], heads)
        for t in (0, 1):
            z, correct = wanted(t)
            np.testing.assert_allclose(found.outputs[t], z, rtol=1e-5, atol=1e-5)
            np.testing.assert_array_equal(found.correct[t], correct)
            assert found.accuracy[t] == correct.mean()
    assert len(traces) == 1


def test_of_processes_each_runs_its_part(monkeypatch):
    """Threads stand for two processes: each has two rows of every batch of four, both end with what one has."""
    here, both, given = threading.local(), threading.Barrier(2), {}

    def gathered(x, tiled):
        assert tiled
        given[here.number] = x
        both.wait(20)
        found = np.concatenate([given[0], given[1]])
        both.wait(20)
        return found

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", gathered)
    seen, texts = [[], []], ["no", "", None, "Å"]

    def mine(t):
        for batch in batches(t):
            part = {key: x[2 * here.number :][:2] for key, x in batch.items()}
            seen[here.number] += [int(i) for i in part["index"] if i >= 0]
            yield part

    def process(number):
        here.number = number
        found = evaluate(model(), results.static({"w": jnp.asarray(W[0])}), [mine(0), mine(1)], make_heads(KERNELS))
        index = np.array([[0, 1], [2, 3]], np.int32)[number]
        answers = [{"i": index, "index": index, "label": np.zeros(2, np.int32)}]
        return found, scorers.by_row(lambda batch: np.array([texts[i] for i in batch["i"]], object), answers, 4)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        ends = list(pool.map(process, (0, 1)))
    for found, written in ends:
        assert written.tolist() == texts
        for t in (0, 1):
            z, correct = expected(t, W[0])
            np.testing.assert_allclose(found.outputs[t], z, rtol=1e-5, atol=1e-5)
            assert found.accuracy[t] == correct.mean()
    assert sorted(seen[0] + seen[1]) == sorted([*range(10), *range(7)]) and all(seen)


def test_batches_are_used_as_they_come_and_none_is_kept():
    heads, events, given = make_heads(KERNELS), [], []

    def made(t):
        for i, batch in enumerate(batches(t)):
            given.append(weakref.ref(batch["x"]))
            assert sum(x() is not None for x in given) <= 2  # this one, and what was asked for before
            events.append(("made", t, i))
            yield batch
            del batch

    def run(params, batches, num_rows):
        def one(inputs):
            events.append(("used", *events[-1][1:]))
            return np.asarray(inputs["x"] @ params["w"])

        return scorers.by_row(one, batches, num_rows)

    scorer = scorers.of_heads(model(), heads)._replace(outputs=run)
    found = scored(scorer, results.static({"w": W[0]}), [made(0), made(1)])
    assert events == [(what, t, i) for t, n in ((0, 3), (1, 2)) for i in range(n) for what in ("made", "used")]
    for t in (0, 1):
        np.testing.assert_array_equal(found.correct[t], expected(t, W[0])[1])


def test_every_row_is_needed_once():
    some = list(batches(0))
    with pytest.raises(ValueError, match="each of 10 rows once, found 8"):
        encode(model(), {"w": W[0]}, some[:2], 10)
    used = batches(0)
    list(used)
    with pytest.raises(ValueError, match="used up"):
        encode(model(), {"w": W[0]}, used, 10)
    with pytest.raises(ValueError, match="1 tasks but heads of 2"):
        evaluate(model(), results.static({"w": W[0]}), [batches(0)], make_heads(KERNELS))
