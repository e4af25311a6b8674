"""`taskvec inspect`: how models differ from their base and from one another."""

import pathlib
from collections.abc import Sequence

import numpy as np
from rich.console import Console

from taskvec import tree as trees
from taskvec.analysis import similarity
from taskvec.commands.show import bar, block_of, table
from taskvec.io import prefixes
from taskvec.io.align import View
from taskvec.io.folders import Model, open_model
from taskvec.messages import some
from taskvec.transforms import LeafPolicy


def run(
    base: str, experts: Sequence[tuple[str, str]], console: Console, include: str, density: float, plot: str
) -> dict[str, similarity.Similarity]:
    """Prints norms, cosines, sign conflict and what differs in names, shapes and dtypes; returns the numbers by block.

    Args:
      base: the pretrained model.
      experts: (label, model) of the others.
      console: to print on.
      include: regular expression of the tensors to look at, or "".
      density: for the signs, only this fraction of each task vector's largest entries counts.
      plot: PNG file to draw, or "".

    Raises:
      ValueError: the models have no floating-point tensor in common.
    """
    if not 0 < density <= 1:
        raise ValueError(f"--density must lie in (0, 1], got {density}")
    if plot and not plot.lower().endswith(".png"):
        raise ValueError(f"--plot names a PNG file, got {plot!r}")
    first = open_model(base)
    others = {label: open_model(ref, first) for label, ref in experts}
    views = {}
    for label, model in others.items():
        own = {name: mine for mine, name in prefixes.match(model.specs, first.specs).items()}
        views[label] = View(model, own, {name: model.specs[mine] for name, mine in own.items()})
    common = _comparable(first, list(views.values()), LeafPolicy(include=include or None))
    differences(first, views, console)
    if not common:
        raise ValueError("the models have no floating-point tensor of one name and shape in common")
    groups = block_of({name: first.specs[name] for name in common})
    readers, done = list(views.values()), 0
    thresholds = similarity.trim_thresholds(first, readers, common, density) if density < 1 else None
    total = sum(int(np.prod(first.specs[name].shape)) for name in common)
    with bar("comparing", total) as update:

        def advance(name: str) -> None:
            nonlocal done
            done += int(np.prod(first.specs[name].shape))
            update(done, total)

        found = similarity.stream(first, readers, common, thresholds, advance)
    grouped = similarity.by_group(found, groups)
    whole = sum(grouped.values(), similarity.zero(len(readers)))
    show(grouped, whole, list(views), console, density)
    if plot:
        # Imported late: matplotlib takes long to import.
        from taskvec.analysis import figures

        figures.similarity(pathlib.Path(plot), list(views), grouped, whole, density)
        console.print(f"figure: {plot}", highlight=False)
    return grouped


def _comparable(first: Model, views: Sequence[View], policy: LeafPolicy) -> list[str]:
    """Floating-point tensors that all models have in one shape."""
    return [
        name
        for name, spec in first.specs.items()
        if policy.takes(name)
        and trees.is_float(spec)
        and all(name in v.specs and v.specs[name].shape == spec.shape and trees.is_float(v.specs[name]) for v in views)
    ]


def differences(first: Model, views: dict[str, View], console: Console) -> None:
    """Prints what differs in names, shapes and dtypes."""
    quiet = True
    for label, view in views.items():
        both = sorted(first.specs.keys() & view.specs.keys())
        shapes = [n for n in both if first.specs[n].shape != view.specs[n].shape]
        dtypes = [n for n in both if first.specs[n].dtype != view.specs[n].dtype]
        found = {
            "lacks": sorted(first.specs.keys() - view.specs.keys()),
            "has besides": sorted(view.specs.keys() - first.specs.keys()),
            "other shapes": [f"{n} {list(view.specs[n].shape)}, not {list(first.specs[n].shape)}" for n in shapes],
            "other dtypes": [f"{n} {view.specs[n].dtype}, not {first.specs[n].dtype}" for n in dtypes],
            "other names": [f"{view.names[n]} for {n}" for n in both if view.names[n] != n],
        }
        for what, where in found.items():
            if where:
                quiet = False
                text = f"{label}: {what} ({len(where)}): {some(where, 4)}"
                console.print(text, highlight=False, markup=False, soft_wrap=True)
    if quiet:
        console.print("names, shapes and dtypes are the same in all models", highlight=False)


def show(
    grouped: dict[str, similarity.Similarity],
    whole: similarity.Similarity,
    labels: Sequence[str],
    console: Console,
    density: float,
) -> None:
    """Prints the tables."""
    signs = "sign conflict" if density == 1 else f"sign conflict (top {density:.0%})"
    columns = ("block", "entries", "|theta_0|", *(f"|{label}|" for label in labels), "mean cosine", signs, "agreement")
    made = table("Norms of the task vectors, relative to that of the pretrained weights", *columns)
    for name, one in {**grouped, "all": whole}.items():
        norms = [f"{value:.3%}" for value in one.relative_norms]
        numbers = [f"{one.mean_cosine:z.3f}", f"{one.conflict:.1%}", f"{one.agreement:.3f}"]
        numbers = numbers if len(labels) > 1 else ["-"] * 3
        if name == "all":
            made.add_section()
        made.add_row(name, f"{one.entries:,}", f"{np.sqrt(one.theta0):.4g}", *norms, *numbers)
    console.print(made)
    if len(labels) > 1:
        cosines = table("Cosines between task vectors, over all tensors", "", *labels)
        for label, row in zip(labels, whole.cosines, strict=True):
            cosines.add_row(label, *(f"{value:z.3f}" for value in row))
        console.print(cosines)
        shares = ", ".join(f"{count}: {share:.1%}" for count, share in enumerate(whole.influence))
        console.print(f"entries that so many task vectors change: {shares}", highlight=False, soft_wrap=True)
