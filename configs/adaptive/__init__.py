"""The published protocol of every adaptive method, one file per method, on FusionBench's CLIP checkpoints.

    python -m experiments.benchmark --config=configs/adaptive/adamerging.py:arch=b32,suite=clip8
    python -m experiments.benchmark --config=configs/adaptive/adamerging.py:arch=l14,checkpoints=FOLDER,source=DATA

Arguments are those of `configs/clip.py`. Every setting that was published stands in the file of its method; so do the
published numbers, mean test accuracy in per cent, each with the protocol that it was found under:

  A   Ilharco's checkpoints (task_vectors), experts 90.5 (ViT-B/32), 92.7 (B/16), 94.2 (L/14)
  A'  FusionBench's, trained anew: experts 90.3, 92.3, 94.3; task arithmetic is 68.0 where it is 69.1 under A
  B   TALL-masks', for 14 and 20 tasks as well, with DTD scored on images that its expert very likely saw

and where it was seen: [log] of the authors' run, [page] of theirs, [abstract], [2nd] in somebody else's paper or notes,
[mem] from memory, to be confirmed. The checkpoints here are those of A', with ``family=task_vectors`` those of A, with
``family=tall_masks`` those of B. A number under another is a guide, not a target. None of the runs was repeated here.
"""

from collections.abc import Callable
from typing import Any

import ml_collections

from configs import clip, common

Rows = dict[str, dict[str, Any]]


def protocol(
    name: str, arg: str | None, rows: Callable[[Any], Rows], held_out: int | None = None
) -> ml_collections.ConfigDict:
    """`configs/clip.py` with a method's rows between the usual floor and ceiling.

    Args:
      name: of the method.
      arg: see `clip.get_config`.
      rows: parsed arguments -> ``{label: settings}``; other rows that a method builds on come first.
      held_out: labelled or unlabelled training rows per task; None is the family's whole validation split.
    """
    arg = common.parse_arg(arg, **clip.ARGUMENTS)
    config = table(clip.published(arg), clip.named(name, arg), rows(arg))
    config.suite.held_out = held_out
    return clip.shrink(config, arg) if arg.runlocal else config


def table(config: ml_collections.ConfigDict, name: str, rows: Rows) -> ml_collections.ConfigDict:
    """Any benchmark with these rows, and no settings but theirs."""
    config.name = name
    every = {"pretrained": {}, "weight_average": {}, **rows, "individual": {}}
    config.settings = ml_collections.ConfigDict(every)
    config.methods = tuple(every)
    last = list(rows)[-1]
    config.claims = (("pretrained", "weight_average"), ("weight_average", last), (last, "individual"))
    return config


def transductive_and_not(label: str, **settings: Any) -> Rows:
    """A row on the unlabelled test rows, as published, and one on held-out training rows without labels."""
    train = {**settings, "data": "unlabelled train", "method": settings.get("method", label)}
    return {label: {**settings, "data": "unlabelled test"}, f"{label}_inductive": train}
