"""Files of learned coefficients, and what a table of them does in memory."""

import json

import numpy as np
import pytest

import taskvec as tv
from taskvec import tree as trees
from taskvec.adaptive.coefficients import coefficients as parametrisation
from taskvec.analysis import figures
from taskvec.io import coefficients as io
from tests.models_for_tests import random_models


def made(mode, tasks=("a", "b", "c")):
    theta0, experts = random_models(0, len(tasks))
    groups = trees.groups(theta0, mode)
    values = np.random.default_rng(1).normal(0.3, 0.4, (len(groups.names), len(tasks))).astype(np.float32)
    return theta0, experts, groups, io.of(theta0, values, groups.names, tasks, "adamerging", {"mode": mode})


@pytest.mark.parametrize("mode", ["task", "module", "tensor"])
def test_a_saved_table_merges_as_the_coefficients_do(tmp_path, mode):
    theta0, experts, groups, wanted = made(mode)
    io.save(tmp_path / "deep" / "found.json", wanted)
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["found.json", "found.npz"]
    found = io.load(tmp_path / "deep" / "found")
    np.testing.assert_array_equal(found.values, wanted.values)
    assert found[1:] == wanted[1:]
    table = dict(found.table())
    assert table["blocks/2/mlp/down"] == tuple(
        wanted.values[groups.names.index({"task": "all", "module": "blocks/2/mlp"}.get(mode, "blocks/2/mlp/down"))]
    )
    learned = parametrisation(groups, 3, wanted.values, "identity")
    expected = learned.merge(theta0, tv.task_vectors(theta0, experts), learned.init())
    merged = tv.merge("coefficients", theta0, experts, table=found.table())
    for path, x in trees.flatten(merged).items():
        np.testing.assert_allclose(x, trees.flatten(expected)[path], atol=1e-6, err_msg=path)
    if mode == "tensor":
        figures.coefficients(tmp_path / "x.png", found.groups, found.tasks, found.values)
        assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_settings_that_are_no_json_are_kept_as_text(tmp_path):
    settings = {"init": np.ones(2, np.float32), "rows": object, "rate": np.float32(0.5)}
    io.save(tmp_path / "x.npz", made("task")[3]._replace(settings=settings))
    found = io.load(tmp_path / "x.npz").settings
    assert found["init"] == [1.0, 1.0] and found["rate"] == 0.5 and "object" in found["rows"]


def test_what_does_not_belong_together_is_refused(tmp_path):
    theta0, experts, _, wanted = made("tensor")
    with pytest.raises(ValueError, match=r"groups x, .*none of this model's"):
        io.of(theta0, np.ones((1, 2)), ["x"], ["a", "b"], "adamerging", {})
    with pytest.raises(ValueError, match=r"shape \(2, 1\); .1 groups, 2 tasks"):
        io.of(theta0, np.ones((2, 1)), ["all"], ["a", "b"], "adamerging", {})
    with pytest.raises(ValueError, match="NaN"):
        io.of(theta0, np.full((1, 1), np.nan), ["all"], ["a"], "adamerging", {})
    with pytest.raises(FileNotFoundError, match=r"x.npz is not there; .* x.npz and x.json"):
        io.load(tmp_path / "x")
    io.save(tmp_path / "x", wanted)
    fields = json.loads((tmp_path / "x.json").read_text())
    (tmp_path / "x.json").write_text(json.dumps({**fields, "tasks": ["a"]}))
    with pytest.raises(ValueError, match="do not belong together"):
        io.load(tmp_path / "x")
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="no coefficients, or damaged"):
        io.load(tmp_path / "x")
    with pytest.raises(ValueError, match="2 weights a tensor for 3 task vectors"):
        tv.merge("coefficients", theta0, experts, table=[("stem/conv", [1, 2])])
    with pytest.raises(ValueError, match="names a twice"):
        tv.merge("coefficients", theta0, experts, table=[("a", [1]), ("a", [2])])
    with pytest.raises(ValueError, match=r"rows of .1, 2. weights"):
        tv.sum_by_name((("a", (1.0,)), ("b", (1.0, 2.0))))
    with pytest.raises(ValueError, match="read by `taskvec merge`"):
        tv.merge("coefficients", theta0, experts, file="x")
