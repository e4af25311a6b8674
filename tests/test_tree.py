"""Paths, depth, layouts and groups."""

import jax.numpy as jnp
import pytest

from taskvec import tree as trees
from tests.models_for_tests import random_models

TREE = {
    "embeddings": {"table": jnp.zeros((5, 4))},
    "blocks": {"q": {"kernel": jnp.zeros((3, 4, 4)), "bias": jnp.zeros((3, 4))}},
    "head": {"bias": jnp.zeros(2)},
}


@pytest.mark.parametrize(
    ("path", "depth"),
    [
        ("encoder.layer.3.attention.self.query.weight", 3),
        ("blocks/11/mlp/kernel", 11),
        ("model.layers.0.input_layernorm.weight", 0),
        ("transformer.h.7.attn.c_attn.weight", 7),
        ("visual.transformer.resblocks.2.ln_1.bias", 2),
        ("embeddings.LayerNorm.weight", None),
        ("head.0.weight", None),
    ],
)
def test_depth(path, depth):
    assert trees.depth(path) == depth


def test_stacking_round_trip():
    params, _ = random_models(0, 1)
    single = trees.unstack_layers(params)
    assert set(trees.flatten(single)) == set(trees.tensors(params))
    again = trees.flatten(trees.stack_layers(single))
    for path, leaf in trees.flatten(params).items():
        assert (again[path] == leaf).all()


def test_stacking_reports_missing_layers():
    single = trees.unstack_layers(TREE)
    del single["blocks"]["1"]["q"]["bias"]
    with pytest.raises(ValueError, match=r"cannot stack blocks/q/bias.*0\.\.L-1"):
        trees.stack_layers(single)


def test_groups_of_every_mode():
    counts = {mode: len(trees.groups(TREE, mode).names) for mode in trees.GROUP_MODES}
    assert counts == {"global": 1, "task": 1, "block": 4, "module": 5, "tensor": 8}
    by_block = trees.groups(TREE, "block")
    assert by_block.ids["blocks"]["q"]["kernel"].tolist() == by_block.ids["blocks"]["q"]["bias"].tolist()
    with pytest.raises(ValueError, match="task, block, module, tensor"):
        trees.groups(TREE, "layer")


def test_groups_are_the_same_in_both_layouts():
    for mode in trees.GROUP_MODES:
        stacked, single = trees.groups(TREE, mode), trees.groups(trees.unstack_layers(TREE), mode)
        for name, (path, layer) in trees.tensors(TREE).items():
            a = trees.flatten(stacked.ids)[path] if layer is None else trees.flatten(stacked.ids)[path][layer]
            assert stacked.names[int(a)] == single.names[int(trees.flatten(single.ids)[name])]
