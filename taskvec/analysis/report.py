"""The report of a benchmark: a Markdown table over seeds, and which differences are more than noise."""

from collections.abc import Sequence

import numpy as np

from taskvec.evaluation.rows import Row


def by_label(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Groups result rows by their ``label`` (the name of the run), in order of appearance."""
    grouped: dict[str, list] = {}
    for row in rows:
        grouped.setdefault(row.label, []).append(row)
    return grouped


def table(rows: Sequence[Row]) -> str:
    """One line per method: accuracy by task, mean and its spread over seeds, normalised accuracy, what it needed.

    Accuracies are per cent, averaged over seeds; the spread is the standard error of the mean over seeds. Memory is the
    largest peak of the process, everything that it holds included.
    """
    tasks = list(rows[0].accuracy)
    head = ["method", *tasks, "mean", "normalised", "data", "task id", "seconds", "peak MB"]
    lines = []
    for label, group in by_label(rows).items():
        per_task = [100 * np.mean([r.accuracy[t] for r in group]) for t in tasks]
        means = 100 * np.array([r.mean_accuracy for r in group])
        spread = f" ± {means.std(ddof=1) / np.sqrt(len(means)):.1f}" if len(means) > 1 else ""
        normalised = [r.normalised_accuracy for r in group if r.normalised_accuracy is not None]
        lines.append(
            [
                label,
                *(f"{a:.1f}" for a in per_task),
                f"**{means.mean():.1f}**{spread}",
                f"{100 * np.mean(normalised):.1f}" if normalised else "",
                group[0].data_access,
                "yes" if group[0].task_id_needed else "no",
                f"{np.mean([r.seconds for r in group]):.1f}",
                f"{max(r.peak_memory_mb for r in group):.0f}",
            ]
        )
    cells = [head, ["---"] + ["---:"] * (len(tasks) + 2) + ["---"] * 2 + ["---:"] * 2, *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def differences(steps: Sequence[tuple[str, str, float, float]]) -> str:
    """A Markdown list of paired differences ``(lower, higher, difference, standard error)`` and what they say."""
    out = []
    for lower, higher, gain, error in steps:
        verdict = "holds" if gain > 2 * error else ("reversed" if gain < -2 * error else "within two standard errors")
        out.append(f"| {lower} < {higher} | {100 * gain:+.2f} | {100 * error:.2f} | {verdict} |")
    return "\n".join(
        ["| claim | difference (points) | standard error | verdict |", "| --- | ---: | ---: | --- |", *out]
    )
