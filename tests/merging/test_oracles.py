"""Every method against its float64 NumPy oracle."""

import numpy as np
import pytest

import taskvec as tv
from taskvec import tree as trees
from taskvec.merging import PerTask
from tests.merging import oracles
from tests.merging.battery import number_of_tasks
from tests.models_for_tests import random_models


def named(params):
    return {k: np.asarray(v, np.float64) for k, v in trees.flatten(trees.unstack_layers(params)).items()}


@pytest.mark.parametrize("name", sorted(tv.methods()))
def test_method_equals_its_formula(name):
    oracle = oracles.of(name)
    assert oracle.cases, f"{name} has no oracle: add one in tests/merging/oracles/"
    pretrained, finetuned = random_models(seed=1, tasks=number_of_tasks(tv.methods()[name], 3))
    base = named(pretrained)
    taus = {k: np.stack([named(f)[k] - base[k] for f in finetuned]) for k in base if k != "position_ids"}
    depths = {k: int(k.split("/")[1]) if k.startswith("blocks/") else None for k in taus}
    extras = oracle.extras(pretrained, finetuned) if oracle.extras else {}
    named_extras = {kind: named_stacks(tree) for kind, tree in extras.items()}
    for settings in oracle.cases:
        result = tv.merge(name, pretrained, finetuned, extras=extras, **settings)
        drawn = oracle.random(pretrained, finetuned, settings) if oracle.random else {}
        expected = oracle(taus, depths, base, named_extras, **settings, **drawn)
        if isinstance(result, PerTask):
            pairs = [(result.params(t), expected[t]) for t in range(len(finetuned))]
        else:
            pairs = [(result, expected)]
        for params, vectors in pairs:
            merged = named(params)
            assert vectors.keys() == taus.keys()
            for k, x in vectors.items():
                np.testing.assert_allclose(merged[k] - base[k], x, atol=2e-6, err_msg=f"{name} {settings} {k}")
            np.testing.assert_array_equal(merged["position_ids"], base["position_ids"])


def named_stacks(tree):
    """``{per-layer name: [T, ...]}`` of a tree of extras."""
    out = {}
    for path, x in trees.flatten(tree).items():
        if trees.is_stacked(path):
            out |= {trees.layer_path(path, i): np.asarray(x[i], np.float64) for i in range(len(x))}
        else:
            out[path] = np.asarray(x, np.float64)
    return out
