"""Calls of the command line that its tests share."""

from taskvec import cli


def run(*words, code=0):
    assert cli.main([str(word) for word in words]) == code


def refs(root, experts=("a", "b")):
    return ["--base", root / "base", *(word for name in experts for word in ("--expert", root / name))]


def merge(root, *more, method="weight_average", experts=("a", "b"), code=0):
    run("merge", "--method", method, *refs(root, experts), "--out", root / "out", *more, code=code)
    return root / "out"


def refused(capsys, *words):
    """The one line that a wrong call ends in."""
    capsys.readouterr()
    run(*words, code=2)
    text = capsys.readouterr().err.strip()
    assert "Traceback" not in text
    return text.splitlines()[-1]
