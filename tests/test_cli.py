"""`taskvec merge` on tiny folders: what it writes, prints and refuses."""

import hashlib
import json
import os
import pathlib

import numpy as np
import pytest

import taskvec as tv
from taskvec import cli
from taskvec.commands import merge as command
from taskvec.io import safetensors
from tests.cli_for_tests import merge, refs, refused, run
from tests.io.folders_for_tests import BF16, SHAPES, D, V, adapter, family, llama, mean, pair, tensors, write


@pytest.mark.parametrize("name", SHAPES)
def test_the_mean_of_every_kind_of_model(tmp_path, name):
    made = family(tmp_path, SHAPES[name])
    out = merge(tmp_path, "--shard-size", "700")
    found = safetensors.load(out)
    assert {k: (v.shape, v.dtype) for k, v in found.items()} == {k: (v.shape, v.dtype) for k, v in made["base"].items()}
    for key, wanted in mean(made).items():
        np.testing.assert_allclose(found[key], wanted, rtol=1e-6, atol=1e-6, err_msg=key)
    files = {path.name for path in out.iterdir()}
    assert {"config.json", "tokenizer.json", "taskvec_merge.json", "model.safetensors.index.json"} <= files
    assert "README.md" not in files and not any(name.startswith(".") for name in files)


@pytest.mark.parametrize("method", ["ties", "dare", "tsv_m"])
def test_the_same_as_merge_in_memory(tmp_path, method):
    made = family(tmp_path, {"h.0.w": (6, 4), "h.1.w": (6, 4), "h.0.b": (4,), "wte": (30, 4)})
    # Little memory cuts the larger tensors into rows where the method allows.
    memory = "1MB" if method == "tsv_m" else "3kB"
    out = merge(tmp_path, "--set", "scale=0.7", "--memory", memory, method=method)
    wanted = tv.merge(method, made["base"], [made["a"], made["b"]], scale=0.7)
    for key, x in safetensors.load(out).items():
        np.testing.assert_allclose(x, wanted[key], rtol=1e-5, atol=1e-6, err_msg=key)


def test_the_dtype_of_the_output_and_of_its_config(tmp_path):
    made = family(tmp_path, llama(), dtype=BF16)
    out = merge(tmp_path)
    assert {x.dtype for x in safetensors.load(out).values()} == {np.dtype(BF16)}
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"  # as the base has it
    out = merge(tmp_path, "--dtype", "float16", "--overwrite")
    config = json.loads((out / "config.json").read_text())
    assert (config["dtype"], config["text_config"]["dtype"]) == ("float16", "float16")
    for key, x in safetensors.load(out).items():
        np.testing.assert_allclose(x, mean(made)[key].astype(np.float16), rtol=1e-3, atol=1e-3)


def test_integers_and_tensors_left_out_are_the_bases(tmp_path):
    made = family(tmp_path, llama())
    for name, start in (("base", 0), ("a", 5), ("b", 9)):
        write(tmp_path / name, made[name] | {"position_ids": np.arange(start, start + 4)}, shard_bytes=700)
    found = safetensors.load(merge(tmp_path, "--include", r"self_attn"))
    np.testing.assert_array_equal(found["position_ids"], np.arange(4))
    for key, x in made["base"].items():
        assert ("self_attn" in key) == (not np.array_equal(found[key], x)), key


def test_a_vocabulary_that_grew_is_named_and_can_be_left_out(tmp_path, capsys):
    made = family(tmp_path, llama())
    grown = tensors(llama() | {"model.embed_tokens.weight": (V + 1, D), "lm_head.weight": (V + 1, D)}, 5)
    write(tmp_path / "b", grown, shard_bytes=700)
    text = refused(capsys, "merge", "--method", "ties", *refs(tmp_path), "--out", tmp_path / "out")
    assert "vocabulary sizes differ: b has 12 rows" in text
    advice = text.partition("--include '")[2].partition("'")[0]
    found = safetensors.load(merge(tmp_path, "--include", advice))
    np.testing.assert_array_equal(found["lm_head.weight"], made["base"]["lm_head.weight"])


def test_tied_tensors_stored_twice_are_written_twice(tmp_path):
    made = {name: tensors(llama(tied=True), seed) for seed, name in enumerate(("base", "a", "b"))}
    for name, arrays in made.items():
        write(tmp_path / name, arrays | {"lm_head.weight": arrays["model.embed_tokens.weight"]})
    out = merge(tmp_path, "--set", "density=0.5", method="dare")
    found = safetensors.load(out)
    np.testing.assert_array_equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    tied = json.loads((out / "taskvec_merge.json").read_text())["output"]["tied"]
    assert tied == {"lm_head.weight": "model.embed_tokens.weight"}


def test_an_untied_expert_unties_the_config(tmp_path):
    made = family(tmp_path, llama(tied=True), config={"tie_word_embeddings": True})
    head = made["a"]["model.embed_tokens.weight"] + 1
    (tmp_path / "a" / "model.safetensors.index.json").unlink()
    [path.unlink() for path in (tmp_path / "a").glob("*.safetensors")]
    write(tmp_path / "a", made["a"] | {"lm_head.weight": head})
    out = merge(tmp_path)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    wanted = (head.astype(np.float64) + made["b"]["model.embed_tokens.weight"]) / 2
    np.testing.assert_allclose(safetensors.load(out)["lm_head.weight"], wanted, rtol=1e-6, atol=1e-6)


def test_without_a_base(tmp_path, capsys):
    made = family(tmp_path, llama())
    experts = ["--expert", f"x={tmp_path / 'a'}", "--expert", f"y={tmp_path / 'b'}"]
    run("merge", "--method", "weight_average", *experts, "--out", tmp_path / "out")
    for key, x in safetensors.load(tmp_path / "out").items():
        np.testing.assert_allclose(x, mean(made)[key], rtol=1e-6, atol=1e-6)
    text = refused(capsys, "merge", "--method", "ties", *experts, "--out", tmp_path / "out2")
    assert "ties needs the pretrained model" in text


def test_single_files(tmp_path):
    made = family(tmp_path, llama(), shard_bytes=10**9)
    words = [f"{word}/model.safetensors" if "/" in str(word) else word for word in map(str, refs(tmp_path))]
    words = [
        f"{pathlib.Path(w).parent.name}={w}" if w.endswith(("a/model.safetensors", "b/model.safetensors")) else w
        for w in words
    ]
    run("merge", "--method", "weight_average", *words, "--out", tmp_path / "x" / "merged.safetensors")
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == ["merged.safetensors", "merged.taskvec_merge.json"]
    for key, x in safetensors.load(tmp_path / "x" / "merged.safetensors").items():
        np.testing.assert_allclose(x, mean(made)[key], rtol=1e-6, atol=1e-6)


def test_adapters_by_delta_and_by_factor(tmp_path, capsys):
    base = tensors(llama(), 0)
    write(tmp_path / "base", base)
    name = "model.layers.1.self_attn.o_proj"
    made = {}
    for seed, who in enumerate("ab"):
        made[who] = pair(name, (2, D), (D, 2), seed=seed)
        adapter(tmp_path / who, made[who])
    out = merge(tmp_path)
    sums = [x[f"{name}.lora_B.weight"].astype(np.float64) @ x[f"{name}.lora_A.weight"] for x in made.values()]
    wanted = base[f"{name}.weight"] + 3 / 2 * (sums[0] + sums[1]) / 2
    found = safetensors.load(out)
    np.testing.assert_allclose(found[f"{name}.weight"], wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found["lm_head.weight"], base["lm_head.weight"])

    words = ["merge", "--method", "weight_average", "--lora", "factor", *refs(tmp_path)[2:]]
    run(*words, "--out", tmp_path / "factors")
    factors = safetensors.load(tmp_path / "factors" / "adapter_model.safetensors")
    for key, x in factors.items():
        bare = key.removeprefix("base_model.model.")
        np.testing.assert_allclose(x, (made["a"][bare] + made["b"][bare]) / 2, rtol=1e-6)
    assert json.loads((tmp_path / "factors" / "adapter_config.json").read_text())["r"] == 2
    assert "leave out --base" in refused(capsys, *words, "--base", tmp_path / "base", "--out", tmp_path / "o")
    adapter(tmp_path / "c", made["a"], lora_alpha=7)
    text = refused(capsys, *words, "--expert", tmp_path / "c", "--out", tmp_path / "o")
    assert "lora_alpha is 7 in c and 3 in a" in text


def test_the_record_repeats_the_merge_exactly(tmp_path, monkeypatch, capsys):
    family(tmp_path, llama())
    monkeypatch.chdir(tmp_path)
    words = ["--base", "base", "--expert", "one=a", "--expert", "b", "--set", "density=0.6", "--set", "seed=4"]
    run("merge", "--method", "dare_ties", *words, "--dtype", "bfloat16", "--memory", "3kB", "--out", "out")
    record = json.loads((tmp_path / "out" / "taskvec_merge.json").read_text())
    assert record["request"]["settings"] == {
        "density": 0.6, "scale": 1.0, "trim_density": 1.0, "aggregate": "mean", "rescale": "inverse_density", "seed": 4
    }  # fmt: skip
    assert record["request"]["experts"] == [["one", str(tmp_path / "a")], ["b", str(tmp_path / "b")]]
    assert {"taskvec", "jax", "numpy", "python"} <= record["versions"].keys()
    file = record["inputs"]["one"]["files"][0]
    assert file["bytes"] == os.path.getsize(file["path"]) and len(file["sha256"]) == 64
    monkeypatch.chdir("/")
    run("merge", tmp_path / "out" / "taskvec_merge.json", "--out", tmp_path / "again")
    weights = [p.read_bytes() for folder in ("out", "again") for p in sorted((tmp_path / folder).glob("*.safetensors"))]
    assert weights[0] == weights[1]
    # Rounding depends on the blocks of rows, and these on the memory.
    again = json.loads((tmp_path / "again" / "taskvec_merge.json").read_text())
    assert record["request"]["memory"] == again["request"]["memory"] == 3000

    write(tmp_path / "a", tensors(llama(), 77), shard_bytes=700)
    text = refused(capsys, "merge", tmp_path / "out" / "taskvec_merge.json", "--out", tmp_path / "third")
    assert "is not the file of the recorded merge" in text and not (tmp_path / "third").exists()


def test_extras_are_used_checked_and_recorded(tmp_path, capsys):
    made = family(tmp_path, {"h.0.w": (6, 4), "h.1.w": (5, 3), "h.0.b": (4,)})
    rng, grams = np.random.default_rng(7), {}
    for who in "ab":
        x = {"h.0.w": rng.standard_normal((20, 4)), "h.1.w": rng.standard_normal((20, 3)) + 1}
        grams[who] = {name: (rows.T @ rows / 20).astype(np.float32) for name, rows in x.items()}
        safetensors.save(tmp_path / f"gram_{who}.safetensors", grams[who])
    words = [word for who in "ab" for word in ("--extra", f"gram={tmp_path / f'gram_{who}.safetensors'}")]
    merge(tmp_path, *words, "--dry-run", method="regmean")
    assert "gram of a" in capsys.readouterr().out
    out = merge(tmp_path, *words, method="regmean")
    stacked = {name: np.stack([grams[who][name] for who in "ab"]) for name in grams["a"]}
    wanted = tv.merge("regmean", made["base"], [made["a"], made["b"]], extras={"gram": stacked})
    for key, x in safetensors.load(out).items():
        np.testing.assert_allclose(x, wanted[key], rtol=1e-5, atol=1e-6, err_msg=key)
        assert np.allclose(x, mean(made)[key], atol=1e-3) == (key == "h.0.b")
    record = json.loads((out / "taskvec_merge.json").read_text())
    file = record["inputs"]["gram of b"]["files"][0]
    digest = hashlib.sha256((tmp_path / "gram_b.safetensors").read_bytes()).hexdigest()
    assert file == {"path": str(tmp_path / "gram_b.safetensors"), "bytes": file["bytes"], "sha256": digest}
    run("merge", out / "taskvec_merge.json", "--out", tmp_path / "again")
    again = [safetensors.load(folder) for folder in (out, tmp_path / "again")]
    assert all(np.array_equal(again[0][key], again[1][key]) for key in wanted)

    safetensors.save(tmp_path / "gram_b.safetensors", grams["a"])
    text = refused(capsys, "merge", out / "taskvec_merge.json", "--out", tmp_path / "third")
    assert "gram of b" in text and "is not the file of the recorded merge" in text
    safetensors.save(tmp_path / "gram_b.safetensors", grams["a"] | {"h.0.w": np.eye(5, dtype=np.float32)})
    text = refused(capsys, "merge", "--method", "regmean", *refs(tmp_path), *words, "--out", tmp_path / "third")
    assert "extra 'gram' differs between models 0 and 1" in text and not (tmp_path / "third").exists()
    text = refused(capsys, "merge", "--method", "regmean", *refs(tmp_path), *words[:2], "--out", tmp_path / "third")
    assert "needed once for each of the 2 experts" in text


RECIPE = """
merge_method: linear
models:
  - model: a
    parameters: {weight: [0.25, 1.0]}
  - model: b
    parameters: {weight: 1}
dtype: float16
"""


def test_a_recipe_and_its_record(tmp_path, monkeypatch, capsys):
    made = family(tmp_path, llama())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yml").write_text(RECIPE)
    run("merge", "recipe.yml", "--dry-run")
    text = capsys.readouterr().out
    assert "weight=0.25" in text and "weight=1.0" in text
    run("merge", "recipe.yml", "--out", "out")
    found = safetensors.load(tmp_path / "out")
    weights = {"model.embed_tokens.weight": 0.25, "model.layers.1.mlp.up_proj.weight": 0.625}
    for key, weight in weights.items():
        wanted = (weight * made["a"][key].astype(np.float64) + made["b"][key]) / (weight + 1)
        np.testing.assert_allclose(found[key], wanted, rtol=2e-3, atol=1e-3)
        assert found[key].dtype == np.float16
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"
    monkeypatch.chdir("/")
    run("merge", tmp_path / "out" / "taskvec_merge.json", "--out", tmp_path / "again")
    for key, x in safetensors.load(tmp_path / "again").items():
        np.testing.assert_array_equal(x, found[key])
    assert "leave out --base" in refused(
        capsys, "merge", tmp_path / "recipe.yml", "--base", "x", "--out", tmp_path / "o"
    )


def test_a_recipe_that_stacks_slices_changes_the_number_of_layers(tmp_path, monkeypatch):
    made = family(tmp_path, llama(), config={"num_hidden_layers": 3, "layer_types": ["full"] * 3})
    parts = [f"  - sources: [{{model: {tmp_path / name}, layer_range: [0, 2]}}]" for name in "ab"]
    (tmp_path / "recipe.yml").write_text("\n".join(["merge_method: passthrough", "slices:", *parts]))
    run("merge", tmp_path / "recipe.yml", "--out", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 4 and config["layer_types"] == ["full"] * 4
    found = safetensors.load(tmp_path / "out")
    key = "self_attn.q_proj.weight"
    np.testing.assert_array_equal(found[f"model.layers.3.{key}"], made["b"][f"model.layers.1.{key}"])


def test_without_hashes(tmp_path):
    family(tmp_path, llama())
    record = json.loads((merge(tmp_path, "--no-hash") / "taskvec_merge.json").read_text())
    assert all("sha256" not in file for each in record["inputs"].values() for file in each["files"])


def test_a_dry_run_prints_the_plan_and_reads_no_tensor(tmp_path, capsys, monkeypatch):
    family(tmp_path, llama(), config={"tie_word_embeddings": False})
    monkeypatch.setattr(safetensors.SafetensorsReader, "read", None)
    merge(tmp_path, "--set", "weights=(0.25,2)", "--dry-run", method="task_arithmetic")
    text = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    for wanted in ("model.layers.0 to 2", "0.075", "0.6", "passes over the inputs", "weights=(0.25, 2)", "free"):
        assert wanted in text, (wanted, text)


@pytest.mark.parametrize(
    ("method", "settings", "wanted"),
    [
        ("ties", ("scale=0.7",), "0.7 x by entry"),
        ("pcb", ("weights=(0.5,2)",), "2.4 x by entry"),
        ("lines", (), "measured"),
        ("layer_swapping", ("bottom=1", "top=1", "transition=0", "outside='mean'"), "0.5"),
    ],
)
def test_a_dry_run_prints_the_factors_that_the_settings_give(tmp_path, capsys, method, settings, wanted):
    family(tmp_path, llama(), config={"tie_word_embeddings": False})
    merge(tmp_path, *(word for each in settings for word in ("--set", each)), "--dry-run", method=method)
    text = capsys.readouterr().out
    assert wanted in text and ("by entry" in text) == ("by entry" in wanted)


def test_orbax_as_input(tmp_path, capsys):
    import orbax.checkpoint as ocp

    made = {name: {"params": {"w": x["w"]}} for name, x in family(tmp_path, {"w": (3, 2)}).items()}
    with ocp.StandardCheckpointer() as checkpointer:
        for name, tree in made.items():
            checkpointer.save(tmp_path / "orbax" / name, tree)
    words = ["merge", "--method", "weight_average", *refs(tmp_path / "orbax"), "--out", tmp_path / "out"]
    # A row of both experts and the base takes 88 bytes; leaves are restored whole, and twice for a moment: 3 x 2 x 24.
    assert "for what checkpoints give whole only" in refused(capsys, *words, "--memory", "231")
    run(*words, "--memory", "232")
    found = safetensors.load(tmp_path / "out")
    wanted = (made["a"]["params"]["w"] + made["b"]["params"]["w"]) / 2
    np.testing.assert_allclose(found["params/w"], wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "tyes"], "unknown method 'tyes' (did you mean 'ties'?)"),
        (["--method", "ties", "--set", "densty=0.2"], "ties has no setting 'densty' (did you mean 'density'?)"),
        (["--method", "ties", "--set", "density=20"], "density must lie in (0, 1], got 20"),
        (["--method", "ties", "--set", "density=high"], "ties: a setting has the wrong type"),
        (["--method", "ties", "--set", "density"], "--set takes key=value"),
        (["--method", "ties", "--dtype", "int8"], "unknown dtype 'int8'; allowed: float32, bfloat16, float16"),
        (["--method", "ties", "--memory", "lots"], "a size is written like 2GB"),
        (["--method", "ties", "--include", "("], "is no regular expression"),
        (["--method", "ties", "--include", "nothing"], "no floating-point leaf matches"),
        (["--method", "ties", "--task", "a"], "gives one model for all tasks: leave out --task"),
        (["--method", "ties", "--memory", "100"], "allow more"),
        (["--method", "nearswap"], "fine-tuned models, got 2"),
        (["--method", "fisher"], "needs extras"),
        (["--method", "greedy_soup"], "call taskvec.merging.search.greedy_soup(models, evaluate) from Python"),
        (["--method", "pcb_search"], "is merged by `taskvec merge --method pcb --set weights=...`"),
        ([], "say how to merge"),
    ],
)
def test_what_is_wrong_is_said_before_a_tensor_is_read(tmp_path, capsys, monkeypatch, words, message):
    family(tmp_path, llama(), config={"tie_word_embeddings": False})
    monkeypatch.setattr(safetensors.SafetensorsReader, "read", None)
    text = refused(capsys, "merge", *words, *refs(tmp_path), "--out", tmp_path / "out")
    assert message in text
    assert not (tmp_path / "out").exists()


def test_where_to_write(tmp_path, capsys, monkeypatch):
    family(tmp_path, llama())
    words = ["merge", "--method", "weight_average", *refs(tmp_path)]
    assert "say where to write" in refused(capsys, *words)
    assert "holds an input of this merge" in refused(capsys, *words, "--out", tmp_path / "a")
    (tmp_path / "file").write_text("")
    assert "is a file; --out names a folder" in refused(capsys, *words, "--out", tmp_path / "file")
    merge(tmp_path)
    assert "already holds" in refused(capsys, *words, "--out", tmp_path / "out")
    merge(tmp_path, "--overwrite", "--shard-size", "700")
    assert not (tmp_path / "out" / "model.safetensors").exists()
    monkeypatch.setattr(command.shutil, "disk_usage", lambda path: command.shutil._ntuple_diskusage(9, 9, 5))
    assert "free and the result needs" in refused(capsys, *words, "--out", tmp_path / "full")


def test_debug_shows_where_an_error_came_from(tmp_path):
    with pytest.raises(ValueError, match="unknown method"):
        cli.main(["merge", "--method", "tyes", "--expert", "x", "--out", "y", "--debug"])
