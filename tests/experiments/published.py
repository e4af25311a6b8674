"""Stand-ins of the published CLIP checkpoints, for tests: folders of the true layout with tiny models."""

import json
import math

import jax
import numpy as np

from configs import clip
from taskvec import models
from taskvec.data import clip_suites
from tests.data.pictures_for_tests import folders
from tests.experiments.stand_ins_for_tests import with_tokenizer

ARCHITECTURE = "clip-vit-base-patch32"
TASKS = ("mnist", "svhn")
# What the true folders' config.json say of the towers.
_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_LARGE_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
TRUE = {
    "b32": {"vision_config": {"patch_size": 32}, "text_config": {}, "projection_dim": 512},
    "b16": {"vision_config": {"patch_size": 16}, "text_config": {}, "projection_dim": 512},
    "l14": {"vision_config": {**_LARGE, "patch_size": 14}, "text_config": _LARGE_TEXT, "projection_dim": 768},
}


def write(root, tasks=TASKS, architecture=ARCHITECTURE, train=50, test=50):
    """Both towers, for every task an image tower that differs a little, and so many pictures or one per class."""
    base = with_tokenizer(root / architecture, "clip_both", 59, 60)
    tower, params = models.load(base, part="vision")
    params = jax.device_get(params)
    for i, task in enumerate(tasks):
        rng = np.random.default_rng(i)
        tuned = jax.tree.map(lambda x, rng=rng: x + 0.02 * rng.standard_normal(x.shape, np.float32), params)
        models.save(root / f"{architecture}_{clip.NAMED.get(task, task)}", tower, tuned)
        classes = [f"{c:03}" for c in range(len(clip_suites.class_names(task, "fusion_bench")))]
        for split, rows in (("train", train), ("test", test)):
            folders(root / "data" / task / split, classes, math.ceil(rows / len(classes)))
    return root


def write_config(folder, arch: str):
    """The folder of both towers without weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", **TRUE[arch]}))
    return folder


def arguments(root) -> str:
    """Of `configs/clip.py` and its like."""
    return f"checkpoints={root},source={root / 'data'},tasks={'+'.join(TASKS)},size=20,runlocal"
