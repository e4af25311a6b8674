"""Figures: accuracy by method and task, coefficients by layer and task."""

import pathlib
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import TwoSlopeNorm


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
    gain_from: int = 0,
    title: str = "",
) -> None:
    """Methods x tasks: numbers are accuracies in per cent, colours the gain over the method in row `gain_from`.

    Args:
      path: of the PNG file.
      methods, tasks: M row and K column names; a last column with the mean is added.
      values_MxK: accuracies in [0, 1].
      gain_from: row of the reference, usually the pretrained model.
      title: above the figure.
    """
    percent = 100 * np.concatenate([values_MxK, values_MxK.mean(1, keepdims=True)], axis=1)
    gain = percent - percent[gain_from]
    limit = max(np.abs(gain).max(), 1.0)
    figure, axes = plt.subplots(figsize=(2.2 + 1.05 * (len(tasks) + 1), 1.2 + 0.36 * len(methods)))
    image = axes.imshow(gain, aspect="auto", cmap="RdBu", norm=TwoSlopeNorm(0.0, -limit, limit))
    for (row, column), value in np.ndenumerate(percent):
        shade = "white" if abs(gain[row, column]) > 0.65 * limit else "black"
        weight = "bold" if column == len(tasks) else "normal"
        axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=shade, fontsize=9, fontweight=weight)
    axes.set_xticks(range(len(tasks) + 1), [*(t.replace("_", "\n") for t in tasks), "mean"], fontsize=9)
    axes.set_yticks(range(len(methods)), methods, fontsize=9)
    axes.axvline(len(tasks) - 0.5, color="black", linewidth=1)
    axes.tick_params(length=0)
    figure.colorbar(image, label=f"points gained over {methods[gain_from]}", fraction=0.05, pad=0.02)
    axes.set_title(title, fontsize=10)
    _save(figure, path)


def coefficients(path: pathlib.Path, groups: Sequence[str], tasks: Sequence[str], values_GxT: np.ndarray) -> None:
    """Group x task heat map of merging coefficients, as AdaMerging learns them (arXiv 2310.02575, figure 5).

    Args:
      path: of the PNG file.
      groups: G names, in the order of the network.
      tasks: T names.
      values_GxT: the coefficients.
    """
    figure, axes = plt.subplots(figsize=(2.5 + 0.8 * len(tasks), max(2.5, min(0.14 * len(groups), 16))))
    low, high = min(0.0, float(values_GxT.min())), max(0.6, float(values_GxT.max()))
    image = axes.imshow(values_GxT, aspect="auto", cmap="viridis", vmin=low, vmax=high, interpolation="nearest")
    axes.set_xticks(range(len(tasks)), [t.replace("_", "\n") for t in tasks], fontsize=8)
    every = max(1, len(groups) // 80)
    axes.set_yticks(range(0, len(groups), every), groups[::every], fontsize=5 if len(groups) > 30 else 8)
    axes.tick_params(length=0)
    figure.colorbar(image, label="coefficient", fraction=0.08, pad=0.03)
    means = ", ".join(f"{m:.2f}" for m in values_GxT.mean(0))
    axes.set_title(f"mean by task: {means}", fontsize=8)
    _save(figure, path)
