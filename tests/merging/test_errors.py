"""Errors a newcomer will make."""

import numpy as np
import pytest

import taskvec as tv
from taskvec.merging import Card, method, register
from tests.models_for_tests import random_models

MODELS = random_models(0, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (("tise", {}), r"unknown method 'tise' \(did you mean 'ties'\?\); there are: arcee_fusion, breadcrumbs, cabs"),
        (("ties", {"densty": 0.2}), r"no setting 'densty' \(did you mean 'density'\?\); it has density=0.2"),
        (("ties", {"density": 20}), r"density must lie in \(0, 1\], got 20 \(a percentage is written 0.2"),
        (("ties", {"scope": "leaf"}), "unknown scope 'leaf'; allowed: model, tensor"),
        (("ties", {"aggregate": "median"}), "unknown aggregate 'median'; allowed: mean, sum, max"),
        (("breadcrumbs", {"density": 0.9, "gamma": 0.2}), r"density \+ gamma <= 1"),
        (("task_arithmetic", {"weights": [1.0]}), "1 weights for 2 task vectors"),
        (("tsv_m", {"solver": "qr"}), "allowed: gram, svd"),
        ((tv.chain(tv.trim(0.5)), {}), "ends with one vector per task.*add a reduction such as sum_tasks"),
        ((tv.chain(tv.sum_tasks()), {"scale": 1.0}), "go into the transforms when a chain is given"),
    ],
)
def test_message(call, message):
    name, settings = call
    with pytest.raises(ValueError, match=message):
        tv.merge(name, *MODELS, **settings)


def test_chain_takes_transforms_only():
    with pytest.raises(TypeError, match="did you forget the brackets"):
        tv.chain(tv.sum_tasks)


def test_include_that_matches_nothing():
    with pytest.raises(ValueError, match="no floating-point leaf matches include='attn'"):
        tv.merge("ties", *MODELS, policy=tv.LeafPolicy(include="attn"))


def test_depth_is_needed_by_lines():
    bias = lambda p: {"head": p["head"]}
    with pytest.raises(ValueError, match="no block index in the parameter names"):
        tv.merge("lines", bias(MODELS[0]), [bias(p) for p in MODELS[1]])


def test_names_are_taken_once():
    other = method("ties", Card("t", "1.2", 2024, "s"))(lambda: tv.sum_tasks())
    with pytest.raises(ValueError, match="registered already"):
        register(other)


def test_one_tree_instead_of_a_list():
    with pytest.raises(ValueError, match=r"for one model write \[params\]"):
        tv.merge("ties", MODELS[0], MODELS[1][0])


def test_float64_is_not_cut_silently():
    model = {"w": np.zeros(3)}
    with pytest.raises(ValueError, match="w is float64"):
        tv.merge("weight_average", model, [model])


def test_a_dict_called_blocks():
    """Numbered children are layers of their own; others must be stacked, all to one length."""
    ones = lambda n: np.ones((n, 5), np.float32)
    numbered = {"blocks": {"layer_0": {"w": ones(6)}, "layer_1": {"w": ones(3)}}}
    assert tv.merge("weight_average", numbered, [numbered])["blocks"]["layer_1"]["w"].shape == (3, 5)
    mixed = {"blocks": {"a": ones(6), "b": ones(3)}}
    with pytest.raises(ValueError, match="taken for stacked layers, but differ in length"):
        tv.merge("weight_average", mixed, [mixed])
