"""Tokenizers from the files of model folders, against transformers (tests/parity/record_tokenizers.py)."""

import json
import pathlib
import shutil

import numpy as np
import pytest
import tokenizers

from taskvec.data import text

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


def test_folders_without_a_tokenizer(tmp_path):
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    with pytest.raises(
        FileNotFoundError, match=r"no tokenizer\.json, nor vocab\.json and merges\.txt \(it holds vocab"
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
