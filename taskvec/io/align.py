"""Several models under one set of names, so that a merge sees copies of one model.

What may differ without harm is evened out here: a prefix, buffers that only some files hold, embeddings that are tied
in one file and stored twice in another. What may not is refused, with what to do about it.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from taskvec import tree as trees
from taskvec.io import prefixes
from taskvec.io.folders import Model
from taskvec.messages import some

# Constants that some versions of a file hold and others do not: rotary frequencies, position numbers, causal masks.
_BUFFER = re.compile(r"(^|\.)(inv_freq|position_ids|masked_bias|relative_position_index|num_batches_tracked)$")
_CAUSAL_MASK = re.compile(r"(^|\.)attn\.bias$")
_INPUT = re.compile(r"(^|\.)(shared|embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|token_embedding)\.weight$")
_OUTPUT = re.compile(
    r"(^|\.)(lm_head|embed_out|lm_head\.decoder|predictions\.decoder|vocab_projector|proj_out)\.weight$"
)
_OUTPUT_BIAS = re.compile(r"(^|\.)(lm_head|predictions)\.decoder\.bias$")
_STACK_INPUT = re.compile(r"(?P<prefix>.*)(?:encoder|decoder)\.embed_tokens\.weight")
_BLOCK = 1 << 22  # bytes compared at once


@dataclasses.dataclass(frozen=True)
class View:
    """A model under the names of another; what `taskvec.merging.merge_streamed` reads.

    Attributes:
      model: where the tensors come from.
      names: name here -> name in the model.
      specs: name here -> shape and dtype.
      rest: the first model's view, which tensors that take no part are read from.
    """

    model: Model
    names: Mapping[str, str]
    specs: Mapping[str, Any]
    rest: "View | None" = None

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """A tensor, or some of its rows."""
        if name not in self.names and self.rest:
            return self.rest.read(name, rows)
        return self.model.read(self.names[name], rows)

    def path_of(self, name: str) -> Any:
        """The file that a tensor is read from."""
        if name not in self.names and self.rest:
            return self.rest.path_of(name)
        return self.model.path_of(self.names[name])

    def held(self, name: str) -> int:
        """As `Model.held`."""
        return self.model.held(self.names[name]) if name in self.names else 0


@dataclasses.dataclass(frozen=True)
class Aligned:
    """Models that can be merged.

    Attributes:
      views: one per model, all with the same names.
      copies: ``{name: name it is tied to}`` of tensors that the first model stores twice: written twice, merged once.
      kept: names of the first model's tensors that are no part of the merge because others lack them (buffers).
      untied: output embeddings that the first model ties and another does not: the result is untied.
      notes: what was evened out, for the user.
    """

    views: tuple[View, ...]
    copies: Mapping[str, str]
    kept: tuple[str, ...]
    untied: tuple[str, ...]
    notes: tuple[str, ...]


def align(models: Sequence[Model], labels: Sequence[str], takes: Callable[[str], bool] = lambda name: True) -> Aligned:
    """Brings models to the names of the first.

    Args:
      models: the pretrained model, if there is one, then the others.
      labels: what messages call them.
      takes: whether a tensor takes part in the merge; the others may be absent or differ.

    Raises:
      ValueError: tensors that take part are missing, surplus or differ in shape or kind of dtype.
    """
    notes: list[str] = []
    names = [{name: name for name in models[0].specs}]
    for model, label in zip(models[1:], labels[1:], strict=True):
        found = prefixes.match(model.specs, models[0].specs)
        renamed = [own for own, name in found.items() if own != name]
        if renamed:
            notes.append(
                f"{label}: {len(renamed)} names are called otherwise (a prefix, gamma and beta), as in {renamed[0]}"
            )
        names.append({name: own for own, name in found.items()})
    copies, untied = _settle_ties(models, labels, names, notes)
    first = names[0]
    merged = [name for name in first if trees.is_float(models[0].specs[first[name]]) and takes(name)]
    lacking = {name for name in merged if _is_buffer(name) and any(name not in own for own in names)}
    merged = [name for name in merged if name not in lacking]
    for model, label, own in zip(models[1:], labels[1:], names[1:], strict=True):
        surplus = [name for name in own if name not in first and takes(name) and not _is_buffer(name)]
        surplus = [name for name in surplus if trees.is_float(model.specs[own[name]])]
        _check(models[0], labels[0], first, model, label, own, merged, surplus)
    specs = {name: models[0].specs[own] for name, own in first.items() if name not in lacking}
    views = [View(models[0], first, specs)]
    for model, own in zip(models[1:], names[1:], strict=True):
        here = {name: model.specs[own[name]] for name in merged}
        views.append(View(model, {name: own[name] for name in merged}, specs | here, views[0]))
    return Aligned(tuple(views), copies, tuple(sorted(lacking)), tuple(untied), tuple(notes))


def tied_to(name: str, names: Mapping[str, Any]) -> str | None:
    """The tensor that `name` may be tied to, by the names and shapes of a model: input for output embeddings.

    Args:
      name: of a tensor.
      names: ``{name: spec}`` of all tensors there are.
    """
    if match := _STACK_INPUT.fullmatch(name):
        shared = f"{match['prefix']}shared.weight"
        return shared if shared in names else None
    if _OUTPUT_BIAS.search(name):
        bias = name.removesuffix("decoder.bias") + "bias"
        return bias if bias in names else None
    if not _OUTPUT.search(name):
        return None
    inputs = [each for each in names if _INPUT.search(each) and names[each].shape == names[name].shape]
    shared = [each for each in inputs if each.endswith("shared.weight")] or inputs
    # Encoder-decoders without a shared tensor tie the decoder's.
    decoder = [each for each in shared if "decoder" in each] or shared
    return min(decoder, key=len) if decoder else None


def _settle_ties(models: Sequence[Model], labels, names: list[dict[str, str]], notes: list[str]):
    """Gives tied tensors one name in every model; returns what is to be written twice, and what becomes untied."""
    specs = {name: m.specs[own] for m, each in zip(models, names, strict=True) for name, own in each.items()}
    copies, untied = {}, []
    for alias in list(specs):
        source = tied_to(alias, specs)
        if source is None:
            continue
        for own in names:  # some files keep the other of the two
            if source not in own and alias in own:
                own[source] = own[alias]
        real = [i for i, own in enumerate(names) if alias in own and not _same(models[i], own[alias], own.get(source))]
        stored = alias in names[0]
        if real:
            tied = [i for i, own in enumerate(names) if i not in real and source in own]
            for i in tied:
                names[i][alias] = names[i][source]
            if tied:
                who = ", ".join(labels[i] for i in tied)
                notes.append(
                    f"{alias} is tied to {source} in {who} and not in {labels[real[0]]}: merged as its own tensor"
                )
            untied += [] if stored else [alias]
        else:
            for own in names:
                own.pop(alias, None)
            if stored:
                copies[alias] = source
    return copies, untied


def _same(model: Model, a: str, b: str | None) -> bool:
    """Whether two tensors of a model are one, stored twice.

    Nothing is read if the config says that output embeddings are not tied; else only as far as they are equal.
    """
    if b is None or a == b:
        return a == b
    parts = (model.config, model.config.get("text_config") or {})
    if _OUTPUT.search(a) and any(part.get("tie_word_embeddings") is False for part in parts):
        return False
    spec, other = model.specs[a], model.specs[b]
    if spec.shape != other.shape or spec.dtype != other.dtype:
        return False
    length, *rest = spec.shape or (1,)
    step = max(1, _BLOCK // max(1, int(np.prod(rest)) * spec.dtype.itemsize))
    cuts = [slice(i, min(i + step, length)) for i in range(0, length, step)] if spec.shape else [None]
    return all(np.array_equal(model.read(a, rows), model.read(b, rows)) for rows in cuts)


def _is_buffer(name: str) -> bool:
    return bool(_BUFFER.search(name) or _CAUSAL_MASK.search(name))


def _check(base: Model, base_label: str, first, model: Model, label: str, own, merged, surplus) -> None:
    spec = lambda name: (base.specs[first[name]], model.specs[own[name]])
    missing = sorted(name for name in merged if name not in own)
    shapes = sorted(name for name in merged if name in own and spec(name)[0].shape != spec(name)[1].shape)
    kinds = sorted(name for name in merged if name in own and not trees.is_float(spec(name)[1]))
    _check_vocabulary(base, base_label, first, model, label, own, shapes, bool(missing or surplus))
    told = []
    if missing:
        told.append(f"{len(missing)} tensors are missing: {some(missing, 4)}")
    if surplus:
        told.append(f"{len(surplus)} are not in {base_label}: {some(sorted(surplus), 4)}")
    if shapes:
        told.append(
            "shapes differ: " + some([f"{n} {list(spec(n)[1].shape)}, not {list(spec(n)[0].shape)}" for n in shapes], 4)
        )
    if kinds:
        told.append("integers in place of floating-point numbers: " + some(kinds, 4))
    if told:
        raise ValueError(
            f"{label} is not a fine-tuned copy of {base_label}: {'; '.join(told)}. Merge models of one architecture, "
            "or choose the tensors they share with --include REGEX (the others are copied from the base)"
        )


def _check_vocabulary(base: Model, base_label: str, first, model: Model, label: str, own, shapes, more: bool) -> None:
    """Refuses, by its name, the commonest difference in shape: tokens were added to one of the models."""
    rows = lambda m, names, name: m.specs[names[name]].shape
    resized = [
        name
        for name in shapes
        if (_INPUT.search(name) or _OUTPUT.search(name) or _OUTPUT_BIAS.search(name))
        and rows(base, first, name)[1:] == rows(model, own, name)[1:]
    ]
    if more or not resized or len(resized) < len(shapes):
        return
    here, there = rows(model, own, resized[0])[0], rows(base, first, resized[0])[0]
    skip = "|".join(re.escape(name) for name in resized)
    raise ValueError(
        f"vocabulary sizes differ: {label} has {here} rows in {some(resized)}, {base_label} has {there}. Rows of "
        "different tokenizers must not be averaged: give both one tokenizer (resize_token_embeddings of transformers), "
        f"or keep the base's with --include '^(?!{skip})'"
    )
