"""What the README shows works: the new method passes the whole battery, the short program runs."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import taskvec as tv
from taskvec import models, tree as trees
from taskvec.merging import registry
from taskvec.models import efficientnet
from tests.merging import battery
from tests.models_for_tests import random_models

README = pathlib.Path(__file__).parents[1].joinpath("README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.fixture
def new_method():
    """The README's own method, registered for the length of a test."""
    source = next(block for block in BLOCKS if "register(" in block)
    before = dict(registry._METHODS)
    exec(compile(source, "README.md", "exec"), {"__name__": "equal_norms"})
    yield next(m for name, m in tv.methods().items() if name not in before)
    registry._METHODS.clear()
    registry._METHODS.update(before)


@pytest.mark.parametrize("check", battery.CHECKS, ids=lambda check: check.__name__)
def test_new_method_passes_the_battery(new_method, check):
    check(new_method)


def test_new_method_streams_and_follows_its_formula(new_method, tmp_path):
    battery.streamed_equals_in_memory(new_method, tmp_path)
    pretrained, finetuned = random_models(11, 3)
    names = [n for n in trees.flatten(pretrained) if n != "position_ids"]
    flat = lambda p: np.concatenate([np.asarray(trees.flatten(p)[n], np.float64).ravel() for n in names])
    taus = [flat(f) - flat(pretrained) for f in finetuned]
    mean = np.mean([np.linalg.norm(tau) for tau in taus])
    merged = flat(tv.merge(new_method, pretrained, finetuned)) - flat(pretrained)
    np.testing.assert_allclose(merged, 0.3 * sum(mean / np.linalg.norm(tau) * tau for tau in taus), atol=1e-6)


@pytest.mark.parametrize("name", sorted(tv.methods()))
def test_every_method_is_named(name):
    assert f"`{name}`" in README


def test_short_program(tmp_path, monkeypatch):
    """The program of the first screen, on experts of the right layout (untrained ones: it runs in seconds)."""
    model = efficientnet.make()
    rng = np.random.default_rng(0)
    draw = lambda x, size: jnp.asarray(size * rng.standard_normal(x.shape), x.dtype)
    pretrained = jax.tree.map(lambda x: draw(x, 0.1), model.abstract)
    models.save(tmp_path / "results/experts/pretrained", model, pretrained)
    for task in ("digits", "mnist5k", "animals"):
        expert = jax.tree.map(lambda x: x + draw(x, 0.01), pretrained)
        models.save(tmp_path / f"results/experts/seed0/{task}", model, expert)
    monkeypatch.chdir(tmp_path)
    program = next(block for block in BLOCKS if "models.load" in block)
    exec(compile(program, "README.md", "exec"), {})
    _, merged = models.load("results/merged")
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, pretrained)
