"""From a request to a job: everything is opened, aligned and checked, and no tensor is merged yet."""

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from taskvec.commands import coefficients
from taskvec.commands.job import Job, Part, Zeros, notes
from taskvec.commands.request import Request
from taskvec.io.align import align
from taskvec.io.folders import Model, open_model
from taskvec.merging import registry
from taskvec.merging.stream_plan import output_specs, plan_streamed
from taskvec.messages import some
from taskvec.transforms import LeafPolicy


def prepare(request: Request, pinned: Mapping[str, str] | None = None) -> Job:
    """Opens the models, from headers alone, and checks all that can be checked.

    Args:
      request: what is wanted.
      pinned: ``{model as a recipe names it: where it was found when the merge was recorded}``.

    Raises:
      ValueError: unknown method or setting, models or extras that do not match, too little memory.
      FileNotFoundError: a model is not there.
    """
    if request.recipe:
        # Imported late: most merges have no recipe.
        from taskvec.commands import recipe

        return recipe.prepare(request, pinned or {})
    method = registry.get(request.method)
    request = coefficients.read(request)
    _check_settings(method, request.settings)
    task = _task(request, method)
    # What the card asks for is checked before any model is looked for.
    method.card.check(method.name, len(request.experts), bool(request.base), _by_name(request.extras))
    models = _open(request)
    policy = LeafPolicy(include=request.include or None)
    if request.method == coefficients.METHOD:
        request = coefficients.named(request, models)
        policy = LeafPolicy(include=coefficients.takes(request))
    labels, opened = list(models), list(models.values())
    has_base = len(opened) > len(request.experts)
    aligned = align(opened, labels, policy.takes)
    views = list(aligned.views)
    pretrained = views.pop(0) if has_base else None
    if opened[0].kind == "factors":
        _check_factors(opened, labels)
        pretrained = Zeros(views[0].specs)
    extras = _extras(request)
    named = {f"{name} of {labels[i - len(views)]}": each[i] for name, each in extras.items() for i in range(len(views))}
    pinned_extras = tuple((name, model.pinned) for name, each in extras.items() for model in each)
    dtype = np.dtype(request.dtype) if request.dtype else None
    options = {"policy": policy, "extras": extras, "memory": request.memory, "dtype": dtype, "task": task}
    options |= request.settings
    streaming = plan_streamed(method, pretrained, views, **options)
    specs = output_specs(aligned.views[0].specs, dtype)
    specs |= {alias: specs[source] for alias, source in aligned.copies.items()}
    specs |= {name: opened[0].specs[name] for name in aligned.kept}
    return Job(
        dataclasses.replace(request, settings=_resolved(method, request.settings), extras=pinned_extras),
        models,
        (Part(method, pretrained, views, options, streaming),),
        specs,
        aligned.copies,
        aligned.kept,
        {"tie_word_embeddings": False} if aligned.untied else {},
        request.dtype,
        notes=(*notes(models), *aligned.notes),
        extras=named,
    )


def _check_settings(method: registry.Method, settings: Mapping[str, Any]) -> None:
    try:
        method(**settings)
    except TypeError as error:
        raise ValueError(f"{method.name}: a setting has the wrong type ({error}); see `taskvec methods`") from error


def _open(request: Request) -> dict[str, Model]:
    """Label -> model, the base first if there is one."""
    if request.lora == "factor":
        if request.base:
            raise ValueError("--lora factor merges the factors themselves and writes an adapter: leave out --base")
        models = {label: open_model(ref, lora="factor") for label, ref in request.experts}
        other = [label for label, model in models.items() if model.kind != "factors"]
        if other:
            raise ValueError(f"--lora factor is for adapters, and {other[0]} is none")
        return models
    if request.base and any(label == "base" for label, _ in request.experts):
        raise ValueError("an expert must not be called 'base'; write --expert LABEL=MODEL")
    base = open_model(request.base) if request.base else None
    return ({"base": base} if base else {}) | {label: open_model(ref, base) for label, ref in request.experts}


def _extras(request: Request) -> dict[str, list[Model]]:
    """Name -> one of each expert, in their order."""
    extras = {name: [open_model(ref) for ref in refs] for name, refs in _by_name(request.extras).items()}
    wrong = [name for name, each in extras.items() if len(each) != len(request.experts)]
    if wrong:
        raise ValueError(f"--extra {wrong[0]}=... is needed once for each of the {len(request.experts)} experts")
    return extras


def _task(request: Request, method: registry.Method) -> int | None:
    """The number of the expert whose model a task-conditioned method is to write."""
    labels = [label for label, _ in request.experts]
    if method.card.result != "task-conditioned":
        if request.task:
            raise ValueError(f"{method.name} gives one model for all tasks: leave out --task")
        return None
    told = f"one of {some(labels)} (or 0 to {len(labels) - 1})"
    if not request.task:
        raise ValueError(f"{method.name} gives a model for each task: choose one with --task, {told}")
    if request.task in labels:
        return labels.index(request.task)
    if not request.task.isdigit() or int(request.task) >= len(labels):
        raise ValueError(f"--task must be {told}, got {request.task!r}")
    return int(request.task)


def _check_factors(models: Sequence[Model], labels: Sequence[str]) -> None:
    """Factors can be averaged only where they mean the same: equal ranks, scales and places."""
    fields = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out")
    for model, label in zip(models[1:], labels[1:], strict=True):
        for field in fields:
            mine, first = model.config.get(field) or None, models[0].config.get(field) or None
            if mine != first:
                raise ValueError(
                    f"--lora factor needs adapters of equal rank and scale: {field} is {mine} in {label} and {first} "
                    f"in {labels[0]}; --lora delta with --base merges any adapters"
                )


def _resolved(method: registry.Method, settings: Mapping[str, Any]) -> dict[str, Any]:
    given = {name for name, p in inspect.signature(method.build).parameters.items() if p.default is not p.empty}
    return {name: value for name, value in method.defaults.items() if name in given} | dict(settings)


def _by_name(pairs: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, ref in pairs:
        found.setdefault(name, []).append(ref)
    return found
