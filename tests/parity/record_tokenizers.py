"""Records what transformers' tokenizers make of a few texts, with small vocabularies (extra `parity`); run once:

python tests/parity/record_tokenizers.py
"""

import json
import pathlib

import tokenizers
import transformers
from tokenizers import pre_tokenizers, trainers

HERE = pathlib.Path(__file__).parent.parent / "data" / "recorded"
TEXTS = (
    "a photo of a cat.",
    "A centered satellite photo of  an   annual crop land",
    "it's the dog's 2 bones, they'll say: we've 1234!!",
    "ÇA COÛTE 3,50 €; 日本語 too \U0001f600",
    "e\u0301 is two characters\tor one\n",
    "<|endoftext|> in a text, and <mask> or <s>",
    "",
    "   ",
    "photophotophoto don't_stop...",
)
KINDS = {
    "clip": (transformers.CLIPTokenizer, "</w>", ["<|startoftext|>", "<|endoftext|>"]),
    "gpt2": (transformers.GPT2Tokenizer, None, ["<|endoftext|>"]),
    "roberta": (transformers.RobertaTokenizer, None, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]),
}


def train(suffix: str | None, special: list[str]) -> tuple[dict[str, int], list[str]]:
    """A vocabulary with all bytes and 80 merges, special tokens last, and the merges."""
    bytes_alone = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet = [*bytes_alone, *(f"{x}{suffix}" for x in bytes_alone)] if suffix else bytes_alone
    ending = {"end_of_word_suffix": suffix} if suffix else {}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(**ending))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    texts = [text.lower() for text in TEXTS] * 3
    if suffix:
        model.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), model.pre_tokenizer])
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + 80, initial_alphabet=bytes_alone, show_progress=False, **ending
    )
    model.train_from_iterator(texts, trainer)
    pairs = json.loads(model.to_str())["model"]["merges"]
    merged = dict.fromkeys("".join(pair) for pair in pairs)
    words = [*dict.fromkeys([*alphabet, *merged]), *special]
    return {word: i for i, word in enumerate(words)}, [" ".join(pair) for pair in pairs]


def main() -> None:
    """Writes ``tests/data/recorded/tokenizer_KIND``."""
    for kind, (cls, suffix, special) in KINDS.items():
        folder = HERE / f"tokenizer_{kind}"
        folder.mkdir(parents=True, exist_ok=True)
        vocabulary, merges = train(suffix, special)
        (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
        tokenizer = cls.from_pretrained(folder)
        rows = [[text, tokenizer(text)["input_ids"]] for text in TEXTS]
        rows.append([list(TEXTS[:2]), tokenizer(*TEXTS[:2])["input_ids"]])
        (folder / "expected.json").write_text(json.dumps(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
