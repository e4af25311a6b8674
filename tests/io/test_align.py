"""Bringing models to one set of names: prefixes, ties, buffers, and what does not match."""

import numpy as np
import pytest

from taskvec.io import prefixes
from taskvec.io.align import align, tied_to
from taskvec.io.folders import open_model
from tests.io.folders_for_tests import SHAPES, D, F, V, bert, family, llama, tensors, write


def aligned(root, *names, **more):
    return align([open_model(root / name) for name in names], names, **more)


def test_prefixes():
    assert prefixes.match(["bert.x.w", "head.w"], ["x.w", "y.w"]) == {"bert.x.w": "x.w", "head.w": "head.w"}
    assert prefixes.match(["h.0.w"], ["transformer.h.0.w", "lm_head.w"]) == {"h.0.w": "transformer.h.0.w"}
    assert prefixes.match(["a.w", "b.w"], ["a.w", "c.w"]) == {"a.w": "a.w", "b.w": "b.w"}
    old, new = ["bert.LayerNorm.gamma", "bert.x.gamma"], ["LayerNorm.weight", "x.gamma"]
    assert prefixes.match(old, new) == dict(zip(old, new, strict=True))
    assert prefixes.match(new, old) == dict(zip(new, old, strict=True))


def test_a_body_and_a_model_with_a_head(tmp_path):
    base = tensors(bert(), 0)
    write(tmp_path / "base", base)
    write(tmp_path / "a", tensors(bert("bert.", ["classifier"]), 1))
    with pytest.raises(ValueError, match=r"a is not a fine-tuned copy of base: 1 are not in base: classifier.weight"):
        aligned(tmp_path, "base", "a")
    both = aligned(tmp_path, "base", "a", takes=lambda name: name != "classifier.weight")
    assert both.views[1].specs.keys() == base.keys() and "prefix" in both.notes[0]
    name = "encoder.layer.0.output.dense.weight"
    np.testing.assert_array_equal(both.views[1].read(name), open_model(tmp_path / "a").read(f"bert.{name}"))


@pytest.mark.parametrize(
    ("shapes", "name", "source"),
    [
        (llama(), "lm_head.weight", "model.embed_tokens.weight"),
        ({**SHAPES["gpt2"], "lm_head.weight": (V, D)}, "lm_head.weight", "transformer.wte.weight"),
        ({**SHAPES["t5"], "encoder.embed_tokens.weight": (V, D)}, "encoder.embed_tokens.weight", "shared.weight"),
        ({**SHAPES["t5"], "lm_head.weight": (V, D)}, "lm_head.weight", "shared.weight"),
        ({"cls.predictions.bias": (V,), "cls.predictions.decoder.bias": (V,)}, "cls.predictions.decoder.bias",
         "cls.predictions.bias"),
        ({"lm_head.weight": (V, F), "model.embed_tokens.weight": (V, D)}, "lm_head.weight", None),
        (llama(), "model.norm.weight", None),
    ],
)  # fmt: skip
def test_what_is_tied_to_what(shapes, name, source):
    arrays = {key: np.empty(shape) for key, shape in shapes.items()}
    assert tied_to(name, arrays) == source


def tie_family(root, heads):
    """A tied Llama three times; `heads` says per model: nothing stored, a copy stored, or a head of its own."""
    made = {}
    base = tensors(llama(tied=True), 0)
    for seed, (name, head) in enumerate(heads.items()):
        arrays = tensors(llama(tied=True), seed, base)
        if head:
            arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"] + (head == "own")
        made[name] = arrays
        write(root / name, arrays)
    return made


def test_tied_in_all_models(tmp_path):
    tie_family(tmp_path, {"base": "", "a": "", "b": "copy"})
    found = aligned(tmp_path, "base", "a", "b")
    assert all("lm_head.weight" not in view.specs for view in found.views)
    assert not found.copies and not found.untied


def test_stored_twice_in_the_base(tmp_path):
    tie_family(tmp_path, {"base": "copy", "a": "", "b": "copy"})
    found = aligned(tmp_path, "base", "a", "b")
    assert all("lm_head.weight" not in view.specs for view in found.views)
    assert found.copies == {"lm_head.weight": "model.embed_tokens.weight"}


@pytest.mark.parametrize("base", ["", "copy"])
def test_untied_in_one_expert(tmp_path, base):
    made = tie_family(tmp_path, {"base": base, "a": "own", "b": ""})
    found = aligned(tmp_path, "base", "a", "b")
    heads = [view.read("lm_head.weight") for view in found.views]
    np.testing.assert_array_equal(heads[0], made["base"]["model.embed_tokens.weight"])
    np.testing.assert_array_equal(heads[1], made["a"]["lm_head.weight"])
    np.testing.assert_array_equal(heads[2], made["b"]["model.embed_tokens.weight"])
    assert found.untied == (() if base else ("lm_head.weight",))
    assert any("merged as its own tensor" in note for note in found.notes)


def test_buffers_may_be_absent_and_differ(tmp_path):
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    ids = {"embeddings.position_ids": np.arange(4)[None]}
    write(tmp_path / "base", tensors(llama(), 0) | frequencies | ids)
    write(tmp_path / "a", tensors(llama(), 1))
    write(
        tmp_path / "b", tensors(llama(), 2) | {"model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    )
    found = aligned(tmp_path, "base", "a", "b")
    assert found.kept == tuple(frequencies)
    assert found.views[0].specs.keys() == found.views[1].specs.keys() == llama().keys() | ids.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": None}, r"1 tensors are missing: model.norm.weight"),
        ({"extra.weight": (3,)}, r"1 are not in base: extra.weight"),
        ({"model.norm.weight": (5,)}, r"shapes differ: model.norm.weight \[5\], not \[4\]"),
        (
            {"model.embed_tokens.weight": (V + 2, D), "lm_head.weight": (V + 2, D)},
            r"vocabulary sizes differ: a has 13 rows in lm_head.weight, model.embed_tokens.weight, base has 11",
        ),
    ],
)
def test_models_that_do_not_match(tmp_path, change, message):
    write(tmp_path / "base", tensors(llama(), 0))
    shapes = {name: shape for name, shape in (llama() | change).items() if shape is not None}
    write(tmp_path / "a", tensors(shapes, 1))
    with pytest.raises(ValueError, match=message):
        aligned(tmp_path, "base", "a")
    left_out = aligned(tmp_path, "base", "a", takes=lambda name: name not in change)
    assert left_out.views[0].specs.keys() == llama().keys()


def test_integers_in_place_of_weights(tmp_path):
    made = family(tmp_path, {"w": (2, 2), "v": (3,)}, ("a",))
    write(tmp_path / "a", made["a"] | {"w": np.zeros((2, 2), np.int8)})
    with pytest.raises(ValueError, match="integers in place of floating-point numbers: w"):
        aligned(tmp_path, "base", "a")
