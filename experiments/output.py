"""What a benchmark leaves: rows, the report, two figures, the coefficients; and the checks before it starts."""

import itertools
import pathlib
from typing import Any

import numpy as np

from experiments import collected, few_shot_heads, learning, scoring, together
from experiments.prepare import Bench
from experiments.runs import KINDS, STANDING, Outcome, grid_of
from taskvec.adaptive import registry as adaptive_registry
from taskvec.analysis import figures, report
from taskvec.data import suites
from taskvec.evaluation import rows as rows_lib, statistics
from taskvec.evaluation.evaluate import accuracy
from taskvec.io import coefficients
from taskvec.io.atomic import write_text
from taskvec.merging import registry

BEST_STATIC = "best static"


def in_order(config: Any) -> list[str]:
    """The labels to run: the experts first, whose features teach others; last what stands on earlier rows."""
    rank = lambda name: 0 if name == "individual" else 2 if name in STANDING else 1
    return sorted(config.methods, key=lambda label: rank(method_of(config, label)))


def method_of(config: Any, label: str) -> str:
    """The method behind a label."""
    return config.settings[label].get("method", label)


def check(config: Any, workdir: pathlib.Path) -> None:
    """Raises before the long work what would fail after it: unknown methods, settings, claims, an unwritable folder."""
    for label in config.methods:
        if label not in config.settings:
            raise ValueError(f"config.methods names {label!r}, config.settings has {', '.join(config.settings)}")
        settings = dict(config.settings[label])
        name = settings.pop("method", label)
        if name in together.KINDS:
            together.check(config, name, settings)
            continue
        if name in (*KINDS, *STANDING) or name in adaptive_registry.methods():
            scoring.check(config, name)
            _check_kind(label, name, settings)
            if name in adaptive_registry.methods():
                learning.check(label, name, settings, config.suite)
            below = {settings["on"]} if name in STANDING else set()
            missing = (below | {"individual"} if name == "surgery" else below) - set(config.methods)
            if missing:
                raise ValueError(f"{label} builds on {', '.join(map(repr, missing))}, which is not in config.methods")
            if name in few_shot_heads.SETTINGS and not few_shot_heads.stands_on(method_of(config, settings["on"])):
                raise ValueError(
                    f"{label} stands on {settings['on']!r}; allowed: pretrained, and methods that learn one target"
                )
            if name == "surgery" and _trains_heads(method_of(config, settings["on"])):
                raise ValueError(f"{label} stands on {settings['on']!r}, whose heads are no more those of the experts")
            _check_access(config, label)
            if "on" in settings and name not in STANDING:
                _check_on(config, label, settings["on"])
            continue
        settings = collected.checked(config, label, name, settings)
        grid = grid_of(settings)
        if grid and config.suite.held_out == 0:
            raise ValueError(f"{label} searches {', '.join(grid)} on held-out rows, but config.suite.held_out is 0")
        for values in itertools.product(*grid.values()):
            registry.get(name)(**{**settings, **dict(zip(grid, values, strict=True))})
    for claim in config.claims:
        unknown = [x for x in claim if x not in (*config.methods, BEST_STATIC)]
        if unknown:
            raise ValueError(
                f"config.claims names {unknown}; allowed: {BEST_STATIC!r} and the labels of config.methods"
            )
    suites.parse(config.suite)
    workdir.mkdir(parents=True, exist_ok=True)


def _trains_heads(name: str) -> bool:
    found = adaptive_registry.methods().get(name)
    return name in few_shot_heads.SETTINGS or (found is not None and found.card.heads_trained)


def _access(config: Any, label: str) -> str | None:
    """Which rows a label may look at, by its settings or its method's card."""
    name = method_of(config, label)
    methods = next((m for m in (adaptive_registry.methods(), registry.methods()) if name in m), {})
    return config.settings[label].get("data", methods[name].card.data if methods else None)


def _check_access(config: Any, label: str) -> None:
    """Held-out rows there are where a row looks at them; none that says so stands on one that saw test rows."""
    data, on = _access(config, label), config.settings[label].get("on")
    if data in ("unlabelled train", "few labelled") and config.suite.held_out == 0:
        raise ValueError(f"{label} has data={data!r}, held-out training rows, but config.suite.held_out is 0: raise it")
    if data == "unlabelled train" and on in config.methods and _access(config, on) == "unlabelled test":
        raise ValueError(
            f"{label} has data={data!r} but stands on {on!r}, which sees test rows: let it stand on a row that does "
            "not, or set data='unlabelled test'"
        )


def _check_on(config: Any, label: str, on: str) -> None:
    """What an adaptive method stands on: one static model of an earlier run, or a data-free method."""
    if on not in config.methods:
        card = registry.get(on).card
        if card.result != "static" or card.extras:
            more = ", and a row of its own in config.methods: it needs statistics of data" if card.extras else ""
            raise ValueError(f"{label} stands on {on!r}, but {on!r} must be one static model{more}")
        return
    order, name = in_order(config), method_of(config, on)
    cards = [methods[name].card for methods in (adaptive_registry.methods(), registry.methods()) if name in methods]
    if order.index(on) > order.index(label) or name == "individual" or any(c.result != "static" for c in cards):
        raise ValueError(f"{label} stands on {on!r}, which must be one static model and come before it")


def _check_kind(label: str, name: str, settings: dict) -> None:
    if name in (*KINDS, *STANDING):
        needed = {"data", "on"} if name in STANDING else set()
        allowed = needed | set(STANDING.get(name, ()))
    else:
        needed, allowed = set(), {"data", *learning.settings_of(name)}
    unknown, missing = sorted(settings.keys() - allowed), sorted(needed - settings.keys())
    if unknown or missing:
        raise ValueError(
            f"{label}: unknown settings {unknown}, missing settings {missing}; {name} takes {sorted(allowed)}"
        )
    card = adaptive_registry.get(name).card if name in adaptive_registry.methods() else None
    labelled = name in few_shot_heads.SETTINGS or (card and (card.data == "few labelled" or "pairs" in card.sees))
    access = rows_lib.DATA_ACCESS[3:4] if labelled else rows_lib.DATA_ACCESS[1:3]
    default = card.data if card else access[0]
    if settings.get("data", default) not in access:
        raise ValueError(f"{label}: data is {settings.get('data', default)!r}; allowed: {', '.join(access)}")


class Table:
    """Collects the outcomes of all seeds and writes them."""

    def __init__(self, config: Any):
        self.config = config
        self.rows: list[rows_lib.Row] = []
        self.correct: dict[str, list[list[np.ndarray]]] = {}  # label -> seeds -> tasks -> [N]
        self.coefficients: dict[str, coefficients.Coefficients] = {}  # those that are not written yet

    def add(self, bench: Bench, label: str, outcome: Outcome) -> str:
        """Scores an outcome on the test rows; returns a line for the terminal."""
        names = [task.name for task in bench.tasks]
        per_task, correct = accuracy(outcome.scorer(bench), outcome.test, [task.test.labels for task in bench.tasks])
        self.correct.setdefault(label, []).append(correct)
        for task, (values, groups, tasks) in outcome.coefficients.items():
            method, settings = method_of(self.config, label), outcome.settings
            found = coefficients.of(bench.base.pretrained, values, groups, tasks, method, settings, bench.seed)
            seed = "" if bench.seed == self.config.seeds[0] else f"seed{bench.seed}"
            self.coefficients["_".join(filter(None, (label, task, seed)))] = found
        row = rows_lib.Row(
            label=label,
            method=method_of(self.config, label),
            settings=outcome.settings,
            model=self.config.model or "pretrained here",
            suite=self.config.name,
            protocol=scoring.protocol(self.config),
            data_access=outcome.data_access,
            result=outcome.merged.kind,
            task_id_needed=outcome.merged.kind == "task-conditioned" or outcome.head_trained,
            head_trained=outcome.head_trained,
            accuracy=dict(zip(names, map(float, per_task), strict=True)),
            seconds=outcome.seconds,
            seed=bench.seed,
            config_hash=rows_lib.config_hash(self.config.to_dict()),
            storage_bits=outcome.storage_bits,
        )
        self.rows.append(row)
        shown = "  ".join(f"{100 * a:5.1f}" for a in per_task)
        return f"[bold]{label:<22}[/bold] {shown}   mean {100 * per_task.mean():5.1f}   ({outcome.seconds:.1f} s)"

    def write(self, workdir: pathlib.Path) -> None:
        """Writes all files into `workdir`."""
        config, labels = self.config, list(self.config.methods)
        rows = sorted(rows_lib.with_normalised(self.rows), key=lambda row: (row.seed, labels.index(row.label)))
        rows_lib.check_same_protocol(rows)
        write_text(workdir / "result.jsonl", rows_lib.dumps(rows))
        ordered = [row for label in labels for row in rows if row.label == label]
        parts = [f"# {config.name}", self._about(rows), report.table(ordered), report.differences(self.claims())]
        write_text(workdir / "report.md", "\n\n".join(parts) + "\n")
        tasks = list(rows[0].accuracy)
        mean_of = lambda label: np.mean([list(r.accuracy.values()) for r in rows if r.label == label], axis=0)
        figures.accuracy(
            workdir / "accuracy.png",
            labels,
            tasks,
            np.stack([mean_of(label) for label in labels]),
            title=f"Test accuracy (%), {config.name}, mean of {_seeds(rows)}",
        )
        for name, found in self.coefficients.items():
            coefficients.save(workdir / f"coefficients_{name}", found)
            figures.coefficients(workdir / f"coefficients_{name}.png", found.groups, found.tasks, found.values)
        self.coefficients.clear()  # of the next seed there will be others

    def claims(self) -> list[tuple[str, str, float, float]]:
        """The config's claims with their paired differences: ``(lower, higher, difference, standard error)``."""
        cards = {name: method.card for name, method in registry.methods().items()}
        one_model = {name for name, card in cards.items() if card.result == "static" and not card.extras}
        static = [x for x in self.config.methods if method_of(self.config, x) in one_model]
        mean = {x: np.mean([row.mean_accuracy for row in self.rows if row.label == x]) for x in static}
        named = {BEST_STATIC: max(mean, key=mean.get)} if mean else {}
        pairs = [tuple(named.get(x, x) for x in claim) for claim in self.config.claims]
        return [(a, b, *statistics.paired_difference(self.correct[a], self.correct[b])) for a, b in pairs if a != b]

    def _about(self, rows: list[rows_lib.Row]) -> str:
        test = ", ".join(
            f"{name} {len(x)}" for name, x in zip(rows[0].accuracy, self.correct[rows[0].label][0], strict=True)
        )
        versions = ", ".join(f"{k} {v}" for k, v in rows[0].versions.items())
        return f"Accuracy (%) on test rows ({test}), mean of {_seeds(rows)}. {versions}. Protocol `{rows[0].protocol}`."


def _seeds(rows: list[rows_lib.Row]) -> str:
    """How many seeds are done."""
    n = len({row.seed for row in rows})
    return f"{n} seed{'' if n == 1 else 's'}"
