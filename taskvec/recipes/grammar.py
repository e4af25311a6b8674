"""MergeKit's YAML recipes: what stands in one, checked before any model is opened."""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import yaml

from taskvec.merging import mergekit
from taskvec.messages import did_you_mean
from taskvec.recipes.parameters import Setting, parse_settings

DTYPES = ("float32", "float16", "bfloat16")
REFUSED = {
    "tokenizer": "vocabularies are not rewritten; merge models of one tokenizer",
    "tokenizer_source": "vocabularies are not rewritten; merge models of one tokenizer, and leave this out",
    "chat_template": "tokenizer files are copied as they are; edit tokenizer_config.json of the result",
    "modules": "models are taken by the names of their tensors; merge the folders of the modules one by one",
    "residual_weight": "it has no effect in MergeKit either",
    **dict.fromkeys(
        ("experts", "gate_mode", "experts_per_token", "shared_experts", "positive_prompts"),
        "mixture-of-experts models are not built here",
    ),
}
_TOP = ("merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype")


class Source(NamedTuple):
    """A model of a slice; `layers` is ``None`` for all of it."""

    model: str
    layers: tuple[int, int] | None
    parameters: dict[str, Setting]


class Slice(NamedTuple):
    """Consecutive output layers, and the models that they are merged from."""

    sources: tuple[Source, ...]
    base: str | None
    parameters: dict[str, Setting]


class Parsed(NamedTuple):
    """A recipe in full; `whole` if it merges models layer by layer instead of stacking slices."""

    method: str
    base_model: str | None
    slices: tuple[Slice, ...]
    whole: bool
    parameters: dict[str, Setting]
    dtype: Any


def read(path: str | pathlib.Path) -> Mapping:
    """The YAML mapping of a file; raises `ValueError` if there is none."""
    return mapping(pathlib.Path(path).read_text(encoding="utf-8"), str(path))


def mapping(text: str, where: str = "the recipe") -> Mapping:
    """The YAML mapping of a text; raises `ValueError` if there is none."""
    try:
        given = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is no single YAML document: {error}") from error
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}: a recipe is a mapping with merge_method, models or slices, ...; got {given!r:.60}")
    return given


def parse(given: Mapping) -> Parsed:
    """Checks a recipe; raises `ValueError` that names the place, what is wrong and what is allowed."""
    _check_keys(given, _TOP, "the recipe")
    method = given.get("merge_method")
    if method not in mergekit.KINDS:
        hint = did_you_mean(method, mergekit.KINDS)
        raise ValueError(f"unknown merge_method {method!r}{hint}; there are: {', '.join(sorted(mergekit.KINDS))}")
    kind = mergekit.KINDS[method]
    everything = {**kind.each, **kind.shared}
    base = _reference(given["base_model"], "base_model") if given.get("base_model") is not None else None
    if bool(given.get("models")) == bool(given.get("slices")):
        raise ValueError("a recipe has either models or slices")
    if given.get("models"):
        slices = (_whole(given["models"], base, kind),)
    else:
        items = _list(given["slices"], "slices")
        slices = tuple(_slice(each, f"slices[{i}]", kind, everything) for i, each in enumerate(items))
    parameters = parse_settings(given.get("parameters"), everything, "parameters")
    parsed = Parsed(method, base, slices, bool(given.get("models")), parameters, _dtype(given))
    for i, one in enumerate(slices):
        _check_inputs(parsed, one, "models" if parsed.whole else f"slices[{i}]")
    return parsed


def base_of(recipe: Parsed, one: Slice) -> str | None:
    """The base model of a slice."""
    return one.base if one.base is not None else recipe.base_model


def merged_of(recipe: Parsed, one: Slice) -> tuple[Source, ...]:
    """The models of a slice that are merged, in order; the base is among them only where the method merges it."""
    kind, base = mergekit.KINDS[recipe.method], base_of(recipe, one)
    if kind.base == "input":
        return one.sources
    others = tuple(source for source in one.sources if source.model != base)
    return tuple(s for s in one.sources if s.model == base) + others if kind.base == "first" else others


def _whole(models: Any, base: str | None, kind: mergekit.Kind) -> Slice:
    sources = []
    for i, each in enumerate(_list(models, "models")):
        where = f"models[{i}]"
        each = {"model": each} if isinstance(each, str) else each
        _check_keys(each, ("model", "parameters"), where)
        model = _reference(each.get("model"), f"{where}.model")
        sources.append(Source(model, None, _of_model(each, kind, f"{where} ({model})")))
    if base is not None and base not in [source.model for source in sources]:
        sources.append(Source(base, None, {}))
    return Slice(tuple(sources), None, {})


def _slice(each: Any, where: str, kind: mergekit.Kind, everything: Mapping) -> Slice:
    _check_keys(each, ("sources", "base_model", "parameters"), where)
    sources = []
    for i, source in enumerate(_list(each.get("sources"), f"{where}.sources")):
        at = f"{where}.sources[{i}]"
        _check_keys(source, ("model", "layer_range", "parameters"), at)
        span = source.get("layer_range")
        if not (
            isinstance(span, list) and len(span) == 2 and all(type(n) is int for n in span) and 0 <= span[0] < span[1]
        ):
            raise ValueError(f"{at}: layer_range is [first, one past the last], got {span!r}")
        sources.append(Source(_reference(source.get("model"), f"{at}.model"), tuple(span), _of_model(source, kind, at)))
    lengths = [source.layers[1] - source.layers[0] for source in sources]
    if len(set(lengths)) > 1:
        raise ValueError(f"{where}: all sources of a slice must have the same number of layers, got {lengths}")
    base = _reference(each["base_model"], f"{where}.base_model") if each.get("base_model") is not None else None
    return Slice(tuple(sources), base, parse_settings(each.get("parameters"), everything, where))


def _of_model(each: Mapping, kind: mergekit.Kind, where: str) -> dict[str, Setting]:
    shared = f". Of the whole merge, in the recipe's own parameters: {', '.join(kind.shared) or 'none'}"
    return parse_settings(each.get("parameters"), kind.each, where, shared)


def _check_inputs(recipe: Parsed, one: Slice, where: str) -> None:
    """That the method can take these models, and that nothing it needs is missing everywhere."""
    kind, base = mergekit.KINDS[recipe.method], base_of(recipe, one)
    names = [source.model for source in one.sources]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{where}: {twice[0]} is there twice; a model can enter a merge once")
    if kind.base in ("required", "first") and base is None:
        raise ValueError(f"{recipe.method} needs a base_model")
    if kind.base in ("required", "first") and base not in names:
        raise ValueError(f"{where}: the base_model {base} must be one of the sources, they are {', '.join(names)}")
    merged = merged_of(recipe, one)
    low, high = kind.models
    if not low <= len(merged) <= (high or len(merged)):
        allowed = f"{low} or more" if high is None else str(low) if low == high else f"{low} to {high}"
        besides = " besides the base_model" if kind.base in ("required", "optional") and base else ""
        found = ", ".join(source.model for source in merged) or "none"
        raise ValueError(f"{where}: {recipe.method} merges {allowed} models{besides}, got {len(merged)} ({found})")
    for name, default in {**kind.each, **kind.shared}.items():
        for source in merged if default is mergekit.REQUIRED else ():
            scopes = [source.parameters] * (name in kind.each) + [one.parameters, recipe.parameters]
            if not any(name in scope for scope in scopes):
                of = f" for {source.model}" if name in kind.each else ""
                more = "; a base_model is one more model to merge here" if source.model == base else ""
                raise ValueError(f"{where}: {recipe.method} needs a {name}{of}{more}")


def _check_keys(given: Any, allowed: tuple[str, ...], where: str) -> None:
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} must be a mapping with {', '.join(allowed)}; got {given!r}")
    for key, value in given.items():
        if key in REFUSED and value is not None:
            raise ValueError(f"{where}: {key} is not supported: {REFUSED[key]}")
        if key not in allowed and key not in REFUSED:
            raise ValueError(f"{where}: unknown key {key!r}{did_you_mean(key, allowed)}; allowed: {', '.join(allowed)}")


def _list(given: Any, where: str) -> list:
    if not isinstance(given, list) or not given:
        raise ValueError(f"{where} must be a list with at least one entry, got {given!r}")
    return given


def _reference(given: Any, where: str) -> str:
    """``path[@revision][+lora[@revision]]``, also from MergeKit's mapping form."""
    if isinstance(given, str) and given:
        return given
    if isinstance(given, Mapping) and "model" in given:
        if given.get("override_architecture"):
            raise ValueError(f"{where}: override_architecture is not supported: tensors are taken by their names")
        return "+".join(_reference(given[k], where) for k in ("model", "lora") if given.get(k))
    if isinstance(given, Mapping) and "path" in given:
        return given["path"] + (f"@{given['revision']}" if given.get("revision") else "")
    raise ValueError(f"{where} must name a model (a folder, a file or a hub id), got {given!r}")


def _dtype(given: Mapping) -> Any:
    """The dtype of the output; arithmetic is float32 whatever ``dtype`` says."""
    chosen = None
    for key in ("dtype", "out_dtype"):
        if given.get(key) is not None:
            if given[key] not in DTYPES:
                raise ValueError(f"{key} must be one of {', '.join(DTYPES)}, got {given[key]!r}")
            chosen = given[key]
    return None if chosen is None else jnp.dtype(chosen)
