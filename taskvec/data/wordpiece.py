"""WordPiece tokenizers from ``vocab.txt`` and ``tokenizer_config.json``, as older folders of BERT's line hold them.

Equal to those of ``transformers``, whose defaults stand for what the configuration leaves out.
"""

import json
import pathlib
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

CLASSES = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "MobileBertTokenizer")  # and those with Fast
SPECIAL = {key: f"[{key.upper()}]" for key in ("unk", "sep", "pad", "cls", "mask")}


def load(folder: pathlib.Path) -> Tokenizer:
    """The tokenizer of a folder with ``vocab.txt``, a token a line; rows are ``[CLS] A [SEP]``, pairs ``... B [SEP]``.

    Raises:
      ValueError: a damaged configuration, one of another line of models, a vocabulary without the special tokens, or
        one with capitals where nothing says whether texts keep theirs.
    """
    config, lines = _config(folder), (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
    vocabulary = {token: i for i, token in enumerate(lines[:-1] if not lines[-1] else lines)}
    special = {key: _content(config.get(f"{key}_token", token)) for key, token in SPECIAL.items()}
    missing = [special[key] for key in ("unk", "sep", "cls") if special[key] not in vocabulary]
    if missing:
        raise ValueError(f"{folder / 'vocab.txt'} has no {', '.join(missing)}; a vocabulary of WordPiece has them")
    if "do_lower_case" not in config and any(x != x.lower() for x in vocabulary if not x.startswith("[")):
        raise ValueError(
            f'{folder / "vocab.txt"} has words with capitals: say "do_lower_case": false, or true, in '
            f"{folder / 'tokenizer_config.json'}"
        )
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=special["unk"], max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),  # None: where texts are made lower case
        lowercase=config.get("do_lower_case", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    cls, sep = special["cls"], special["sep"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls}:0 $A:0 {sep}:0",
        pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
        special_tokens=[(token, vocabulary[token]) for token in (cls, sep)],
    )
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([token for token in special.values() if token in vocabulary])
    return tokenizer


def _config(folder: pathlib.Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    known = config.get("tokenizer_class") or CLASSES[0]
    if known.removesuffix("Fast") not in CLASSES:
        raise ValueError(
            f"{path} is of {known}, which is not made from vocab.txt here; allowed: {', '.join(CLASSES)}. "
            "A tokenizer.json is always read"
        )
    return config


def _content(token: str | dict[str, Any]) -> str:
    """A token's text; newer files have an object for it."""
    return token["content"] if isinstance(token, dict) else token
