"""MergeKit's recipes on tiny Llama-shaped folders."""

import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from taskvec import recipes
from taskvec.io import safetensors
from taskvec.merging import merge_streamed

LAYERS, WIDTH = 4, 6


def names():
    per_layer = [
        ("self_attn.q_proj.weight", (WIDTH, WIDTH)),
        ("self_attn.k_proj.weight", (2, WIDTH)),
        ("mlp.down_proj.weight", (WIDTH, 9)),
        ("input_layernorm.weight", (WIDTH,)),
    ]
    shapes = {"model.embed_tokens.weight": (11, WIDTH), "model.norm.weight": (WIDTH,), "lm_head.weight": (11, WIDTH)}
    return shapes | {f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in per_layer}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders base, a, b, c; ``{name: arrays}``."""
    root, arrays = tmp_path_factory.mktemp("models"), {}
    rng = np.random.default_rng(0)
    base = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in names().items()}
    for which in ("base", "a", "b", "c"):
        size = 0.0 if which == "base" else 0.1
        arrays[which] = {k: (v + size * rng.standard_normal(v.shape)).astype(np.float32) for k, v in base.items()}
        arrays[which]["model.positions"] = np.arange(5)
        (root / which).mkdir()
        safetensors.save(root / which / "model.safetensors", arrays[which])
    return root, arrays


def run(folders, text, tmp_path):
    """The merged tensors, and the recipe."""
    root, _ = folders
    path = tmp_path / "recipe.yml"
    path.write_text(text)
    recipe, out = recipes.load(path), {}
    groups = recipe.groups(lambda name: safetensors.SafetensorsReader(root / name))

    def write(name, x, rows):
        assert rows is None and name not in out
        out[name] = x

    for group in groups:
        merge_streamed(group.method, group.pretrained, group.finetuned, write, dtype=recipe.dtype)
    return out, recipe, groups


def test_gradients_filters_and_precedence(folders, tmp_path):
    text = """
    merge_method: task_arithmetic
    base_model: base
    models:
      - model: a
        parameters:
          weight: [0.0, 1.0]                 # embeddings and head take the first knot
      - model: b
        parameters:
          weight:
            - {filter: mlp, value: [1.0, 0.0, 1e-1]}
            - {filter: self_attn, value: 0.25}  # other tensors: the recipe's own
    parameters: {weight: 2.0, lambda: 0.5}
    """
    out, recipe, groups = run(folders, text, tmp_path)
    arrays = folders[1]
    assert recipe.models == ("base", "a", "b") and recipe.reference == "base" and recipe.num_layers is None
    for name, theta0 in arrays["base"].items():
        if name == "model.positions":
            np.testing.assert_array_equal(out[name], theta0)
            continue
        layer = recipes.groups.split(name)[1]
        t = 0.0 if layer is None else layer / (LAYERS - 1)
        of_b = np.interp(t, [0, 0.5, 1], [1.0, 0.0, 0.1]) if "mlp" in name else 0.25 if "self_attn" in name else 2.0
        expected = theta0 + 0.5 * (t * (arrays["a"][name] - theta0) + of_b * (arrays["b"][name] - theta0))
        np.testing.assert_allclose(out[name], expected, atol=1e-6, err_msg=name)
    assert len(groups) == 3 * LAYERS  # norms of layer 0 go with what is outside the layers
    rows = [row for row in recipe.table(lambda name: groups_reader(folders, name)) if row.model == "b"]
    assert {row.tensors for row in rows if row.coefficients["weight"] == 0.25} >= {"layer 1"}


def groups_reader(folders, name):
    return safetensors.SafetensorsReader(folders[0] / name)


def test_slices_take_layers_from_anywhere(folders, tmp_path):
    text = """
    merge_method: passthrough
    slices:
      - sources: [{model: a, layer_range: [0, 2]}]
      - sources:
          - model: b
            layer_range: [1, 4]
            parameters: {scale: [{filter: down_proj, value: 0.5}, {value: 1.0}]}
    dtype: bfloat16
    """
    out, recipe, _ = run(folders, text, tmp_path)
    arrays = folders[1]
    assert recipe.num_layers == 5 and recipe.reference == "a"
    assert len(out) == 4 + 5 * 4
    sources = [("a", 0), ("a", 1), ("b", 1), ("b", 2), ("b", 3)]
    for i, (model, layer) in enumerate(sources):
        for part in ("self_attn.q_proj", "mlp.down_proj", "input_layernorm"):
            scale = 0.5 if model == "b" and part == "mlp.down_proj" else 1.0
            expected = (scale * arrays[model][f"model.layers.{layer}.{part}.weight"]).astype(jnp.bfloat16)
            np.testing.assert_array_equal(out[f"model.layers.{i}.{part}.weight"], expected)
    np.testing.assert_array_equal(
        out["model.embed_tokens.weight"], arrays["a"]["model.embed_tokens.weight"].astype(jnp.bfloat16)
    )
    np.testing.assert_array_equal(out["lm_head.weight"], arrays["b"]["lm_head.weight"].astype(jnp.bfloat16))


def test_slerp_of_slices_with_a_gradient_and_a_single_layer(folders, tmp_path):
    text = """
    merge_method: slerp
    base_model: a
    slices:
      - sources: [{model: a, layer_range: [0, 3]}, {model: b, layer_range: [1, 4]}]
      - sources: [{model: b, layer_range: [0, 1]}, {model: a, layer_range: [3, 4]}]
    parameters:
      t: [0.0, 1.0]
    """
    out, _, _ = run(folders, text, tmp_path)
    arrays = folders[1]
    q = lambda model, layer: arrays[model][f"model.layers.{layer}.self_attn.q_proj.weight"].astype(np.float64)
    got = lambda layer: out[f"model.layers.{layer}.self_attn.q_proj.weight"]
    np.testing.assert_allclose(got(0), q("a", 0), atol=1e-6)
    np.testing.assert_allclose(got(2), q("b", 3), atol=1e-6)
    np.testing.assert_allclose(got(3), q("b", 0), atol=1e-6)  # one layer: t = 1, and the base is a
    a, b = q("a", 1), q("b", 2)
    angle = np.arccos((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
    np.testing.assert_allclose(got(1), np.sin(angle / 2) / np.sin(angle) * (a + b), atol=1e-6)
    np.testing.assert_allclose(out["lm_head.weight"], arrays["a"]["lm_head.weight"], atol=1e-6)


def test_base_is_one_more_model_where_the_method_merges_it(folders, tmp_path):
    text = """
    merge_method: linear
    base_model: base
    models: [{model: a, parameters: {weight: 1}}, {model: base, parameters: {weight: 3}}]
    """
    out, _, groups = run(folders, text, tmp_path)
    arrays = folders[1]
    for name in ("lm_head.weight", "model.layers.2.mlp.down_proj.weight"):
        expected = (arrays["a"][name] + 3 * arrays["base"][name]) / 4
        np.testing.assert_allclose(out[name], expected, atol=1e-6)
    assert groups[0].pretrained is None and len(groups) == 1


RECIPE = {
    "merge_method": "ties",
    "base_model": "base",
    "models": [{"model": "a", "parameters": {"weight": 1.0}}, {"model": "b", "parameters": {"weight": 0.5}}],
}
ONE = [{"model": "a", "parameters": {"weight": 1.0}}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge_method": "tise"}, r"unknown merge_method 'tise' \(did you mean 'ties'\?\); there are: arcee_fusion"),
        ({"base_modle": "x"}, r"unknown key 'base_modle' \(did you mean 'base_model'\?\)"),
        ({"tokenizer_source": "union"}, "tokenizer_source is not supported: vocabularies are not rewritten"),
        ({"tokenizer": {"source": "base"}}, "tokenizer is not supported"),
        ({"chat_template": "auto"}, "chat_template is not supported: tokenizer files are copied"),
        ({"modules": {}}, "modules is not supported"),
        ({"experts": []}, "mixture-of-experts models are not built here"),
        ({"slices": [1]}, "either models or slices"),
        ({"models": None}, "either models or slices"),
        ({"base_model": None}, "ties needs a base_model"),
        ({"models": [{"model": "a"}]}, "models: ties needs a weight for a"),
        ({"models": ONE + ONE}, "a is there twice"),
        ({"models": [{"model": "base"}]}, r"ties merges 1 or more models besides the base_model, got 0 \(none\)"),
        ({"parameters": {"densty": 0.2}}, r"no parameter 'densty' here \(did you mean 'density'\?\); allowed: weight"),
        (
            {"models": [{"model": "a", "parameters": {"lambda": 1}}]},
            "in the recipe's own parameters: normalize, rescale",
        ),
        ({"parameters": {"density": "much"}}, "parameters: density must be a number, got 'much'"),
        ({"parameters": {"normalize": 1}}, "normalize must be true or false"),
        ({"parameters": {"density": []}}, "the list is empty"),
        ({"parameters": {"density": [{"filter": "mlp"}]}}, "a rule is {filter"),
        ({"dtype": "float8"}, "dtype must be one of float32, float16, bfloat16"),
        ({"merge_method": "slerp", "models": ONE[:1]}, "no parameter 'weight' here; allowed: "),
        ({"merge_method": "slerp", "models": [{"model": "a"}]}, "models: slerp needs a t"),
        ({"merge_method": "linear", "models": ONE}, "linear needs a weight for base; a base_model is one more model"),
        (
            {"merge_method": "nearswap", "parameters": {"t": 1}, "models": [{"model": "a"}, {"model": "b"}]},
            "merges 1 mod",
        ),
    ],
)
def test_errors_before_any_model_is_opened(change, message, tmp_path):
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump({k: v for k, v in {**RECIPE, **change}.items() if v is not None}))
    with pytest.raises(ValueError, match=message):
        recipes.load(path)


def test_slices_are_checked():
    def parse(*sources, **more):
        return recipes.parse({"merge_method": "linear", "slices": [{"sources": list(sources), **more}]})

    a = {"model": "a", "layer_range": [0, 2], "parameters": {"weight": 1}}
    with pytest.raises(ValueError, match=r"slices\[0\]: all sources of a slice must have the same number.*\[2, 3\]"):
        parse(a, {**a, "model": "b", "layer_range": [0, 3]})
    with pytest.raises(ValueError, match=r"slices\[0\].sources\[0\]: layer_range is \[first, one past the last\]"):
        parse({**a, "layer_range": [2, 2]})
    with pytest.raises(ValueError, match="residual_weight is not supported"):
        parse(a, residual_weight=0.5)


def test_models_are_checked_before_a_tensor_is_read(folders):
    class Headers:
        """A reader that cannot read."""

        def __init__(self, name, drop=None, shape=None):
            reader = safetensors.SafetensorsReader(folders[0] / name)
            self.specs = {k: v for k, v in reader.specs.items() if k != drop}
            if shape:
                self.specs[shape] = self.specs["model.norm.weight"]

    groups = lambda of_b: recipes.parse(RECIPE).groups(lambda name: of_b if name == "b" else Headers(name))
    assert len(groups(Headers("b"))) == 1
    with pytest.raises(ValueError, match=r"b has no lm_head.weight, which another model of the recipe has"):
        groups(Headers("b", drop="lm_head.weight"))
    with pytest.raises(
        ValueError, match=r"b, beside base, is not.*differs in shape lm_head.weight: \(11, 6\) and \(6,\)"
    ):
        groups(Headers("b", shape="lm_head.weight"))
    outside = {**RECIPE, "merge_method": "della", "parameters": {"density": [0.5, 0.1]}}
    with pytest.raises(ValueError, match=r"layers.3.*density - epsilon and density \+ epsilon must lie in \(0, 1\)"):
        recipes.parse(outside).groups(Headers)
    beyond = {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": "a", "layer_range": [2, 5]}]}],
    }
    with pytest.raises(ValueError, match="a has no layer 4"):
        recipes.parse(beyond).groups(Headers)


def test_references_in_mapping_form():
    reference = {"model": {"path": "org/model", "revision": "main"}, "lora": {"path": "org/lora"}}
    recipe = recipes.parse({"merge_method": "karcher", "models": [{"model": reference}, "b"]})
    assert recipe.models == ("org/model@main+org/lora", "b")
