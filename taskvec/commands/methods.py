"""`taskvec methods`: the table of cards, and one card in full."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape

from taskvec.commands.show import table
from taskvec.merging import registry
from taskvec.messages import did_you_mean

_ADAPTIVE = "not by `taskvec merge`: run from Python (taskvec.adaptive.registry) or by a config of configs/"
_CHOOSE = ": choose one expert with --task"
_COLUMNS = ("what it does", "paper", "data", "result")


def everything(console: Console) -> None:
    """Prints a line for every registered method, those that search or learn in tables of their own."""
    made = table(
        "Methods that need weights only: `taskvec merge --method NAME`", "method", *_COLUMNS, "base", "experts"
    )
    for name, method in sorted(registry.methods().items()):
        made.add_row(name, *_cells(method.card), method.card.base, _experts(method.card))
    searching = table("Searches, which need scores on held-out data: from Python", "method", *_COLUMNS)
    for name, search in sorted(registry.searches().items()):
        searching.add_row(name, *_cells(search.card))
    learning = table("Adaptive methods, which learn from rows of data: from Python or configs", "method", *_COLUMNS)
    adaptive = _adaptive()
    for name, method in sorted(adaptive.items()):
        learning.add_row(name, *_cells(method.card))
    for each in (made, searching, learning):
        each.columns[1].justify = "left"
        console.print(each)
    console.print(
        f"{len(registry.methods())} methods, {len(registry.searches())} searches, {len(adaptive)} adaptive; "
        "`taskvec methods NAME` shows one in full.\n"
        "Adaptive methods are run from Python (taskvec.adaptive.registry) or by a config (configs/), not by `taskvec "
        "merge`; the coefficients that they learn are applied to checkpoints by `taskvec merge --method coefficients`",
        highlight=False,
    )


def _cells(card: registry.Card) -> tuple[str, ...]:
    paper = f"{card.arxiv} ({card.year})" if card.arxiv else str(card.year)
    return escape(card.summary), paper, _needs(card), card.result


def _adaptive() -> Mapping[str, Any]:
    # Imported late: most calls of the command are merges.
    import taskvec.adaptive  # noqa: F401
    from taskvec.adaptive.registry import methods

    return methods()


def one(name: str, console: Console) -> None:
    """Prints a method's card, its settings and what its documentation says; raises `ValueError` if there is none."""
    known = {**_adaptive(), **registry.searches(), **registry.methods()}
    if name not in known:
        raise ValueError(f"unknown method {name!r}{did_you_mean(name, known)}; `taskvec methods` lists them")
    method = known[name]
    card, by_command = method.card, isinstance(method, registry.Method)
    facts = table(name, "", "")
    facts.show_header, facts.columns[1].justify = False, "left"
    rows = {
        "summary": card.summary,
        "paper": f"{card.title} ({card.year})",
        "arXiv": f"https://arxiv.org/abs/{card.arxiv}" if card.arxiv else "none",
        "pretrained model": card.base,
        "fine-tuned models": _experts(card) + (", their order matters" if card.ordered else ""),
        "needs besides weights": _needs(card),
        "result": card.result + (_CHOOSE if card.result == "task-conditioned" and by_command else ""),
        "trains heads": "yes" if card.heads_trained else "no",
        "released code": card.released_code or "as here",
    }
    if isinstance(method, registry.Search):
        rows["how to run"] = method.how
    elif not by_command:
        rows |= {
            "learns": card.learns,
            "sees besides inputs": ", ".join(card.sees) or "nothing",
            "how to run": _ADAPTIVE,
        }
    for field, value in rows.items():
        facts.add_row(field, escape(value))
    console.print(facts)
    _settings(method.build if by_command else method.run, method.defaults, by_command, console)


def _settings(function: Callable, defaults: Mapping[str, Any], by_command: bool, console: Console) -> None:
    if defaults:
        settings = table("Settings (--set NAME=VALUE)" if by_command else "Settings", "name", "default", "type")
        for name, parameter in inspect.signature(function).parameters.items():
            if name not in defaults:
                continue
            kind = inspect.formatannotation(parameter.annotation) if parameter.annotation is not parameter.empty else ""
            default = "required" if parameter.default is parameter.empty else repr(parameter.default)
            settings.add_row(name, escape(default), escape(kind))
        console.print(settings)
    console.print(escape(inspect.getdoc(function) or ""), highlight=False)


def _experts(card: registry.Card) -> str:
    low, high = card.tasks
    return f"{low} or more" if high is None else str(low) if low == high else f"{low} to {high}"


def _needs(card: registry.Card) -> str:
    return ", ".join([*([] if card.data == "none" else [card.data]), *card.extras]) or "none"
