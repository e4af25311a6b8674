"""Five image tasks on a small vision transformer in CLIP's format, from nothing: pretraining, experts, merged table.

    python -m experiments.benchmark --config=configs/clip_small.py:source=DATA --workdir=results/clip_small

DATA holds ``image_NAME.npz`` files (x_train, y_train, x_test, y_test). The transformer (32 px, patches of 4, width 128,
6 layers) is pretrained on some of the sets, with their labels; the others are the tasks.
"""

import ml_collections

from configs import common

PRETRAIN = ("cifar10", "omniglot_small1", "dtd10")
TASKS = ("mnist", "fashion_mnist", "gtsrb", "digits")


def get_config(arg=None):
    """Arguments: ``source`` (the folder), ``runlocal`` (a run of seconds, for tests), ``seeds`` (how many)."""
    arg = common.parse_arg(arg, source="data", runlocal=False, seeds=3)
    config = common.benchmark("clip_small", arg.seeds)
    config.suite = common.suite("image", TASKS, source=arg.source, train=960, held_out=192, test=500, image_size=32)
    vision = {
        "patch_size": 4, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4,
    }  # fmt: skip
    config.pretrain = ml_collections.ConfigDict(
        {
            "tasks": PRETRAIN, "vision": vision, "train": 5000, "steps": 900, "batch_size": 64, "learning_rate": 1e-3,
            "weight_decay": 0.05, "shift": 3, "seed": 0,
        }
    )  # fmt: skip
    config.finetune.update({"learning_rate": 3e-4, "steps": 100})
    for label in ("adamerging", "adamerging_inductive"):
        config.settings[label].steps = 100  # published: 500, which takes five minutes each on two cores
    config.settings.surgery.on = config.settings.surgery_inductive.on = "tsv_m"
    config.methods = (
        "pretrained", "weight_average", "task_arithmetic", "ties", "breadcrumbs", "consensus_ta", "tsv_m", "adamerging",
        "adamerging_inductive", "surgery", "surgery_inductive", "individual",
    )  # fmt: skip
    if arg.runlocal:
        common.shrink(config)
        config.pretrain.update({"steps": 2, "batch_size": 8, "train": 32})
        config.pretrain.vision.update({"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2})
    return config
