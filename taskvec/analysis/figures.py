"""Figures: accuracy by method and task, coefficients by layer and task."""

import pathlib
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import TwoSlopeNorm

from taskvec.tree import depth


def _save(figure: plt.Figure, path: pathlib.Path) -> None:
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png", dpi=150, bbox_inches="tight")
    plt.close(figure)
    partial.replace(path)


def accuracy(
    path: pathlib.Path,
    methods: Sequence[str],
    tasks: Sequence[str],
    values_MxK: np.ndarray,
    title: str = "",
) -> None:
    """Methods x tasks: numbers are accuracies in per cent, colours the gain over the method in the first row.

    Args:
      path: of the PNG file.
      methods, tasks: M row and K column names; a last column with the mean is added. The first method is the
        reference, usually the pretrained model.
      values_MxK: accuracies in [0, 1].
      title: above the figure.
    """
    percent = 100 * np.concatenate([values_MxK, values_MxK.mean(1, keepdims=True)], axis=1)
    gain = percent - percent[0]
    low, high = min(gain.min(), 0.0), max(gain.max(), 1.0)
    figure, axes = plt.subplots(figsize=(2.2 + 1.05 * (len(tasks) + 1), 1.2 + 0.36 * len(methods)))
    image = axes.imshow(gain, aspect="auto", cmap="RdBu", norm=TwoSlopeNorm(0.0, -high, high))
    for (row, column), value in np.ndenumerate(percent):
        shade = "white" if abs(gain[row, column]) > 0.65 * high else "black"
        weight = "bold" if column == len(tasks) else "normal"
        axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=shade, fontsize=9, fontweight=weight)
    axes.set_xticks(range(len(tasks) + 1), [*(t.replace("_", "\n") for t in tasks), "mean"], fontsize=9)
    axes.set_yticks(range(len(methods)), methods, fontsize=9)
    axes.axvline(len(tasks) - 0.5, color="black", linewidth=1)
    axes.tick_params(length=0)
    bar = figure.colorbar(image, label=f"points gained over {methods[0]}", fraction=0.05, pad=0.02)
    bar.ax.set_ylim(max(low, -high), high)  # the part of the scale that occurs
    axes.set_title(title, fontsize=10)
    _save(figure, path)


def coefficients(path: pathlib.Path, groups: Sequence[str], tasks: Sequence[str], values_GxT: np.ndarray) -> None:
    """Group x task heat map of merging coefficients, as AdaMerging learns them (arXiv 2310.02575, figure 5).

    Rows stand in the order of the network: what has no block index first, then block by block; the last groups of a
    name that says so (head, final norm) come last.

    Args:
      path: of the PNG file.
      groups: G names (paths of tensors, modules or blocks).
      tasks: T names.
      values_GxT: the coefficients; of ``[G, T, K]`` the mean over the K parts of a tensor is shown.
    """
    share = f", mean over {values_GxT.shape[2]} parts of each" if values_GxT.ndim == 3 else ""
    values_GxT = values_GxT.reshape(*values_GxT.shape[:2], -1).mean(2)
    order = sorted(range(len(groups)), key=lambda g: _network_order(groups[g]))
    figure, axes = plt.subplots(figsize=(2.5 + 0.8 * len(tasks), max(2.5, min(0.09 * len(groups), 14))))
    low, high = min(0.0, float(values_GxT.min())), max(0.6, float(values_GxT.max()))
    image = axes.imshow(values_GxT[order], aspect="auto", cmap="viridis", vmin=low, vmax=high, interpolation="nearest")
    axes.set_xticks(range(len(tasks)), [t.replace("_", "\n") for t in tasks], fontsize=8)
    starts = {}
    for row, g in enumerate(order):
        block = depth(groups[g])
        starts.setdefault(groups[g].split("/")[0] if block is None else f"block {block}", row)
    for row in starts.values():
        axes.axhline(row - 0.5, color="white", linewidth=0.6)
    axes.set_yticks(list(starts.values()), list(starts), fontsize=7)
    axes.tick_params(length=0)
    figure.colorbar(image, label="coefficient", fraction=0.08, pad=0.03)
    means = ", ".join(f"{m:.2f}" for m in values_GxT.mean(0))
    axes.set_title(f"{len(groups)} coefficients per task{share}; means {means}", fontsize=8)
    _save(figure, path)


def _network_order(name: str) -> tuple:
    block = depth(name)
    if block is not None:
        return (1, block, name)
    return (2 if any(word in name for word in ("head", "final", "pooler", "classifier")) else 0, 0, name)


def similarity(path: pathlib.Path, labels: Sequence[str], blocks: dict, whole, density: float = 1.0) -> None:
    """How T task vectors relate: relative norm by block, cosines over the whole model, sign conflict by block.

    Args:
      path: of the PNG file.
      labels: T names.
      blocks: ``{block: taskvec.analysis.similarity.Similarity}`` in the order of the network.
      whole: their sum.
      density: fraction of the entries that the signs are of, for the title.
    """
    several = len(labels) > 1
    figure, axes = plt.subplots(
        1, 3 if several else 1, figsize=(13.5 if several else 6, 4), width_ratios=[5, 4, 5] if several else [1]
    )
    norms, *rest = np.atleast_1d(axes)
    names, at = [_short(name) for name in blocks], np.arange(len(blocks))
    _by_block(norms, names)
    stacks = [name.rpartition(str(depth(name)))[0] for name in blocks]
    for t, label in enumerate(labels):
        values = np.array([100 * one.relative_norms[t] for one in blocks.values()])
        for stack in dict.fromkeys(stacks):  # lines join the blocks of one stack only
            here = np.array([each == stack for each in stacks])
            first = stack == stacks[0]
            norms.plot(at[here], values[here], "o-", ms=3, lw=1.2, color=f"C{t}", label=label if first else None)
    norms.set_ylim(0, 1.15 * max(norms.get_ylim()[1], 1e-9))
    norms.set_title("norm of the task vector, % of the pretrained weights'", fontsize=9)
    norms.legend(fontsize=7, frameon=False, ncols=1 + len(labels) // 9)
    if several:
        cosines, signs = rest
        _cosines(figure, cosines, labels, whole.cosines)
        _by_block(signs, names)
        signs.bar(at, [100 * one.conflict for one in blocks.values()], color="tab:blue", width=0.7)
        signs.axhline(100 * whole.conflict, color="black", lw=0.8, ls="--")
        signs.set_title(
            f"entries whose signs conflict, %{'' if density == 1 else f', of the top {density:.0%}'} "
            f"(all: {100 * whole.conflict:.1f})",
            fontsize=9,
        )
    figure.tight_layout(w_pad=2)
    _save(figure, path)


def _short(name: str) -> str:
    """``model.layers.3`` as ``3``; encoders and decoders keep their first letters."""
    if depth(name) is None:
        return name
    side = "".join(
        word[:3] + " " for word in name.split(".") if word in ("encoder", "decoder", "text_model", "vision_model")
    )
    return f"{side}{depth(name)}"


def _by_block(axes: plt.Axes, names: Sequence[str]) -> None:
    step = max(1, len(names) // 16)
    axes.set_xticks(
        range(0, len(names), step), names[::step], fontsize=7, rotation=60 if max(map(len, names)) > 3 else 0
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel("block", fontsize=8)


def _cosines(figure: plt.Figure, axes: plt.Axes, labels: Sequence[str], cosines_TxT: np.ndarray) -> None:
    image = axes.imshow(cosines_TxT, cmap="RdBu", vmin=-1, vmax=1)
    if len(labels) <= 10:
        for (row, column), value in np.ndenumerate(cosines_TxT):
            shade = "white" if abs(value) > 0.6 else "black"
            axes.text(column, row, f"{value:z.2f}", ha="center", va="center", fontsize=7, color=shade)
    axes.set_xticks(range(len(labels)), labels, fontsize=7, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.tick_params(length=0)
    figure.colorbar(image, fraction=0.05, pad=0.03).ax.tick_params(labelsize=7)
    axes.set_title("cosine between task vectors", fontsize=9)
