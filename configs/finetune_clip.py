"""Experts of a CLIP image tower under heads made from class names: the task vectors of the merging literature.

    python -m experiments.finetune --config=configs/finetune_clip.py:model=CLIP,suite=clip8,source=DATA
    python -m experiments.finetune --config=configs/finetune_clip.py:model=CLIP,suite=local,source=tasks.yaml

CLIP is a Hugging Face folder with both towers (openai/clip-vit-base-patch32, -base-patch16, -large-patch14); DATA a
folder as in `taskvec.data.clip_suites`, or ``hub``, or ``tfds``; ``tasks.yaml`` a description with classes and
templates (`taskvec.data.described`). Recipes: ``ft_ilharco`` trains the whole image tower, the projection included, on
random crops; ``ft_fusionbench`` leaves the projection as it is and crops nothing.

Published, mean accuracy (%) of the experts on their own tasks, protocol fusion_bench, 8 tasks (FusionBench,
docs/modelpool/clip_vit.md): B/32 pretrained 48.2, experts 90.3, one model trained on all tasks 88.6; B/16 55.3, 92.3;
L/14 64.6, 94.3, all tasks 92.4.
"""

from configs import common
from taskvec.data import suites


def get_config(arg=None):
    """Arguments: see above; ``train`` (`experiments.experts.KINDS`), ``tasks`` (joined by +), ``size`` (pixels)."""
    arg = common.parse_arg(
        arg, model="clip-vit-base-patch32", suite="clip8", source="hub", tasks="", recipe="ft_ilharco", train="full",
        size=224, seeds=1, runlocal=False,
    )  # fmt: skip
    config = common.experts(f"finetune_{arg.suite}", arg.seeds, arg.recipe, arg.train)
    config.model, config.part = arg.model, "vision_projected"
    config.heads, config.head_scale = "prompts", None
    config.augment = arg.recipe == "ft_ilharco"
    fusionbench = arg.recipe == "ft_fusionbench"
    if fusionbench and arg.train == "full":
        config.trainable = {"kind": "matching", "include": ".", "exclude": "^projection/"}
    whole = {"source": arg.source, "train": None, "held_out": None, "test": None, "image_size": arg.size}
    if arg.suite == "local":
        tasks = tuple(arg.tasks.split("+")) if arg.tasks else tuple(suites.available("image", arg.source))
        config.suite = common.suite("image", tasks, **whole, preprocess="clip" if fusionbench else "clip_round")
    else:
        family = "fusion_bench" if fusionbench else "task_vectors" if arg.suite == "clip8" else "tall_masks"
        tasks = tuple(arg.tasks.split("+")) if arg.tasks else (arg.suite,)
        config.suite = common.suite("image", tasks, **whole, family=family)
    return common.shrink_finetuning(config, few_rows=True) if arg.runlocal else config
