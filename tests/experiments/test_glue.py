"""Merged tables of published language models, on stand-ins of the true layout whose right answers are known.

The stand-ins' blocks add nothing to what they read, so that a model is a table from the last token to the next one.
"""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from configs import glue, llama_pair
from experiments import benchmark, output, prepare
from taskvec import models, tree as trees
from taskvec.evaluation import rows as rows_lib
from taskvec.io import peft, safetensors
from tests.experiments.stand_ins_for_tests import WORDS, with_tokenizer
from tests.io import hub_for_tests as fake_hub, torch_files_for_tests as torch_files

METHODS = ("pretrained", "weight_average", "individual")
WORD = {word: 4 + i for i, word in enumerate(WORDS)}


def stand_in(folder, recorded, first, last):
    """A recorded model with a tokenizer that knows its end token, which real ones do."""
    with_tokenizer(folder, recorded, first, last)
    made = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.add_special_tokens(["</s>"] if first is None else ["<s>", "</s>"])
    made.save(str(folder / "tokenizer.json"))
    return folder


def successors(folder, to, pairs, size=1):
    """Writes a copy of a model that writes after each token the one it is paired with, and else its first token."""
    model, params = models.load(folder)
    flat = {p: np.array(x) for p, x in trees.flatten(params).items()}
    for path in flat:
        if "/output/" in path or "/down/" in path:  # what a block adds
            flat[path][:] = 0
        if path.endswith("norm/scale"):
            flat[path][:] = 1
    embedding = flat["embeddings/word"]
    embedding[:] = np.eye(*embedding.shape)
    flat["head/kernel"][:] = 0
    for token, following in pairs.items():
        flat["head/kernel"][token, following] = size
    models.save(to, model, trees.unflatten({p: jnp.asarray(x) for p, x in flat.items()}), source=folder)


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(config, workdir):
    config.methods, config.claims = METHODS, (("pretrained", "individual"),)
    benchmark.benchmark(config, workdir)
    rows = rows_lib.loads((workdir / "result.jsonl").read_text())
    assert "| individual |" in (workdir / "report.md").read_text()
    return {row.label: row for row in rows}


@pytest.fixture
def pairs_of_sentences(tmp_path):
    """Rows of three GLUE tasks; of the 16 test rows of MRPC and RTE, 10 have label 1."""
    for name, numbers in (("mrpc", False), ("rte", False), ("stsb", True)):
        for split, n in (("train", 60), ("validation", 16)):
            label = lambda i, numbers=numbers: float(i % 5) + 0.5 if numbers else int(i % 8 >= 3)
            rows = [
                {"sentence1": "good thing", "sentence2": f"{WORDS[6 + i % 2]} thing {i}", "label": label(i)}
                for i in range(n)
            ]
            write_lines(tmp_path / "data" / name / f"{split}.jsonl", rows)
    return tmp_path


def test_flan_t5_writes_answers(pairs_of_sentences):
    at = pairs_of_sentences
    recorded = stand_in(at / "recorded", "t5_gated", None, 22)
    start, end = 0, 22
    successors(recorded, at / "flan-t5-base", {start: end})
    for task, word in (("mrpc", "yes"), ("rte", "no"), ("stsb", "good")):
        successors(recorded, at / f"flan-t5-base_glue-{task}", {start: WORD[word], WORD[word]: end})
    config = glue.get_config(f"checkpoints={at},source={at / 'data'},tasks=mrpc+rte+stsb,length=32,runlocal")
    found = run(config, at / "results")
    # MRPC's label 1 is "yes", RTE's is "no"; STS-B's answer is no number and the same everywhere.
    assert found["individual"].accuracy == {"mrpc": 10 / 16, "rte": 10 / 16, "stsb": 0.0}
    assert found["pretrained"].accuracy == {"mrpc": 0.0, "rte": 0.0, "stsb": 0.0}
    protocol = found["individual"].protocol
    assert protocol.endswith("/answers/published") and "glue_text_to_text" in protocol
    successors(recorded, at / "flan-t5-base_glue-rte", {start: 5}, size=3e38)
    config.suite.tasks = ("rte",)
    with pytest.raises(ValueError, match=r"individual, seed 0, task rte: no score\. .*16 of 16 rows is NaN"):
        run(config, at / "results")


def test_lora_experts(pairs_of_sentences):
    at = pairs_of_sentences
    folder = stand_in(at / "flan-t5-base", "t5_gated", None, 22)
    model, params = models.load(folder)
    rng = np.random.default_rng(0)
    kernel = params["encoder"]["blocks"]["attention"]["query"]["kernel"]  # [L, in, out]
    a, b = (rng.normal(size=(3, n, r)).astype(np.float32) for n, r in ((kernel.shape[1], 2), (2, kernel.shape[2])))
    factors = {"encoder": {"blocks": {"attention": {"query": {"kernel": {"a": a, "b": b}}}}}}
    peft.save_adapter(at / "flan-t5-base_glue-rte_lora-16", model.table, factors, alpha=4.0, base=folder)
    config = glue.get_config(f"model=flan_t5_base_lora,checkpoints={at},source={at / 'data'},tasks=rte,runlocal")
    found = prepare.prepare(config, prepare.load_base(config), 0).experts[0]
    expected = np.asarray(kernel, np.float64) + 2 * np.einsum("lir,lro->lio", a.astype(float), b.astype(float))
    np.testing.assert_allclose(
        found["encoder"]["blocks"]["attention"]["query"]["kernel"], expected, rtol=1e-5, atol=1e-5
    )
    np.testing.assert_array_equal(found["embeddings"]["word"], params["embeddings"]["word"])


@pytest.mark.parametrize("name", ["roberta_base", "gpt2"])
def test_heads_of_experts(pairs_of_sentences, name, monkeypatch):
    """Heads that know the share of a class by their bias, or by a weight on a feature that is above zero.

    RoBERTa comes from the hub: the experts are folders of one repository, with PyTorch's files.
    """
    at = pairs_of_sentences
    base, first = ("FacebookAI/roberta-base", 0) if name == "roberta_base" else ("gpt2", None)
    (at / "FacebookAI").mkdir()
    recorded = stand_in(at / base, "roberta_tiny" if first == 0 else "gpt2_tiny", first, 2)
    tensors = safetensors.load(recorded / "model.safetensors")
    for task, label in (("mrpc", 1), ("rte", 0)):
        place = f"vanillaOVO/roberta_base_glue_ckpts/{task}/roberta-base_lr1e-05" if first == 0 else f"gpt2_{task}"
        width = 24
        if first == 0:
            head = {
                "classifier.dense.weight": np.zeros((width, width)), "classifier.dense.bias": np.zeros(width),
                "classifier.out_proj.weight": np.zeros((2, width)), "classifier.out_proj.bias": np.eye(2)[label],
            }  # fmt: skip
            named = {f"roberta.{key.removeprefix('roberta.')}": x for key, x in tensors.items()}
        else:
            # The last norm gives its bias alone, ones; the head sums them up for one class.
            named = {f"transformer.{key.removeprefix('transformer.')}": x for key, x in tensors.items()}
            named |= {"transformer.ln_f.weight": np.zeros(width), "transformer.ln_f.bias": np.ones(width)}
            head = {"score.weight": np.eye(2)[label][:, None] * np.ones(width)}
        (at / place).mkdir(parents=True)
        write = torch_files.save_folder if first == 0 else safetensors.save
        write(at / place, {key: np.asarray(x, np.float32) for key, x in (named | head).items()})
        (at / place / "config.json").write_text((recorded / "config.json").read_text())
    fake_hub.install(monkeypatch, at, at / "fetched")
    arg = f"model={name},source={at / 'data'},tasks=mrpc+rte,length=16,runlocal"
    found = run(glue.get_config(arg if first == 0 else f"checkpoints={at},{arg}"), at / "results")
    assert found["individual"].accuracy == {"mrpc": 10 / 16, "rte": 6 / 16}
    assert found["individual"].protocol.endswith("/trained/published")
    copied = glue.get_config(f"model={name},checkpoints={at},tasks=mrpc")
    assert (copied.model, copied.checkpoints.mrpc) == (
        (f"{at}/roberta-base", f"{at}/mrpc/roberta-base_lr1e-05") if first == 0 else (f"{at}/gpt2", f"{at}/gpt2_mrpc")
    )


def test_two_decoders(tmp_path):
    recorded = stand_in(tmp_path / "recorded", "llama_scaled", 1, 2)
    end = 2
    answer = {"one": {WORD["good"]: WORD["yes"], WORD["bad"]: WORD["no"]}, "two": {WORD["cat"]: WORD["dog"]}}
    for name, table in answer.items():
        successors(recorded, tmp_path / name, table | {WORD["yes"]: end, WORD["no"]: end, WORD["dog"]: end})
    successors(recorded, tmp_path / "base", {})
    made = tokenizers.Tokenizer.from_file(str(tmp_path / "base" / "tokenizer.json"))
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.save(str(tmp_path / "base" / "tokenizer.json"))
    prompts = {
        "one": [("a good", "yes"), ("a bad", "no")],
        "two": [("a cat", "dog"), ("a fish", "cat")],
    }
    for name, kinds in prompts.items():
        rows = [
            {"split": split, "text": f"of {i} {kinds[i % 2][0]}", "label": kinds[i % 2][1]}
            for split, n in (("train", 60), ("test", 16))
            for i in range(1000 * (split == "test"), 1000 * (split == "test") + n)
        ]
        write_lines(tmp_path / f"text_{name}.jsonl", rows)
    arg = f"model={tmp_path / 'base'},experts={tmp_path / 'one'}+{tmp_path / 'two'},tasks=one+two,source={tmp_path}"
    # The prompts have five tokens at most; what is kept of them is their end.
    found = run(llama_pair.get_config(f"{arg},length=3,answer=3,runlocal"), tmp_path / "results")
    assert found["individual"].accuracy == {"one": 1.0, "two": 0.5}
    assert found["pretrained"].accuracy == {"one": 0.0, "two": 0.0}
    # Half of each table is above the zeros of the other: greedily it writes the same.
    assert found["weight_average"].accuracy == {"one": 1.0, "two": 0.5}


def test_what_needs_fixed_heads_is_refused(tmp_path):
    config = llama_pair.get_config(f"source={tmp_path}")
    for label in ("adamerging", "surgery"):
        config.methods = (label, "individual")
        with pytest.raises(ValueError, match=f"{label} needs fixed heads; with config.heads='answers'"):
            output.check(config, tmp_path)
    with pytest.raises(ValueError, match="want two each"):
        llama_pair.get_config("tasks=one")
    with pytest.raises(ValueError, match="allowed: flan_t5_base"):
        glue.get_config("model=t5")
