"""Files of learned coefficients, and what a table of them does in memory."""

import json
import zlib

import numpy as np
import pytest

import taskvec as tv
from taskvec import tree as trees
from taskvec.adaptive.coefficients import coefficients as parametrisation
from taskvec.analysis import figures
from taskvec.io import coefficients as io
from taskvec.transforms.by_name import sum_by_part
from taskvec.transforms.plan import Tensor, make_leaf, path_hash
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


@pytest.mark.parametrize("partitioned", ["all", "matrices"])
def test_a_saved_table_of_parts_merges_as_they_do(tmp_path, partitioned):
    theta0, experts = random_models(0, 2)
    groups, tau = trees.groups(theta0, "module"), tv.task_vectors(theta0, experts)
    values = np.random.default_rng(1).normal(0.3, 0.4, (len(groups.names), 2, 3)).astype(np.float32)
    learned = parametrisation(groups, 2, 0.0, "identity", 3, seed=7, shared_parts=partitioned == "matrices")
    expected = learned.merge(theta0, tau, {"lam": values})
    settings = {"partitions": 3, "partitioned": partitioned}
    with pytest.raises(ValueError, match="give the seed"):
        io.of(theta0, values, groups.names, ["a", "b"], "atlas", settings)
    io.save(tmp_path / "x", io.of(theta0, values, groups.names, ["a", "b"], "atlas", settings, seed=7))
    found = io.load(tmp_path / "x")
    merged = tv.merge("coefficients", theta0, experts, table=found.table(), parts=found.drawn)
    start, expected = trees.flatten(theta0), trees.flatten(expected)
    for path, x in trees.flatten(merged).items():
        divided = partitioned == "all" or x.ndim - trees.is_stacked(path) == 2
        np.testing.assert_allclose(x, expected[path] if divided else start[path], atol=1e-6, err_msg=path)
        assert np.abs(x - start[path]).max() > 1e-2 or path != "blocks/mlp/down"
    figures.coefficients(tmp_path / "x.png", found.groups, found.tasks, found.values)
    fields = json.loads((tmp_path / "x.json").read_text())
    (tmp_path / "x.json").write_text(json.dumps({**fields, "parts": None}))
    with pytest.raises(ValueError, match="do not belong together"):
        io.load(tmp_path / "x")


def test_rows_of_a_tensor_have_the_parts_of_the_whole():
    x_TxMxN = np.random.default_rng(0).normal(size=(2, 6, 5)).astype(np.float32)
    table = (("a/b", (1.0, 2.0, 3.0, -1.0, -2.0, -3.0), "other", (1, 6)),)
    apply = tv.chain(sum_by_part(table, 3, 5, False)).stages[0].apply
    tensor = lambda rows, row0: make_leaf(
        Tensor(False, (6, 5), np.int32(-1), np.uint32(path_hash("a/b")), frozenset()), None, None, rows, {}, row0
    )
    whole = apply(x_TxMxN, tensor(x_TxMxN, 0), ())
    np.testing.assert_array_equal(apply(x_TxMxN[:, 2:5], tensor(x_TxMxN[:, 2:5], 2), ()), whole[2:5])
    root, part = zlib.crc32(b"other") ^ (5 * 0x9E3779B1 % 2**32), np.zeros((6, 5), int)
    for (i, j), _ in np.ndenumerate(part):  # column by column: a transposed copy
        n = (i + 6 * j + root) * 0x9E3779B1 % 2**32
        n = (n ^ n >> 16) * 0x85EBCA6B % 2**32
        n = (n ^ n >> 13) * 0xC2B2AE35 % 2**32
        part[i, j] = (n ^ n >> 16) % 3
    assert set(part.ravel()) == {0, 1, 2}
    np.testing.assert_allclose(whole, (part + 1) * (x_TxMxN[0] - x_TxMxN[1]), rtol=1e-6)


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
    with pytest.raises(ValueError, match="2 weights per tensor for 3 task vectors"):
        tv.merge("coefficients", theta0, experts, table=[("stem/conv", [1, 2])])
    with pytest.raises(ValueError, match="names a twice"):
        tv.merge("coefficients", theta0, experts, table=[("a", [1]), ("a", [2])])
    with pytest.raises(ValueError, match=r"rows of .1, 2. weights"):
        tv.sum_by_name((("a", (1.0,)), ("b", (1.0, 2.0))))
    with pytest.raises(ValueError, match="read by `taskvec merge`"):
        tv.merge("coefficients", theta0, experts, file="x")
