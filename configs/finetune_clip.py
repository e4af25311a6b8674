"""Experts of a CLIP image tower under heads made from class names: the task vectors of the merging literature.

    python -m experiments.finetune --config=configs/finetune_clip.py:model=CLIP,suite=clip8,source=DATA
    python -m experiments.finetune --config=configs/finetune_clip.py:model=CLIP,suite=local,source=tasks.yaml

CLIP is a Hugging Face folder with both towers (openai/clip-vit-base-patch32, -base-patch16, -large-patch14); DATA a
folder as in `taskvec.data.clip_suites`, or ``hub``, or ``tfds``; ``tasks.yaml`` a description with classes and
templates (`taskvec.data.described`).

A recipe brings its protocol (`PROTOCOLS`): class names, splits and length of training of a family of checkpoints, what
is done to pictures, and whether CLIP's projection is trained. ``ft_ilharco``, for L/14 ``ft_ilharco_l14`` (64 rows
twice, gradients added), trains the whole image tower on random crops: clip8 are Ilharco's experts, clip14 and clip20
those of TALL-masks, each with its own passes over the rows; a local suite has 2,000 steps. Both leave a tenth of the
training rows out, for validation. ``ft_fusionbench`` trains on all of them (its validation rows are some; a local suite
has none unless ``config.suite.held_out`` says how many), leaves the projection as it is and crops nothing. ``ft_peta``
and ``small`` belong to no suite here: suite=local takes them. (PETA does not normalise pictures, has one prompt a
class, and scores DTD on its validation images.)

Published, mean accuracy (%) of the experts on their own tasks (`configs/clip.py` has the pretrained models):

| recipe | protocol | tasks | B/32 | B/16 | L/14 |
| --- | --- | ---: | ---: | ---: | ---: |
| ft_ilharco | task_vectors | 8 | 90.8 | | 94.2 |
| ft_ilharco | tall_masks | 8 | 92.83 | 94.64 | 95.81 |
| ft_ilharco | tall_masks | 14 | 90.88 | 92.76 | 94.29 |
| ft_ilharco | tall_masks | 20 | 91.37 | 93.17 | 94.73 |
| ft_fusionbench | fusion_bench | 8 | 90.3 | 92.3 | 94.3 |
| ft_fusionbench | fusion_bench | 20 | 89.77 | 91.62 | 93.52 |
| train=lora, 16 | fusion_bench | 8 | | 84.9 | |
| train=l_lora, 16 | fusion_bench | 8 | | 79.9 | |
| ft_fusionbench, train=joint | fusion_bench | 8 | 88.6 | | 92.4 |

The means of tall_masks hold a DTD of 98 whose images the expert very likely saw: with 79.4, Ilharco's, the first is
90.5. FusionBench's LoRA has a dropout of 0.1 before its factors, which is not offered here, and 2,000 steps (set
``config.finetune.steps``), says its page.
"""

from typing import NamedTuple

from configs import common
from taskvec.data import clip_suites, suites


class Protocol(NamedTuple):
    """What belongs to a recipe beside its optimiser.

    Attributes:
      families: ``{suite: family}`` of the published suites that it is of.
      preprocess: of a local suite's pictures; a family has its own.
      projection: whether CLIP's projection is trained.
      crops: whether it trains on random crops.
      held_out: validation rows of a local suite that it does without; None is a tenth. A family has its own.
    """

    families: dict[str, str]
    preprocess: str
    projection: bool
    crops: bool
    held_out: int | None = None


_OPEN_CLIP = Protocol(
    {"clip8": "task_vectors", "clip14": "tall_masks", "clip20": "tall_masks"}, "clip_round", projection=True, crops=True
)
PROTOCOLS = {
    "ft_ilharco": _OPEN_CLIP,
    "ft_ilharco_l14": _OPEN_CLIP,
    "ft_fusionbench": Protocol(
        dict.fromkeys(clip_suites.SUITES, "fusion_bench"), "clip", projection=False, crops=False, held_out=0
    ),
    "ft_peta": Protocol({}, "square", projection=False, crops=False),
    "small": Protocol({}, "clip", projection=True, crops=False),
}


def get_config(arg=None):
    """Arguments: see above; ``train`` (see `common.experts`), ``tasks`` (joined by +), ``size`` (pixels)."""
    arg = common.parse_arg(
        arg, model="clip-vit-base-patch32", suite="clip8", source="hub", tasks="", recipe="ft_ilharco", train="full",
        size=224, seeds=1, runlocal=False,
    )  # fmt: skip
    config = common.experts(f"finetune_{arg.suite}", arg.seeds, arg.recipe, arg.train)
    protocol = PROTOCOLS[arg.recipe]
    config.model, config.part = arg.model, "vision_projected"
    config.heads, config.head_scale = "prompts", None
    config.augment = protocol.crops
    if not protocol.projection:
        _keep_projection(config, arg)
    whole = {"source": arg.source, "train": None, "held_out": None, "test": None, "image_size": arg.size}
    tasks = tuple(arg.tasks.split("+")) if arg.tasks else ()
    if arg.suite == "local":
        tasks = tasks or tuple(suites.available("image", arg.source))
        whole["held_out"] = protocol.held_out
        config.suite = common.suite("image", tasks, **whole, preprocess=protocol.preprocess)
    else:
        config.suite = common.suite("image", tasks or (arg.suite,), **whole, family=_family(arg, tasks))
    return common.shrink_finetuning(config, few_rows=True) if arg.runlocal else config


def _family(arg, tasks):
    """The family of checkpoints that a recipe makes of a published suite."""
    found = PROTOCOLS[arg.recipe].families
    if arg.suite not in clip_suites.SUITES:
        raise ValueError(f"suite={arg.suite!r}; allowed: {', '.join(clip_suites.SUITES)}, local")
    if arg.suite not in found:
        published = ", ".join(name for name, protocol in PROTOCOLS.items() if arg.suite in protocol.families)
        raise ValueError(
            f"recipe={arg.recipe!r} is none that {arg.suite} was published with: take {published}, or suite=local"
        )
    if other := sorted(set(tasks) - set(clip_suites.SUITES[arg.suite])):
        raise ValueError(f"{arg.suite} has no {', '.join(other)}; it has {', '.join(clip_suites.SUITES[arg.suite])}")
    return found[arg.suite]


def _keep_projection(config, arg):
    """Leaves the projection as it is; low-rank and attention-only training do so anyway."""
    if config.trainable.kind in ("full", "matching"):
        config.trainable = {"kind": "matching", "include": ".", "exclude": "^projection/"}
    elif arg.train == "lt_sft":
        config.trainable.exclude += "|^projection/"
    elif arg.train == "tangent":
        raise ValueError(
            f"recipe={arg.recipe} leaves CLIP's projection as it is, and train=tangent trains it: take another train, "
            "or recipe=ft_ilharco"
        )
