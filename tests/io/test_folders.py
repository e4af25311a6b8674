"""Opening models by name, and bringing them to one set of names."""

import json
import threading

import numpy as np
import pytest

from taskvec.io import prefixes, safetensors
from taskvec.io.align import align, tied_to
from taskvec.io.folders import open_model
from tests.io import hub_for_tests as fake_hub, torch_files_for_tests as torch_files
from tests.io.folders_for_tests import BF16, SHAPES, D, F, V, bert, family, llama, tensors, write


def opened(root, *names):
    return [open_model(root / name) for name in names]


def aligned(root, *names, **more):
    return align(opened(root, *names), names, **more)


def read_all(view):
    return {name: view.read(name) for name in view.specs}


@pytest.mark.parametrize("shard_bytes", [700, 10**9])
def test_folders_and_files(tmp_path, shard_bytes):
    made = tensors(SHAPES["llama"], 0)
    folder = write(tmp_path / "m", made, shard_bytes=shard_bytes)
    model = open_model(folder)
    assert model.kind == "folder" and model.home == folder and model.config["model_type"] == "any"
    assert (len(model.files) > 1) == (shard_bytes == 700)
    for name, x in made.items():
        np.testing.assert_array_equal(model.read(name), x)
    file = open_model(model.files[0])
    assert file.kind == "file" and file.home is None and file.specs.keys() <= made.keys()


def test_a_folder_whose_only_file_has_another_name(tmp_path):
    safetensors.save(tmp_path / "m" / "weights.safetensors", tensors({"a": (2,)}, 0))
    assert open_model(tmp_path / "m").home == tmp_path / "m"


def test_threads_may_read_at_once(tmp_path):
    made = tensors({f"layers.{i}.w": (64, 33) for i in range(8)}, 0)
    reader = safetensors.SafetensorsReader(write(tmp_path / "m", made, shard_bytes=10_000))
    wrong = []

    def work():
        for name, x in made.items():
            for at in range(0, 64, 5):
                if not np.array_equal(reader.read(name, slice(at, at + 5)), x[at : at + 5]):
                    wrong.append(name)

    threads = [threading.Thread(target=work) for _ in range(6)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16, np.float64])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_not_finite_is_found_in_every_dtype(tmp_path, dtype, bad):
    x = np.linspace(-3, 3, 200_000).astype(dtype)
    safetensors.save(tmp_path / "ok.safetensors", {"x": x})
    safetensors.SafetensorsReader(tmp_path / "ok.safetensors").read("x")
    x[123_456] = bad
    safetensors.save(tmp_path / "bad.safetensors", {"x": x})
    with pytest.raises(ValueError, match=r"bad.safetensors: tensor x holds NaN or infinity in 1 of 200000"):
        safetensors.SafetensorsReader(tmp_path / "bad.safetensors").read("x")


def test_a_file_that_changes_while_it_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.save(path, {"x": np.zeros(4, np.float32)})
    reader = safetensors.SafetensorsReader(path)
    safetensors.save(path, {"x": np.zeros(40, np.float32)})
    with pytest.raises(ValueError, match="was changed while it was being read"):
        reader.read("x")


def test_orbax_leaves_come_one_at_a_time(tmp_path):
    import jax.numpy as jnp
    import orbax.checkpoint as ocp

    tree = {"params": {"blocks": {"0": {"w": jnp.ones((3, 2), jnp.bfloat16)}}, "e": np.arange(6, dtype=np.float32)}}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "plain", tree)
    manager = ocp.CheckpointManager(tmp_path / "steps")
    for step in (2, 10):
        manager.save(step, args=ocp.args.StandardSave(tree))
    manager.wait_until_finished()
    manager.close()
    for path in ("plain", "steps"):
        model = open_model(tmp_path / path)
        assert model.kind == "orbax" and model.home is None
        assert {k: (v.shape, str(v.dtype)) for k, v in model.specs.items()} == {
            "params/blocks/0/w": ((3, 2), "bfloat16"),
            "params/e": ((6,), "float32"),
        }
        np.testing.assert_array_equal(model.read("params/e", slice(2, 4)), [2, 3])
        assert model.read("params/blocks/0/w").dtype == BF16
    assert "10" in str(open_model(tmp_path / "steps").files[0])


@pytest.mark.parametrize(
    ("config", "names", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, ["a"], r"is quantised \(gptq"),
        ({}, ["h.0.q.qweight", "h.0.q.scales"], r"holds quantised weights \(h.0.q.qweight\)"),
        ({}, ["h.0.q.weight", "h.0.q.weight.absmax"], "holds quantised weights"),
        ({}, ["h.0.q.weight", "h.0.q.SCB"], "holds quantised weights"),
    ],
)
def test_quantised_weights_are_refused(tmp_path, config, names, message):
    write(tmp_path / "m", {name: np.zeros(2, np.float32) for name in names}, config)
    with pytest.raises(ValueError, match=message):
        open_model(tmp_path / "m")


def test_a_model_that_is_not_there(tmp_path, monkeypatch):
    write(tmp_path / "here", {"a": np.zeros(1, np.float32)})
    with pytest.raises(FileNotFoundError, match=r"ther is no file or folder here; .* holds here"):
        open_model(tmp_path / "ther")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"no-such-model is no file or folder here, and the Hugging Face hub"):
        open_model("no-such-model")


def test_a_hub_id_is_fetched_and_pinned_to_its_commit(tmp_path, monkeypatch):
    folder = write(tmp_path / "models--a--b" / "snapshots" / "0123abc", {"a": np.zeros(1, np.float32)})
    asked = {}

    def fetch(name, revision, allow_patterns):
        asked.update(name=name, revision=revision)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert open_model("a/b@main").pinned == "a/b@0123abc"
    assert asked == {"name": "a/b", "revision": "main"}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Repositories in folders ``OWNER/NAME`` below `hub.root`, fetched by patterns as from the hub; `hub.fetched`."""
    return fake_hub.install(monkeypatch, tmp_path / "hub", tmp_path / "fetched")


def test_weights_of_pytorch_are_fetched_where_there_are_no_others(hub):
    arrays = tensors({"a": (2, 3)}, 0)
    torch_files.save_folder(write(hub.root / "o" / "old", arrays), arrays)
    write(hub.root / "o" / "new", arrays)
    (hub.root / "o" / "new" / "pytorch_model.bin").write_bytes(b"large")
    for name, file in (("o/old", "pytorch_model.bin"), ("o/new", "model.safetensors")):
        model = open_model(name)
        np.testing.assert_array_equal(model.read("a"), arrays["a"])
        assert [path.name for path in model.files] == [file] and model.home.name == "0123abc"
    assert not (model.home / "pytorch_model.bin").exists()


def test_a_folder_of_a_hub_repository(hub, tmp_path, monkeypatch):
    made = {task: tensors({"a": (2, 3)}, seed) for seed, task in enumerate(("cola", "rte"))}
    write(hub.root / "o" / "many" / "cola" / "lr1e-05", made["cola"])
    torch_files.save_folder(write(hub.root / "o" / "many" / "rte" / "lr1e-05", made["rte"]), made["rte"])
    for task, arrays in made.items():
        model = open_model(f"o/many/{task}/lr1e-05@main")
        np.testing.assert_array_equal(model.read("a"), arrays["a"])
        assert model.pinned == f"o/many/{task}/lr1e-05@0123abc" and model.home.name == "lr1e-05"
        np.testing.assert_array_equal(open_model(model.pinned).read("a"), arrays["a"])
        others = {"cola", "rte"} - {task}
        assert task != "cola" or not any((hub.fetched / "o" / "many" / "0123abc" / other).exists() for other in others)
    with pytest.raises(FileNotFoundError, match=r"the hub's o/many has no mrpc/lr1e-05; check"):
        open_model("o/many/mrpc/lr1e-05")
    # What begins with a folder of this disk is a path of this disk.
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "runs" / "best" / "cola", made["cola"])
    with pytest.raises(FileNotFoundError, match=r"no file or folder here; runs/best holds cola"):
        open_model("runs/best/colas")


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


# LoRA: the oracle is the sum written out with float64 matrices.

BASE = {
    "model.layers.0.self_attn.q_proj.weight": (6, 4),
    "model.layers.1.self_attn.q_proj.weight": (6, 4),
    "model.layers.0.mlp.c_fc.weight": (4, 10),
    "model.embed_tokens.weight": (11, 4),
    "patch.weight": (5, 3, 2, 2),
    "model.norm.weight": (4,),
    "score.weight": (2, 4),
}


def adapter(folder, factors, **config):
    folder.mkdir(parents=True)
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "bias": "none", "fan_in_fan_out": False} | config
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    safetensors.save(folder / "adapter_model.safetensors", {f"base_model.model.{k}": v for k, v in factors.items()})
    return folder


def pair(module, a, b, kind="lora_{}.weight", seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    draw = lambda shape: rng.standard_normal(shape).astype(dtype)
    return {f"{module}.{kind.format('A')}": draw(a), f"{module}.{kind.format('B')}": draw(b)}


def check_rows(model, name, wanted):
    np.testing.assert_allclose(model.read(name), wanted, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(model.read(name, slice(1, 3)), wanted[1:3], rtol=1e-6, atol=1e-6)
    assert model.read(name).dtype == model.specs[name].dtype == np.float32


def test_lora_sums(tmp_path):
    base = tensors(BASE, 0, dtype=BF16)
    write(tmp_path / "base", base)
    q0, q1, c = (f"model.layers.{i}" for i in ("0.self_attn.q_proj", "1.self_attn.q_proj", "0.mlp.c_fc"))
    factors = pair(q0, (2, 4), (6, 2)) | pair(q1, (3, 4), (6, 3), seed=1, dtype=BF16)
    factors |= pair("patch", (2, 3, 2, 2), (5, 2, 1, 1), seed=2)
    factors |= pair("model.embed_tokens", (2, 11), (4, 2), "lora_embedding_{}", seed=3)
    factors |= {"score.weight": np.ones((2, 4), np.float32)}
    adapter(
        tmp_path / "a", factors, rank_pattern={"layers.1.self_attn.q_proj": 3}, alpha_pattern={r".*\.0\..*q_proj": 8}
    )
    model = open_model(tmp_path / "a", open_model(tmp_path / "base"))
    wide = {k: v.astype(np.float64) for k, v in (base | factors).items()}
    part = lambda module, kind="lora_{}.weight": [wide[f"{module}.{kind.format(x)}"] for x in "AB"]
    a, b = part(q0)
    check_rows(model, f"{q0}.weight", wide[f"{q0}.weight"] + 8 / 2 * b @ a)
    a, b = part(q1)
    check_rows(model, f"{q1}.weight", wide[f"{q1}.weight"] + 3 / 3 * b @ a)
    a, b = part("model.embed_tokens", "lora_embedding_{}")
    check_rows(model, "model.embed_tokens.weight", wide["model.embed_tokens.weight"] + 3 / 2 * (b @ a).T)
    a, b = part("patch")
    wanted = wide["patch.weight"] + 3 / 2 * np.einsum("or,rihw->oihw", b[:, :, 0, 0], a)
    check_rows(model, "patch.weight", wanted)
    np.testing.assert_array_equal(model.read("score.weight"), 1)
    assert model.read(f"{c}.weight").dtype == BF16 and model.path_of(f"{c}.weight").parent.name == "base"
    assert model.home == tmp_path / "base" and model.kind == "lora"


def test_lora_of_transposed_weights_with_rslora_on_a_base_without_prefix(tmp_path):
    base = tensors({"h.0.c_fc.weight": (4, 10), "wte.weight": (5, 4)}, 0)
    write(tmp_path / "base", base)
    factors = pair("transformer.h.0.c_fc", (2, 4), (10, 2))
    adapter(
        tmp_path / "a", factors, fan_in_fan_out=True, use_rslora=True, base_model_name_or_path=str(tmp_path / "base")
    )
    a, b = (x.astype(np.float64) for x in factors.values())
    for model in (open_model(tmp_path / "a"), open_model(f"{tmp_path / 'base'}+{tmp_path / 'a'}")):
        check_rows(model, "h.0.c_fc.weight", base["h.0.c_fc.weight"] + 3 / np.sqrt(2) * (b @ a).T)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, "of type LOHA; only LORA"),
        ({"use_dora": True}, "use_dora set, and DoRA"),
        ({"bias": "all"}, "bias='all'"),
        ({"lora_bias": True}, "lora_bias set"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices set"),
        ({"layer_replication": [[0, 2]]}, "layer_replication set"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base"),
        ({"r": 5}, "has rank 2, but adapter_config.json says 5"),
    ],
)
def test_adapters_that_are_no_plain_sum(tmp_path, config, message):
    write(tmp_path / "base", tensors(BASE, 0))
    adapter(tmp_path / "a", pair("model.layers.0.self_attn.q_proj", (2, 4), (6, 2)), **config)
    with pytest.raises(ValueError, match=message):
        open_model(tmp_path / "a", open_model(tmp_path / "base"))


def test_adapters_that_do_not_fit(tmp_path):
    base = open_model(write(tmp_path / "base", tensors(BASE, 0)))
    name = "model.layers.0.self_attn.q_proj"
    adapter(tmp_path / "other", pair("model.layers.9.self_attn.q_proj", (2, 4), (6, 2)))
    with pytest.raises(
        ValueError, match=r"adapts model.layers.9.self_attn.q_proj.weight, which its base does not have"
    ):
        open_model(tmp_path / "other", base)
    adapter(tmp_path / "shape", pair(name, (2, 4), (7, 2)))
    with pytest.raises(ValueError, match=r"factors \[7, 2\] and \[2, 4\] do not fit"):
        open_model(tmp_path / "shape", base)
    half = pair(name, (2, 4), (6, 2))
    adapter(tmp_path / "half", {k: v for k, v in half.items() if "lora_A" in k})
    with pytest.raises(ValueError, match=r"lacks a factor for model.layers.0.self_attn.q_proj"):
        open_model(tmp_path / "half", base)
    adapter(tmp_path / "dora", half | {f"{name}.lora_magnitude_vector": np.ones(6, np.float32)})
    with pytest.raises(ValueError, match="no factor of a plain LoRA"):
        open_model(tmp_path / "dora", base)
