"""What config files share: parsing of ``file.py:key=value,flag`` and the defaults of a merging benchmark."""

import ml_collections

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
    if seeds < 1:
        raise ValueError(f"seeds={seeds}, must be at least 1")
    config = ml_collections.ConfigDict()
    config.name = name
    config.seeds = tuple(range(seeds))
    config.model = ""
    config.head_scale = 20.0  # factor on the cosines of the fixed heads
    config.eval_batch_size = 64
    config.finetune = ml_collections.ConfigDict(
        {"steps": 40, "batch_size": 32, "learning_rate": 1e-4, "warmup_fraction": 0.1, "weight_decay": 0.0, "clip": 1.0}
    )
    scales = (0.3, 0.5, 0.7, 1.0)
    ada = {"method": "adamerging", "mode": "tensor", "init": 0.3, "learning_rate": 1e-3, "steps": 500, "per_task": 16}
    cut = {"method": "surgery", "on": "adamerging", "rank": 16, "steps": 1000, "learning_rate": 1e-3}
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
        "surgery": {**cut, "data": "unlabelled test"},
        "surgery_inductive": {**cut, "data": "unlabelled train"},
    }
    config.settings = ml_collections.ConfigDict(settings)
    config.methods = tuple(settings)  # the rows of the table, in this order
    # Claims to test: each pair by the paired difference of accuracies; "best static" is the best data-free row.
    config.claims = (
        ("pretrained", "weight_average"),
        ("weight_average", "best static"),
        ("best static", "surgery"),
        ("surgery", "individual"),
    )
    return config


def suite(kind: str, tasks: tuple[str, ...], **sizes) -> ml_collections.ConfigDict:
    """The keys of `taskvec.data.suites.Spec`; the seed comes from ``config.seeds``."""
    fields = {"kind": kind, "tasks": tasks, "source": "registry", "train": 512, "held_out": 256, "test": 500}
    encoding = {"max_length": 48} if kind == "text" else {"image_size": 64}
    return ml_collections.ConfigDict({**fields, **encoding, **sizes})


def shrink(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The same experiment in seconds: few rows, few steps, one seed, one value a search."""
    config.seeds = (0,)
    config.eval_batch_size = 16
    config.finetune.steps = 2
    config.finetune.batch_size = 8
    config.suite.update({"train": 32, "held_out": 16, "test": 16})
    config.suite.update({"max_length": 16} if config.suite.kind == "text" else {"image_size": 32})
    for settings in config.settings.values():
        if "scale" in settings:
            settings.scale = settings.scale[:1]
        if "steps" in settings:
            settings.steps = 2
        if "per_task" in settings:
            settings.per_task = 4
    return config
