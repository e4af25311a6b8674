"""FusionBench's published CLIP checkpoints: 8, 14 or 20 image tasks, merged, under heads made from class names.

    python -m experiments.benchmark --config=configs/clip.py:arch=b32,suite=clip8
    python -m experiments.benchmark --config=configs/clip.py:arch=b32,suite=clip8,checkpoints=FOLDER,source=DATA

With network the checkpoints come from the hub (openai/clip-vit-..., tanganke/clip-vit-..._TASK); without, from FOLDER,
which holds them under the last part of those names. DATA is a folder as in `taskvec.data.clip_suites`, ``hub`` or
``tfds``.

Published, mean accuracy (%) of 8 tasks, protocol fusion_bench (docs/modelpool/clip_vit.md; scale 0.3 where it matters):

| method | B/32 | B/16 | L/14 |
| --- | ---: | ---: | ---: |
| pretrained | 48.2 | 55.3 | 64.6 |
| weight_average | 66.5 | 72.3 | 80.0 |
| task_arithmetic | 68.0 | 77.1 | 80.7 |
| ties | 72.2 | 77.5 | 84.0 |
| iso_c (1.5) | 82.8 | | |
| iso_cts (1.5) | 82.7 | | |
| adamerging, task-wise | 68.7 | | 80.1 |
| adamerging, layer-wise | 82.6 | 85.0 | 91.0 |
| individual | 90.3 | 92.3 | 94.3 |

B/32 by task (SUN397, Cars, RESISC45, EuroSAT, SVHN, GTSRB, MNIST, DTD): pretrained 63.2, 59.8, 60.7, 46.0, 31.6, 32.5,
48.2, 43.9; experts 75.0, 78.3, 95.2, 99.0, 97.3, 98.9, 99.6, 79.7. Its own pages say that the hyper-parameters are not
tuned.
"""

from configs import common
from taskvec.data import clip_suites

ARCHITECTURES = {"b32": "clip-vit-base-patch32", "b16": "clip-vit-base-patch16", "l14": "clip-vit-large-patch14"}
# Names of the checkpoints where they are not those of the tasks.
NAMED = {
    "cars": "stanford-cars", "flowers102": "oxford_flowers102", "pets": "oxford-iiit-pet", "emnist": "emnist_letters",
    "rendered_sst2": "rendered-sst2",
}  # fmt: skip


ARGUMENTS = {
    "arch": "b32", "suite": "clip8", "checkpoints": "hub", "source": "hub", "tasks": "", "size": 224, "runlocal": False,
}  # fmt: skip


def get_config(arg=None):
    """Arguments: see above; ``arch`` (b32, b16, l14), ``suite`` (clip8, clip14, clip20), ``tasks`` (joined by +)."""
    arg = common.parse_arg(arg, **ARGUMENTS)
    config = published(arg)
    scales = {"task_arithmetic": 0.3, "ties": 0.3, "iso_c": 1.5, "iso_cts": 1.5}
    for label, scale in scales.items():
        config.settings[label] = {"scale": scale}
    config.methods = (
        "pretrained", "weight_average", "task_arithmetic", "ties", "tsv_m", "iso_c", "iso_cts", "adamerging_taskwise",
        "adamerging", "surgery", "individual",
    )  # fmt: skip
    return shrink(config, arg) if arg.runlocal else config


def tasks_of(arg):
    """The tasks that are asked for."""
    return tuple(arg.tasks.split("+")) if arg.tasks else clip_suites.SUITES[arg.suite]


def published(arg):
    """Models, heads and rows for parsed arguments; the methods are still those of every benchmark."""
    for key, allowed in (("arch", ARCHITECTURES), ("suite", clip_suites.SUITES)):
        if arg[key] not in allowed:
            raise ValueError(f"{key}={arg[key]!r}; allowed: {', '.join(allowed)}")
    config = common.benchmark(f"clip_{arg.arch}_{arg.suite}", seeds=1)
    name, at_hub = ARCHITECTURES[arg.arch], arg.checkpoints == "hub"
    place = lambda owner, name: f"{owner}/{name}" if at_hub else f"{arg.checkpoints}/{name}"
    config.model, config.part = place("openai", name), "vision_projected"
    config.heads, config.head_scale = "prompts", None
    tasks = tasks_of(arg)
    config.checkpoints = {task: place("tanganke", f"{name}_{NAMED.get(task, task)}") for task in tasks}
    whole = {"train": None, "held_out": None, "test": None, "image_size": arg.size}
    config.suite = common.suite("image", tasks, source=arg.source, family="fusion_bench", **whole)
    return config


def shrink(config, arg):
    """The smoke run; the size of pictures is the model's."""
    common.shrink(config)
    config.suite.image_size = arg.size
    return config
