"""The programs of docs/adaptive.md run as they stand, one after the other."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

from taskvec import models, tree as trees
from taskvec.adaptive import registry
from taskvec.io import coefficients, peft
from taskvec.training.heads import normalise

PAGE = pathlib.Path(__file__).parents[2].joinpath("docs/adaptive.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"```python\n(.*?)```", PAGE, re.S)
RECORDED = pathlib.Path(__file__).parents[1] / "models" / "recorded" / "clip_tower"


def test_the_programs_of_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, base = models.load(RECORDED)
    models.save("base", model, base)
    rng, size = np.random.default_rng(0), model.config.image_size
    for task in "ab":
        noise = lambda x: x + 0.02 * jnp.asarray(rng.standard_normal(x.shape), x.dtype)
        models.save(f"expert_{task}", model, jax.tree.map(noise, base))
        np.save(f"head_{task}.npy", np.asarray(normalise(rng.standard_normal((3, model.feature_dim)))).T)
        np.save(f"images_{task}.npy", rng.integers(0, 256, (9, size, size, 3), np.uint8))
        np.save(f"labels_{task}.npy", np.arange(9) % 3)
        layers, d, _ = base["blocks"]["attention"]["query"]["kernel"].shape
        factors = {name: 0.1 * rng.standard_normal((layers, *shape)) for name, shape in (("a", (d, 2)), ("b", (2, d)))}
        query = {"blocks": {"attention": {"query": {"kernel": factors}}}}
        peft.save_adapter(f"adapter_{task}", model.table, query, alpha=4.0, base="base")
    before, found = dict(registry._METHODS), {}
    for program in PROGRAMS:
        exec(compile(program, "adaptive.md", "exec"), found)
    try:
        again = coefficients.load("learned")
        np.testing.assert_allclose(again.values, found["found"].coefficients)
        composed, before_it = (trees.flatten(x) for x in (models.load("composed")[1], base))
        changed = {path for path, x in composed.items() if not np.array_equal(x, before_it[path])}
        assert changed <= {"blocks/attention/query/kernel"} and composed.keys() == before_it.keys()
        assert again.tasks == ("a", "b") and list(found["found"].evaluations) == [5, 10]
        mine = found["self_training"](found["problem"], found["unlabelled"], steps=2, per_task=4)
        assert mine.coefficients.shape == (model.config.num_hidden_layers + 1, 2)
    finally:
        registry._METHODS.clear()
        registry._METHODS.update(before)


def test_every_method_is_on_the_page():
    assert all(f"`{name}`" in PAGE for name in registry.methods())
