"""Byte-pair tokenizers from ``vocab.json`` and ``merges.txt``, as older model folders hold them: CLIP, GPT-2, RoBERTa.

Equal to those of ``transformers`` on recorded texts.
"""

import json
import pathlib

import tokenizers
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

# Which tokens tell whose vocabulary it is, in the order of search; they are the special ones.
KINDS = {
    "clip": ("<|startoftext|>", "<|endoftext|>"),
    "roberta": ("<s>", "</s>", "<pad>", "<unk>", "<mask>"),
    "gpt2": ("<|endoftext|>",),
}
# CLIP's words: special tokens, endings after an apostrophe, runs of letters, single digits, runs of anything else.
_CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


def load(folder: pathlib.Path) -> Tokenizer:
    """The tokenizer of a folder with ``vocab.json`` and ``merges.txt``.

    Raises:
      ValueError: one of the files is damaged, or the vocabulary is neither CLIP's nor GPT-2's nor RoBERTa's.
    """
    files = folder / "vocab.json", folder / "merges.txt"
    try:
        vocabulary = json.loads(files[0].read_text(encoding="utf-8"))
        kind = next((kind for kind, special in KINDS.items() if {*special} <= {*vocabulary}), None)
        if kind is not None:
            return {"clip": _clip, "roberta": _roberta, "gpt2": _gpt2}[kind](vocabulary, *map(str, files))
    except Exception as error:  # what the tokenizers library raises has no narrower class
        raise ValueError(f"{files[0]} and {files[1]} are not a vocabulary and its merges: {error}") from error
    told = "; ".join(f"{kind} ({', '.join(special)})" for kind, special in KINDS.items())
    raise ValueError(
        f"{files[0]} is of no known kind; known by their tokens are {told}. A tokenizer.json is always read"
    )


def _clip(vocabulary: dict[str, int], vocab: str, merges: str) -> Tokenizer:
    start, end = KINDS["clip"]
    tokenizer = Tokenizer(models.BPE.from_file(vocab, merges, end_of_word_suffix="</w>", unk_token=end))
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    ends = (end, vocabulary[end]), (start, vocabulary[start])
    tokenizer.post_processor = processors.RobertaProcessing(*ends, trim_offsets=False, add_prefix_space=False)
    tokenizer.add_special_tokens([start, end])
    return tokenizer


def _gpt2(vocabulary: dict[str, int], vocab: str, merges: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE.from_file(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([token for token in KINDS["gpt2"] if token in vocabulary])
    return tokenizer


def _roberta(vocabulary: dict[str, int], vocab: str, merges: str) -> Tokenizer:
    tokenizer = _gpt2(vocabulary, vocab, merges)
    start, end, *_ = KINDS["roberta"]
    ends = (end, vocabulary[end]), (start, vocabulary[start])
    tokenizer.post_processor = processors.RobertaProcessing(*ends, trim_offsets=True, add_prefix_space=False)
    tokenizer.add_special_tokens(list(KINDS["roberta"]))
    return tokenizer
