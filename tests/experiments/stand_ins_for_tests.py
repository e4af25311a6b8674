"""Small models with tokenizers and small tasks in place of the published ones."""

import json
import pathlib
import shutil

import numpy as np

from configs import finetune_clip

RECORDED = pathlib.Path(__file__).parents[1] / "models" / "recorded"
WORDS = ("a", "photo", "of", "cat", "dog", "fish", "good", "bad", "thing", "yes", "no")
# Training rows as published; of flowers without its validation images.
ROWS = {
    "sun397": 19850, "cars": 8144, "resisc45": 18900, "eurosat": 21600, "svhn": 73257, "gtsrb": 26640, "mnist": 60000,
    "dtd": 3760, "flowers102": 1020, "pcam": 262144, "fer2013": 28709, "pets": 3680, "stl10": 5000, "cifar100": 50000,
    "cifar10": 50000, "food101": 75750, "fashion_mnist": 60000, "emnist": 240000, "kmnist": 60000,
    "rendered_sst2": 6920,
}  # fmt: skip


def with_tokenizer(folder, name, first=None, last=None):
    """A copy of a recorded model with a tokenizer of a few words."""
    import tokenizers

    shutil.copytree(RECORDED / name, folder)
    vocab = {"<unk>": 3} | {word: 4 + i for i, word in enumerate(WORDS)}
    ends = {"<s>": first, "</s>": last}
    vocab |= {word: at for word, at in ends.items() if at is not None}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = [(word, at) for word, at in ends.items() if at is not None]
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single=("<s> " if first is not None else "") + "$A </s>", special_tokens=special
    )
    made.save(str(folder / "tokenizer.json"))
    return folder


def write_pictures(folder):
    """Two tasks of pictures, described with classes and templates."""
    rng = np.random.default_rng(0)
    tasks = {}
    for name, classes in (("one", ["cat", "dog", "fish"]), ("two", ["dog", "cat"])):
        splits = {}
        for split, n in (("train", 60), ("test", 20)):
            labels = np.arange(n) % len(classes)
            pixels = rng.integers(0, 200, (n, 24, 30, 3)) + labels[:, None, None, None] * 20
            splits |= {f"x_{split}": pixels.astype(np.uint8), f"y_{split}": labels}
        np.savez(folder / f"{name}.npz", **splits)
        tasks[name] = {"format": "npz", "file": f"{name}.npz", "classes": classes, "templates": ["a photo of a {}"]}
    (folder / "tasks.json").write_text(json.dumps({"kind": "image", "tasks": tasks}))
    return folder / "tasks.json"


def config_of(clip, pictures, **more):
    args = {"model": clip, "source": pictures, "suite": "local", "size": 20, "runlocal": True, **more}
    return finetune_clip.get_config(",".join(f"{k}={v}" for k, v in args.items()))
