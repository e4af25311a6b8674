"""Name tables: every rule in both directions, and what happens to names that no rule covers."""

import numpy as np
import pytest

from taskvec import tree as trees
from taskvec.io import names
from taskvec.models.bert import TABLE as BERT

SHAPES = {
    "embeddings.word_embeddings.weight": (7, 4),
    "embeddings.position_embeddings.weight": (5, 4),
    "embeddings.token_type_embeddings.weight": (2, 4),
    "embeddings.LayerNorm.weight": (4,),
    "embeddings.LayerNorm.bias": (4,),
}
LAYER = {
    **{f"attention.self.{x}.weight": (4, 4) for x in ("query", "key", "value")},
    **{f"attention.self.{x}.bias": (4,) for x in ("query", "key", "value")},
    "attention.output.dense.weight": (4, 4), "attention.output.dense.bias": (4,),
    "attention.output.LayerNorm.weight": (4,), "attention.output.LayerNorm.bias": (4,),
    "intermediate.dense.weight": (6, 4), "intermediate.dense.bias": (6,),
    "output.dense.weight": (4, 6), "output.dense.bias": (4,),
    "output.LayerNorm.weight": (4,), "output.LayerNorm.bias": (4,),
}  # fmt: skip


def bert(layers=11, prefix=""):
    shapes = SHAPES | {f"encoder.layer.{i}.{n}": s for i in range(layers) for n, s in LAYER.items()}
    rng = np.random.default_rng(0)
    return {prefix + name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_bert_both_ways(prefix):
    tensors = bert(prefix=prefix)
    tree = names.to_paths(BERT, tensors)
    assert tree["blocks"]["mlp"]["up"]["kernel"].shape == (11, 4, 6)
    key = tensors[f"{prefix}encoder.layer.10.attention.self.key.weight"]
    np.testing.assert_array_equal(tree["blocks"]["attention"]["key"]["kernel"][10], key.T)
    back = names.to_names(BERT, tree)
    assert {prefix + name for name in back} == tensors.keys()
    for name, x in back.items():
        np.testing.assert_array_equal(x, tensors[prefix + name])


def test_every_place_is_a_tensor_of_the_tree():
    places = names.places(BERT, bert(3))
    assert {p.path for p in places.values()} == trees.tensors(names.to_paths(BERT, bert(3))).keys()


def test_ignored_names_are_left_out_and_others_are_errors():
    ignored = {"embeddings.position_ids": np.zeros(1), "pooler.dense.weight": np.zeros(1), "cls.x": np.zeros(1)}
    assert names.places(BERT, bert(2) | ignored).keys() == bert(2).keys()
    with pytest.raises(ValueError, match=r"no rule covers embeddings\.x, pooling.*`ignore` entry"):
        names.places(BERT, bert(2) | {"pooling": 0, "embeddings.x": 0})


def test_ambiguous_names_and_paths():
    table = names.Table((names.Rule("a.{}", "x/{}"), names.Rule("a.1", "y"), names.Rule("b", "x/2")))
    with pytest.raises(ValueError, match=r"several rules cover a\.1; one path is claimed by a\.2, b"):
        names.places(table, ["a.1", "a.2", "b"])


def test_a_tree_with_a_leaf_too_many():
    tree = names.to_paths(BERT, bert(2))
    with pytest.raises(ValueError, match="no rule covers head/kernel"):
        names.to_names(BERT, {**tree, "head": {"kernel": np.ones(1)}})


def test_a_missing_layer():
    tensors = {name: x for name, x in bert(3).items() if ".layer.1." not in name}
    with pytest.raises(ValueError, match="cannot stack"):
        names.to_paths(BERT, tensors)


@pytest.mark.parametrize(("op", "shape", "here"), [("transpose", (2, 3), (3, 2)), ("conv", (8, 3, 5, 4), (5, 4, 3, 8))])
def test_ops_undo_each_other(op, shape, here):
    x = np.random.default_rng(0).normal(size=shape)
    assert names.to_tree_array(x, op).shape == here
    np.testing.assert_array_equal(names.to_file_array(names.to_tree_array(x, op), op), x)


def test_conv_keeps_each_weight_in_its_role():
    x = np.random.default_rng(0).normal(size=(8, 3, 5, 4))
    assert names.to_tree_array(x, "conv")[4, 1, 2, 7] == x[7, 2, 4, 1]
