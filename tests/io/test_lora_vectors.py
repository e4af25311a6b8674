"""Adapters as low-rank task vectors: products are the dense task vectors, and methods learn the same from both."""

import json
import pathlib

import jax
import numpy as np
import pytest

from taskvec import models, tree as trees
from taskvec.adaptive import rows as rows_lib
from taskvec.adaptive.atlas import atlas
from taskvec.adaptive.learn import Problem
from taskvec.io import lora_vectors, names, safetensors
from taskvec.io.folders import open_model
from taskvec.training.heads import make_heads
from taskvec.vectors import LowRank

RECORDED = pathlib.Path(__file__).parents[1] / "models" / "recorded"


def write(folder, base, modules, rank, rng, whole=(), **config):
    """An adapter of some modules; gives what it adds to every tensor, in float64 and the file's orientation."""
    specs, tensors, added = open_model(base).specs, {}, {}
    flip = config.get("fan_in_fan_out", False)
    scaling = 6 / (np.sqrt(rank) if config.get("use_rslora") else rank)
    for module in modules:
        out, into = specs[f"{module}.weight"].shape[:: -1 if flip else 1]
        a, b = rng.normal(0, 0.1, (rank, into)), rng.normal(0, 0.1, (out, rank))
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.astype(np.float32)
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.astype(np.float32)
        added[f"{module}.weight"] = scaling * ((b @ a).T if flip else b @ a)
    for name in whole:
        change = rng.normal(0, 0.1, specs[name].shape)
        module, _, last = name.rpartition(".")
        tensors[f"base_model.model.{module}.modules_to_save.{last}"] = (open_model(base).read(name) + change).astype(
            np.float32
        )
        added[name] = change
    folder.mkdir()
    safetensors.save(folder / "adapter_model.safetensors", tensors)
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "base_model_name_or_path": str(base), **config}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return added


TURN = {"none": lambda x: x, "transpose": np.transpose, "conv": lambda x: x.transpose(2, 3, 1, 0)}


def dense(model, base, added):
    """The tree of what is added, by the table of names alone."""
    specs = open_model(base).specs
    places = names.places(model.table, specs)
    change = lambda name: added.get(name, np.zeros(specs[name].shape)).astype(np.float32)
    return trees.stack_layers(trees.unflatten({p.path: TURN[p.op](change(name)) for name, p in places.items()}))


def products(tau):
    is_factors = lambda x: isinstance(x, LowRank)
    product = lambda t: np.asarray(t.up) @ np.asarray(t.down) if is_factors(t) else t
    return jax.tree.map(product, tau, is_leaf=is_factors)


def stacked(trees_):
    axis = lambda path: int(trees.is_stacked(path))
    return trees.map_with_path(lambda path, *x: np.stack(x, axis(path)), *trees_)


def modules_of(base, *ends):
    return [name.removesuffix(".weight") for name in open_model(base).specs if name.endswith(ends)]


def test_products_are_the_dense_task_vectors(tmp_path):
    rng, base = np.random.default_rng(0), RECORDED / "clip_tower"
    model, theta0 = models.load(base)
    queries, values = modules_of(base, "q_proj.weight"), modules_of(base, "v_proj.weight")
    norm, matrix = (
        modules_of(base, "post_layernorm.weight")[0] + ".weight",
        modules_of(base, "fc1.weight")[0] + ".weight",
    )
    added = [
        write(tmp_path / "a", base, [*queries, *values], 2, rng),
        write(tmp_path / "b", base, queries[1:], 3, rng, use_rslora=True),  # not in the first layer
        write(tmp_path / "c", base, values[:1], 1, rng, whole=[norm, matrix]),
    ]
    tau = lora_vectors.load(model.table, theta0, base, [tmp_path / x for x in "abc"])
    expected = stacked([dense(model, base, each) for each in added])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), products(tau), expected)
    attention, layers = tau["blocks"]["attention"], len(queries)
    width = theta0["blocks"]["attention"]["query"]["kernel"].shape[1]
    assert attention["query"]["kernel"].up.shape == (layers, 3, width, 3)  # the largest rank
    assert attention["key"]["kernel"].up.shape == (layers, 3, width, 0)  # nobody's
    dense_ones = {p.split("/")[-1] for p, x in trees.flatten(tau).items() if p.split("/")[-1] not in ("up", "down")}
    assert not isinstance(tau["blocks"]["mlp"]["up"]["kernel"], LowRank) and "scale" in dense_ones

    images = rng.integers(0, 256, (6, model.config.image_size, model.config.image_size, 3), np.uint8)
    heads = make_heads([np.linalg.qr(rng.normal(size=(model.feature_dim, 3)))[0] for _ in range(3)])
    rows = rows_lib.arrays([{"image": images}] * 3, [np.arange(6) % 3] * 3)
    run = lambda tau: atlas(
        Problem(model.apply, theta0, tau, heads, model.scanned), rows, epochs=4, learning_rate=0.02, per_task=3
    )
    low, high = run(tau), run(expected)
    np.testing.assert_allclose(low.coefficients, high.coefficients, atol=1e-4)
    np.testing.assert_allclose(low.history["loss"], high.history["loss"], rtol=1e-4)
    assert np.abs(low.coefficients).max() > 0.05


def test_kernels_that_files_hold_the_other_way(tmp_path):
    rng, base = np.random.default_rng(1), RECORDED / "gpt2_tiny"
    model, theta0 = models.load(base)
    modules = modules_of(base, "attn.c_proj.weight", "mlp.c_fc.weight")
    added = [write(tmp_path / "a", base, modules, 2, rng, fan_in_fan_out=True)]
    tau = lora_vectors.load(model.table, theta0, base, [tmp_path / "a"])
    expected = stacked([dense(model, base, added[0])])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), products(tau), expected)


def test_what_is_refused(tmp_path):
    base = RECORDED / "clip_tower"
    model, theta0 = models.load(base)
    load = lambda *refs: lora_vectors.load(model.table, theta0, base, refs)
    with pytest.raises(ValueError, match="at least one adapter"):
        load()
    with pytest.raises(ValueError, match="is no LoRA adapter"):
        load(base)
    queries = modules_of(base, "q_proj.weight")
    write(tmp_path / "a", base, queries, 2, np.random.default_rng(0))
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = dict(safetensors.load(file))
    tensors[f"base_model.model.{queries[0]}.lora_A.weight"] = np.full_like(
        tensors[f"base_model.model.{queries[0]}.lora_A.weight"], np.nan
    )
    safetensors.save(file, tensors)
    with pytest.raises(ValueError, match=r"NaN or infinity for .*q_proj"):
        load(tmp_path / "a")
