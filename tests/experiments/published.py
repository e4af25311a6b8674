"""Stand-ins of the published CLIP checkpoints, for tests: folders of the true layout with tiny models."""

import jax

from taskvec import models
from tests.data.pictures_for_tests import folders
from tests.experiments.test_finetune import with_tokenizer

ARCHITECTURE = "clip-vit-base-patch32"
TASKS = ("mnist", "svhn")


def write(root):
    """Both towers, for two tasks an image tower that differs a little, and pictures of ten classes."""
    base = with_tokenizer(root / ARCHITECTURE, "clip_both", 59, 60)
    tower, params = models.load(base, part="vision")
    for i, task in enumerate(TASKS):
        key = jax.random.key(i)
        tuned = jax.tree.map(lambda x, key=key: x + 0.02 * jax.random.normal(key, x.shape), params)
        models.save(root / f"{ARCHITECTURE}_{task}", tower, tuned)
        for split in ("train", "test"):
            folders(root / "data" / task / split, [str(digit) for digit in range(10)], 5)
    return root


def arguments(root) -> str:
    """Of `configs/clip.py` and its like."""
    return f"checkpoints={root},source={root / 'data'},tasks={'+'.join(TASKS)},size=20,runlocal"
