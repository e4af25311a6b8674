"""`taskvec methods`: the table of cards, and one card in full."""

import inspect

from rich.console import Console
from rich.markup import escape

from taskvec.commands.show import table
from taskvec.merging import registry


def everything(console: Console) -> None:
    """Prints a line for every registered method."""
    made = table("", "method", "what it does", "paper", "base", "experts", "data", "result")
    made.columns[1].justify = "left"
    for name, method in sorted(registry.methods().items()):
        card = method.card
        paper = f"{card.arxiv} ({card.year})" if card.arxiv else str(card.year)
        cells = (name, escape(card.summary), paper, card.base, _experts(card), _needs(card), card.result)
        made.add_row(*cells)
    console.print(made)
    console.print(f"{len(registry.methods())} methods; `taskvec methods NAME` shows one in full")


def one(name: str, console: Console) -> None:
    """Prints a method's card, its settings and what its documentation says; raises `ValueError` if there is none."""
    method = registry.get(name)
    card = method.card
    facts = table(name, "", "")
    facts.show_header, facts.columns[1].justify = False, "left"
    rows = {
        "summary": card.summary,
        "paper": f"{card.title} ({card.year})",
        "arXiv": f"https://arxiv.org/abs/{card.arxiv}" if card.arxiv else "none",
        "pretrained model": card.base,
        "fine-tuned models": _experts(card) + (", their order matters" if card.ordered else ""),
        "needs besides weights": _needs(card),
        "result": card.result + (": choose one expert with --task" if card.result == "task-conditioned" else ""),
        "trains heads": "yes" if card.heads_trained else "no",
        "released code": card.released_code or "as here",
    }
    for field, value in rows.items():
        facts.add_row(field, escape(value))
    console.print(facts)
    if method.defaults:
        settings = table("Settings (--set NAME=VALUE)", "name", "default", "type")
        for parameter in inspect.signature(method.build).parameters.values():
            kind = inspect.formatannotation(parameter.annotation) if parameter.annotation is not parameter.empty else ""
            default = "required" if parameter.default is parameter.empty else repr(parameter.default)
            settings.add_row(parameter.name, escape(default), escape(kind))
        console.print(settings)
    console.print(escape(inspect.getdoc(method.build) or ""), highlight=False)


def _experts(card: registry.Card) -> str:
    low, high = card.tasks
    return f"{low} or more" if high is None else str(low) if low == high else f"{low} to {high}"


def _needs(card: registry.Card) -> str:
    return ", ".join([*([] if card.data == "none" else [card.data]), *card.extras]) or "none"
