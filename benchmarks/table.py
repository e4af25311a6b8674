"""The merge benchmark as markdown tables."""

from typing import Any

from benchmarks.rows import DISK, MEMORY

TITLES = {
    MEMORY: "(a) 8 fine-tuned vision towers (87.5 M parameters each) in memory, against FusionBench",
    DISK: "(b) 4 Llama-shaped folders (134 M parameters each) to a folder, whole processes, against MergeKit",
}
HEADS = {
    MEMORY: (
        "merge",
        "FusionBench s",
        "ours s, first call",
        "ours s, again",
        "times faster, first / again",
        "FusionBench GB above the models",
        "ours GB",
        "times less",
        "floor s",
        "again / floor",
        "norm of theirs",
        "norm of ours",
    ),
    DISK: (
        "merge",
        "MergeKit s (CPU s)",
        "ours s (CPU s)",
        "ours s, cold",
        "times faster",
        "MergeKit GB, anonymous / resident",
        "ours GB, anonymous / resident",
        "times less",
        "floor s",
        "ours / floor",
        "largest difference",
    ),
}


def markdown(found: dict[str, Any]) -> str:
    """All tables of a run, with the machine and the notes."""
    machine, options = found["machine"], found["options"]
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GiB, {machine['system']}, "
        f"{machine['date']}, load at the start {machine['load']}. Medians of up to {options['repeats']} runs a side, "
        f"sides alternating.{' TINY MODELS: these figures say nothing of speed.' if options['small'] else ''}",
        "",
        *(f"- {name}: {text}" for name, text in found["versions"].items()),
        *([f"- options of ours on disk: `{options['ours']}`"] if options.get("ours") else []),
        *(f"- {name}: {value:.4g}" for name, value in found.get("rates", {}).items()),
    ]
    for part, title in TITLES.items():
        rows = [row for row in found["rows"] if row["part"] == part]
        if rows:
            heads = HEADS[part]
            lines += ["", f"**{title}**", "", _row(heads), _row(["---", *["---:"] * (len(heads) - 1)])]
            lines += [_row(_cells(row)) for row in rows]
            lines += ["", *_notes(rows)]
    return "\n".join(lines) + "\n"


def line(row: dict[str, Any]) -> str:
    """One row for the terminal."""
    shown = []
    for side in ("peer", "ours"):
        figures = row[side]
        if "error" in figures:
            shown.append(f"{side}: {figures['error']}")
        elif figures:
            shown.append(f"{side} {_number(figures['seconds'])} s")
    return f"{row['part']} {row['name']}: {', '.join(shown)}, floor {_number(row['floor']['seconds'])} s"


def _row(cells) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _cells(row: dict[str, Any]) -> list[str]:
    peer, ours, floor = row["peer"], row["ours"], row["floor"]["seconds"]
    name = row["name"] + ("†" if "from" in peer else "")
    times = lambda key, mine=None: _number(_ratio(peer.get(key), ours.get(mine or key)))
    if row["part"] == MEMORY:
        norms = (_norms(peer) or _number(row.get("known norm"), 9), _norms(ours) or "–")
        return [
            name,
            _failed(peer) or _seconds(peer),
            _failed(ours) or _seconds(ours),
            _number(ours.get("seconds_again")),
            f"{times('seconds')} / {times('seconds', 'seconds_again')}",
            _gigabytes(peer.get("extra_mb")),
            _gigabytes(ours.get("extra_mb")),
            times("extra_mb"),
            _number(floor),
            _number(_ratio(ours.get("seconds_again"), floor)),
            *norms,
        ]
    both = lambda side: " / ".join(_gigabytes(side.get(key)) for key in ("anonymous_mb", "resident_mb"))
    cpu = lambda side: f"{_seconds(side)} ({_number(side.get('cpu_seconds'))})"
    return [
        name,
        _failed(peer) or cpu(peer),
        _failed(ours) or cpu(ours),
        _number(row["cold"].get("seconds")) if "error" not in row["cold"] else "–",
        times("seconds"),
        both(peer),
        both(ours),
        f"{times('anonymous_mb')} / {times('resident_mb')}",
        _number(floor),
        _number(_ratio(ours.get("seconds"), floor) if "error" not in ours else None),
        _number(row.get("largest difference")),
    ]


def _notes(rows: list[dict[str, Any]]) -> list[str]:
    notes = [f"- {row['name']}: {row['note']}" for row in rows if row["note"]]
    failed: dict[str, list[str]] = {}
    for row in rows:
        for side in ("peer", "ours"):
            if "error" in row[side]:
                failed.setdefault(row[side]["error"], []).append(f"{row['name']} ({side})")
        if "error" in row.get("compared", {}):
            failed.setdefault(row["compared"]["error"], []).append(f"{row['name']} (comparison)")
    notes += [f"- {', '.join(names)}: {error}" for error, names in failed.items()]
    source = {row["peer"]["from"]: row["peer"]["on"] for row in rows if "from" in row["peer"]}
    notes += [f"- † peer's figures from {path}, {on['cpu']}, {on['date']}" for path, on in source.items()]
    return notes


def _failed(side: dict[str, Any]) -> str:
    if "error" not in side:
        return ""
    return side["error"] if len(side["error"]) < 40 else "failed"


def _seconds(side: dict[str, Any]) -> str:
    """The median, and the least of several runs."""
    if "seconds" not in side:
        return "–"
    least = f" (least {_number(side['least_seconds'])})" if len(side["runs"]) > 1 else ""
    return _number(side["seconds"]) + least


def _norms(side: dict[str, Any]) -> str:
    return ", ".join(map(str, side.get("norms", ())))


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def _gigabytes(megabytes: float | None) -> str:
    return "–" if megabytes is None else f"{megabytes / 1024:.2f}"


def _number(x: float | None, digits: int = 3) -> str:
    return "–" if x is None else f"{x:.{digits}g}"
