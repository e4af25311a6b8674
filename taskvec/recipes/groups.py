"""A recipe against the models it names: which output tensor comes from which tensors, with which settings."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from taskvec import tree as trees, vectors
from taskvec.merging import mergekit
from taskvec.merging.stream_plan import Reader
from taskvec.recipes.grammar import Parsed, Slice, base_of, merged_of
from taskvec.recipes.parameters import resolve
from taskvec.transforms import Chain

# Outside the layers, what comes before them; the rest (final norm, head) comes after. Only slices make a difference.
_BEFORE = re.compile(r"embed|wte|wpe|wpm|patch|cls_token|class_token|pos_|pre_layernorm|pre_layrnorm|ln_pre|stem|conv1")


class View:
    """Tensors of a reader under the names that they have in the output.

    Attributes:
      specs: output name -> shape and dtype.
      names: output name -> name in the model.
    """

    def __init__(self, reader: Reader, names: Mapping[str, str]):
        self.reader, self.names = reader, dict(names)
        self.specs = {out: reader.specs[source] for out, source in names.items()}

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """One tensor by its output name, or some of its rows."""
        return self.reader.read(self.names[name], rows)

    def path_of(self, name: str) -> Any:
        """The file of a tensor, for messages."""
        return self.reader.path_of(self.names[name])

    def held(self, name: str) -> int:
        """As `taskvec.merging.stream_plan.Reader` says."""
        return self.reader.held(self.names[name]) if hasattr(self.reader, "held") else 0


class Group(NamedTuple):
    """Output tensors that are merged alike: ``merge_streamed(method, pretrained, finetuned, write)``.

    Attributes:
      method: the chain.
      pretrained: view of the base model, ``None`` where the method works on weights themselves.
      finetuned: views of the models that are merged.
      models: their references, as in the recipe.
      settings: what the chain was built from; those of every model are tuples.
    """

    method: Chain
    pretrained: View | None
    finetuned: list[View]
    models: tuple[str, ...]
    settings: dict[str, Any]


class Row(NamedTuple):
    """One line of the table of a dry run."""

    tensors: str
    count: int
    model: str
    coefficients: dict[str, Any]
    shared: dict[str, Any]


class _Tensor(NamedTuple):
    """An output tensor: its name in each source of a slice, the slice, and its place t in the slice's gradient."""

    name: str
    sources: dict[str, str]
    slice: Slice
    t: float


def make_groups(recipe: Parsed, open_model: Callable[[str], Reader]) -> list[Group]:
    """Groups of equal resolved settings; only names and headers are looked at.

    Raises:
      ValueError: layers that a model does not have, models of different names or shapes, settings out of range.
    """
    references = dict.fromkeys(source.model for one in recipe.slices for source in one.sources)
    readers = {reference: open_model(reference) for reference in references}
    tensors = list(_whole(recipe, readers) if recipe.whole else _stacked(recipe, readers))
    kind, found, integers = mergekit.KINDS[recipe.method], {}, []
    for tensor in tensors:
        models = tuple(source.model for source in merged_of(recipe, tensor.slice))
        base = base_of(recipe, tensor.slice) if kind.base in ("required", "optional") else None
        # Integer tensors are copied with whatever group has the same models.
        if not trees.is_float(readers[models[0]].specs[tensor.sources[models[0]]]):
            integers.append((models, base, tensor))
            continue
        settings = _settings(recipe, kind, tensor)
        found.setdefault((models, base, tuple(settings.items())), []).append(tensor)
    for models, base, tensor in integers:
        key = next((key for key in found if key[:2] == (models, base)), None)
        if key is None:
            raise ValueError(f"{tensor.name} holds integers, and no other tensor comes from {', '.join(models)}")
        found[key].append(tensor)
    return [_group(recipe, readers, key, tensors) for key, tensors in found.items()]


def _settings(recipe: Parsed, kind: mergekit.Kind, tensor: _Tensor) -> dict[str, Any]:
    """Resolved values; a tuple for a setting that every model has its own of."""
    outer = [tensor.slice.parameters, recipe.parameters]
    out = {}
    for name, default in {**kind.each, **kind.shared}.items():
        # A model's own settings are looked up by the name that the tensor has in that model.
        merged = merged_of(recipe, tensor.slice)
        own = [(tensor.sources[source.model], source.parameters) for source in merged]
        places = own if name in kind.each else [(tensor.name, {})]
        values = [resolve(name, [scope, *outer], source, tensor.t) for source, scope in places]
        values = [default if value is None else value for value in values]
        if any(value is mergekit.REQUIRED for value in values):
            raise ValueError(
                f"no {name} for {tensor.name}: its filters leave this tensor out; add a rule without filter"
            )
        out[name] = tuple(values) if name in kind.each else values[0]
    return out


def _group(recipe: Parsed, readers: Mapping[str, Reader], key: tuple, tensors: list[_Tensor]) -> Group:
    models, base, settings = key[0], key[1], dict(key[2])
    view = lambda model: View(readers[model], {tensor.name: tensor.sources[model] for tensor in tensors})
    views, pretrained = [view(model) for model in models], None if base is None else view(base)
    start, of = (views[0], models[0]) if pretrained is None else (pretrained, base)
    for model, each in zip(models, views, strict=True):
        try:
            vectors.check_same_model(start.specs, each.specs, f"{model}, beside {of},")
        except ValueError as error:
            raise ValueError(f"{error} (Vocabularies of different sizes cannot be merged.)") from error
    try:
        method = mergekit.chain_of(recipe.method, **settings)
    except ValueError as error:
        raise ValueError(f"{tensors[0].name}: {error}") from error
    return Group(method, pretrained, views, models, settings)


def _whole(recipe: Parsed, readers: Mapping[str, Reader]) -> Iterator[_Tensor]:
    """Every tensor of the base (or first) model, under its own name in all models."""
    one = recipe.slices[0]
    models = [source.model for source in one.sources]
    start = recipe.base_model if recipe.base_model in models else models[0]
    for model in models:
        _check_names(readers[start].specs, start, readers[model].specs, model)
    layers = {}  # of every stack of layers, by what stands before the number
    for name in readers[start].specs:
        prefix, layer, _ = split(name)
        if layer is not None:
            layers[prefix] = max(layers.get(prefix, 0), layer + 1)
    for name in readers[start].specs:
        prefix, layer, _ = split(name)
        t = 0.0 if layer is None else _place(layer, layers[prefix])
        yield _Tensor(name, dict.fromkeys(models, name), one, t)


def _check_names(a: Mapping, name_a: str, b: Mapping, name_b: str) -> None:
    for here, there, name in ((a, b, name_b), (b, a, name_a)):
        absent = sorted(here.keys() - there.keys())
        if absent:
            some = ", ".join(absent[:4]) + (f" and {len(absent) - 4} more" if len(absent) > 4 else "")
            raise ValueError(
                f"{name} has no {some}, which another model of the recipe has; all must have the same tensors"
            )


def _stacked(recipe: Parsed, readers: Mapping[str, Reader]) -> Iterator[_Tensor]:
    """Slices one after the other; tensors before the layers come from the first slice, those after from the last."""
    first, last, start = recipe.slices[0], recipe.slices[-1], 0
    for one, before in ((first, True), (last, False)):
        models = [source.model for source in one.sources]
        for name in readers[models[0]].specs:
            if split(name)[1] is None and bool(_BEFORE.search(name)) == before:
                yield _Tensor(name, {model: _present(readers, model, name) for model in models}, one, 0.0)
    for one in recipe.slices:
        length = one.sources[0].layers[1] - one.sources[0].layers[0]
        for i in range(length):
            yield from _layer(readers, one, i, start + i, _place(i, length))
        start += length


def _layer(readers: Mapping[str, Reader], one: Slice, i: int, out: int, t: float) -> Iterator[_Tensor]:
    model, number = one.sources[0].model, one.sources[0].layers[0] + i
    parts = [(p, s) for p, layer, s in map(split, readers[model].specs) if layer == number]
    if len({prefix for prefix, _ in parts}) > 1:
        raise ValueError(f"{model} has several stacks of layers ({sorted({p for p, _ in parts})}); slices need one")
    if not parts:
        raise ValueError(f"{model} has no layer {number}; layer_range ends before the first layer that is left out")
    for prefix, suffix in parts:
        names = {s.model: f"{prefix}{s.layers[0] + i}{suffix}" for s in one.sources}
        sources = {each: _present(readers, each, name) for each, name in names.items()}
        yield _Tensor(f"{prefix}{out}{suffix}", sources, one, t)


def _present(readers: Mapping[str, Reader], model: str, name: str) -> str:
    if name not in readers[model].specs:
        raise ValueError(f"{model} has no tensor {name}, which the recipe takes from it")
    return name


def _place(layer: int, layers: int) -> float:
    return layer / (layers - 1) if layers > 1 else 1.0


def split(name: str) -> tuple[str, int | None, str]:
    """What stands before the layer's number, the number, what stands after; no number outside the layers.

    >>> split("model.layers.12.mlp.up_proj.weight")
    ('model.layers.', 12, '.mlp.up_proj.weight')
    """
    layer = trees.depth(name)
    if layer is None:
        return name, None, ""
    for found in re.finditer(r"(?<=[/._])\d+(?=[/._]|$)", name):
        other = name[: found.start()] + str(layer + 1) + name[found.end() :]
        if trees.depth(other) == layer + 1:
            return name[: found.start()], layer, name[found.end() :]
    return name, None, ""


def make_table(groups: Sequence[Group]) -> list[Row]:
    """A row for every group and model."""
    rows = []
    for group in groups:
        names = list(group.finetuned[0].specs)
        each = {name: v for name, v in group.settings.items() if isinstance(v, tuple)}
        shared = {name: v for name, v in group.settings.items() if not isinstance(v, tuple)}
        for i, model in enumerate(group.models):
            rows.append(Row(_label(names), len(names), model, {name: v[i] for name, v in each.items()}, shared))
    return rows


def _label(names: Sequence[str]) -> str:
    """Short for a set of tensors: the name of one; the layers, and the rest by name or number."""
    if len(names) == 1:
        return names[0]
    numbers = sorted({layer for _, layer, _ in map(split, names) if layer is not None})
    outside = [name for name in names if split(name)[1] is None]
    parts = []
    if numbers:
        suffixes = {s for _, layer, s in map(split, names) if layer is not None}
        of = f" {next(iter(suffixes))[1:]}" if len(suffixes) == 1 else ""
        together = numbers == list(range(numbers[0], numbers[-1] + 1))
        span = f"{numbers[0]}-{numbers[-1]}" if together and len(numbers) > 1 else ",".join(map(str, numbers))
        parts.append(f"layers {span}{of}" if len(numbers) > 1 else f"layer {span}{of}")
    if outside:
        parts.append(", ".join(outside) if len(outside) < 4 else f"{len(outside)} tensors outside the layers")
    return " + ".join(parts)
