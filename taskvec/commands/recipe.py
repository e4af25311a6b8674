"""From a recipe to a job: a call of `merge_streamed` for every group of tensors with equal settings."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from taskvec import recipes
from taskvec.commands.job import Job, Part, notes
from taskvec.commands.request import Request
from taskvec.io.align import align
from taskvec.io.folders import open_model
from taskvec.merging.stream_plan import output_specs, plan_streamed
from taskvec.recipes import grammar


def prepare(request: Request, pinned: Mapping[str, str]) -> Job:
    """As `taskvec.commands.prepare.prepare`, for a recipe."""
    recipe = recipes.parse(grammar.mapping(request.recipe))
    refs = list(dict.fromkeys([recipe.reference, *recipe.models]))
    models = {ref: open_model(pinned.get(ref, ref)) for ref in refs}
    readers: Mapping[str, Any] = models
    aligned = None
    # Models that are cut into slices may have different numbers of layers, so only whole ones are evened out.
    if recipe.num_layers is None:
        aligned = align(list(models.values()), refs)
        readers = dict(zip(refs, aligned.views, strict=True))
    groups = recipe.groups(readers.__getitem__)
    dtype = np.dtype(request.dtype) if request.dtype else recipe.dtype and np.dtype(recipe.dtype)
    options = {"memory": request.memory, "dtype": dtype}
    parts, specs = [], {}
    for group in groups:
        streaming = plan_streamed(group.method, group.pretrained, group.finetuned, **options)
        parts.append(Part(group.method, group.pretrained, group.finetuned, options, streaming))
        start = group.pretrained or group.finetuned[0]
        specs |= output_specs(start.specs, dtype)
    first = models[recipe.reference]
    copies = dict(aligned.copies) if aligned else {}
    specs |= {alias: specs[source] for alias, source in copies.items()}
    specs |= {name: first.specs[name] for name in (aligned.kept if aligned else ())}
    config: dict[str, Any] = {"tie_word_embeddings": False} if aligned and aligned.untied else {}
    if recipe.num_layers is not None:
        config |= _layers(first.config, recipe.num_layers)
    return Job(
        request,
        models,
        tuple(parts),
        specs,
        copies,
        aligned.kept if aligned else (),
        config,
        dtype.name if dtype is not None else "",
        rows=tuple(recipe.table(readers.__getitem__)),
        notes=(*notes(models), *(aligned.notes if aligned else ())),
    )


def _layers(config: Mapping[str, Any], count: int) -> dict[str, Any]:
    """What ``config.json`` says of a model of `count` layers."""
    changed: dict[str, Any] = {
        key: count for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if key in config
    }
    kinds = config.get("layer_types")
    if kinds and len(kinds) != count:
        if len(set(kinds)) > 1:
            raise ValueError(
                "the model has layers of several kinds (layer_types of its config): slices cannot stack them"
            )
        changed["layer_types"] = kinds[:1] * count
    return changed
