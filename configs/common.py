"""What config files share: parsing of ``file.py:key=value,flag`` and the defaults of a merging benchmark."""

import dataclasses
import typing

import ml_collections
from ml_collections import config_dict

from experiments import together
from experiments.experts import KINDS
from taskvec.training import recipes

RECIPE_TYPES = {f.name: (*typing.get_args(f.type), f.type)[0] for f in dataclasses.fields(recipes.Recipe)}

# TIES as FusionBench has it, which is the released code's with the sum of what agrees; its scale is 0.3 mostly.
FUSION_BENCH_TIES = {"density": 0.2, "aggregate": "sum", "rule": "released", "zero": "majority"}

# Settings of methods in a smoke run, at most.
SHORT = {
    "steps": 2, "coefficient_steps": 1, "rounds": 1, "epochs": 1, "per_task": 4, "per_set": 4, "batch_size": 8,
    "shots": 2, "least_batches": 1, "budget": 20,
}  # fmt: skip

_TRUTH = {"": True, "true": True, "1": True, "false": False, "0": False}


def parse_arg(arg: str | None, **defaults) -> ml_collections.ConfigDict:
    """Parses ``"runlocal,seeds=3"`` against defaults, which give the allowed keys and their types.

    >>> parse_arg("runlocal,seeds=3", runlocal=False, seeds=1).seeds
    3

    Raises:
      ValueError: unknown key, or a value that does not have the type of its default.
    """
    values = dict(defaults)
    for item in filter(None, (arg or "").split(",")):
        key, _, text = item.partition("=")
        if key not in defaults:
            raise ValueError(
                f"unknown config argument {key!r}; allowed: {', '.join(f'{k}={v}' for k, v in defaults.items())}"
            )
        kind = type(defaults[key])
        try:
            values[key] = _TRUTH[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError) as error:
            raise ValueError(f"config argument {key}={text!r} should be of type {kind.__name__}") from error
    return ml_collections.ConfigDict(values)


def benchmark(name: str, seeds: int) -> ml_collections.ConfigDict:
    """The part of a merging benchmark that is the same for every suite: methods and their settings.

    A setting given as a tuple is searched on held-out training rows, never on test rows. A label is the name of its
    method unless ``method`` says otherwise.
    """
    config = experts(name, seeds, "small")
    scales = (0.3, 0.5, 0.7, 1.0)
    ada = {"method": "adamerging", "mode": "tensor", "init": 0.3, "learning_rate": 1e-3, "steps": 500, "per_task": 16}
    cut = {"method": "surgery", "on": "adamerging", "rank": 16, "center": True, "steps": 1000, "learning_rate": 1e-3}
    settings = {
        "pretrained": {},
        "weight_average": {},
        "task_arithmetic": {"scale": scales},
        "ties": {"scale": scales},
        "dare_ties": {"density": 0.5, "scale": scales},
        "breadcrumbs": {"scale": scales},
        "lines": {"scale": scales},
        "consensus_ta": {"scale": scales},
        "tsv_m": {},
        "adamerging": {**ada, "data": "unlabelled test"},
        "adamerging_inductive": {**ada, "data": "unlabelled train"},
        "adamerging_taskwise": {**ada, "mode": "task", "data": "unlabelled test"},
        "adamerging_pp": {**ada, "plus_plus": True, "data": "unlabelled test"},
        "individual": {},
        "joint": dict(together.KINDS["joint"]),
        "surgery": {**cut, "data": "unlabelled test"},
        "surgery_inductive": {**cut, "on": "adamerging_inductive", "data": "unlabelled train"},
    }
    config.settings = ml_collections.ConfigDict(settings)
    config.tau_dtype = "float32"  # of the task vectors that adaptive methods hold; bfloat16 takes half the memory
    # The rows of the table, in this order; one that is trained on all tasks jointly only where a config asks for it.
    config.methods = tuple(label for label in settings if label != "joint")
    # Claims to test: each pair by the paired difference of accuracies; "best static" is the best data-free row.
    config.claims = (
        ("pretrained", "weight_average"),
        ("weight_average", "best static"),
        ("best static", "surgery"),
        ("surgery", "individual"),
    )
    return config


def experts(name: str, seeds: int, recipe: str, train: str = "full") -> ml_collections.ConfigDict:
    """The part that is about fine-tuning: model, heads, what is trained and how (see `experiments.finetune`).

    Args:
      name: of the experiment.
      seeds: how many.
      recipe: one of `taskvec.training.recipes.RECIPES`.
      train: one of `experiments.experts.KINDS`; or, for one model of all tasks, of `experiments.together.KINDS`.
    """
    if seeds < 1:
        raise ValueError(f"seeds={seeds}, must be at least 1")
    of_all = together.settings_of(train)
    if of_all is None and train not in KINDS:
        raise ValueError(f"train={train!r}; allowed: {', '.join((*KINDS, *together.KINDS))}, joint+BALANCER")
    config = ml_collections.ConfigDict()
    config.name = name
    config.seeds = tuple(range(seeds))
    config.model = ""
    config.checkpoints = ml_collections.ConfigDict()  # {task: folder or hub id} of experts that are trained already
    config.part = ""  # of the model's folder: see `taskvec.models.load`
    config.heads = "class_means"  # or "prompts" (CLIP), "trained" (of published experts), "answers" (written, no heads)
    config.max_new_tokens = 10  # of a written answer
    config.head_scale = config_dict.FieldReference(20.0)  # factor on the cosines; None: CLIP's own
    config.text_model = ""  # folder of the text tower for prompts, where the model's has none
    config.eval_batch_size = 64
    config.augment = False  # random crops of training images, as in open_clip
    # Options of the forward pass in training and adapting (scoring is in float32); "" and 0: none. All layers unrolled
    # make steps on CPU faster and compilation longer.
    config.compute = ml_collections.ConfigDict({"dtype": "", "remat": "", "unroll": 0})
    config.checkpoint_every = 200  # batches
    what = "full" if of_all else train
    config.trainable = ml_collections.ConfigDict({"kind": what, **KINDS[what]})
    if of_all:
        config[of_all[0]] = ml_collections.ConfigDict(of_all[1])
    settings = dataclasses.asdict(recipes.get(recipe))
    config.finetune = ml_collections.ConfigDict()
    for key, value in settings.items():
        kind = RECIPE_TYPES[key]
        config.finetune[key] = config_dict.placeholder(kind) if value is None else kind(value)
    return config


def suite(kind: str, tasks: tuple[str, ...], **sizes) -> ml_collections.ConfigDict:
    """The keys of `taskvec.data.suites.Spec`; the seed comes from ``config.seeds``."""
    fields = {"kind": kind, "tasks": tasks, "source": "registry", "train": 512, "held_out": 256, "test": 500}
    encoding = {"max_length": 48} if kind == "text" else {"image_size": 64, "corruption": ""}
    return ml_collections.ConfigDict({**fields, **encoding, **sizes})


def shrink_finetuning(config: ml_collections.ConfigDict, few_rows: bool = False) -> ml_collections.ConfigDict:
    """Two steps of eight rows, of all there are or of few."""
    config.eval_batch_size = 16
    config.finetune.update({"steps": 2, "batch_size": 8})
    config.finetune.warmup = min(config.finetune.warmup, 1.0)
    if "atm" in config:
        config.atm.rounds = min(config.atm.rounds, 2)
    if few_rows:
        with config.suite.unlocked():
            config.suite.update({"train": 32, "held_out": 8, "test": 16})
    return config


def shrink(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The same experiment in seconds: few rows, few steps, one seed, one value a search."""
    config.seeds = (0,)
    shrink_finetuning(config)
    config.suite.update({"train": 32, "held_out": 16, "test": 16})
    config.suite.update({"max_length": 16} if config.suite.kind == "text" else {"image_size": 32})
    for settings in config.settings.values():
        if isinstance(settings.get("scale"), tuple):
            settings.scale = settings.scale[:1]
        settings.update({key: min(settings[key], most) for key, most in SHORT.items() if settings.get(key) is not None})
    return config
