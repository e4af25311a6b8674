"""A word-level tokenizer in a model folder, so that tests need no pretrained weights."""

import pytest


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    import tokenizers
    from tokenizers.processors import TemplateProcessing

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "a", "of", "film", "good", "bad"]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair=None, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    # Real folders carry padding and truncation of their own, which must not count.
    tokenizer.enable_padding(length=128)
    tokenizer.enable_truncation(5)
    folder = tmp_path_factory.mktemp("model")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
