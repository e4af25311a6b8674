"""`taskvec methods` and `inspect`, and how words of the command line are read."""

import pathlib
import subprocess
import sys

import pytest

import taskvec as tv
from taskvec.commands import request
from tests.cli_for_tests import refused, run
from tests.io.folders_for_tests import family, llama, write


def test_methods(capsys):
    run("methods")
    text = capsys.readouterr().out
    assert all(name in text for name in (*tv.methods(), "greedy_soup", "pcb_search"))
    run("methods", "greedy_soup")
    text = capsys.readouterr().out
    assert "2203.05482" in text and "search.greedy_soup(models, evaluate)" in text and "strictly better" in text
    run("methods", "ties")
    text = capsys.readouterr().out
    for wanted in ("2306.01708", "density", "0.2", "disjoint_mean", "rule='released'"):
        assert wanted in text
    assert "did you mean 'ties'" in refused(capsys, "methods", "tie")


def test_inspect(tmp_path, capsys):
    made = family(tmp_path, llama(), ("a", "b", "c"))
    write(tmp_path / "c", {k: v for k, v in made["c"].items() if k != "lm_head.weight"}, shard_bytes=700)
    run("inspect", tmp_path / "base", tmp_path / "a", tmp_path / "b", tmp_path / "c", "--plot", tmp_path / "x.png")
    text = capsys.readouterr().out
    assert "c: lacks (1): lm_head.weight" in text and "model.layers.2" in text
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    run("inspect", tmp_path / "base", tmp_path / "base")
    assert "names, shapes and dtypes are the same" in capsys.readouterr().out
    assert "--plot names a PNG" in refused(capsys, "inspect", tmp_path / "base", tmp_path / "a", "--plot", "x.pdf")


@pytest.mark.parametrize(("text", "count"), [("2GB", 2 * 10**9), ("1GiB", 1 << 30), ("1.5 MB", 1_500_000), ("64", 64)])
def test_sizes(text, count):
    assert request.size(text) == count


def test_labels():
    assert request.named(["x/a", "y/a", "z=y/b", "m+ad/c"]) == (
        ("a#1", "x/a"), ("a#2", "y/a"), ("z", "y/b"), ("c", "m+ad/c")
    )  # fmt: skip
    assert request.settings(["a=1", "b=(1, 2.5)", "c=tensor", "d=None"]) == {
        "a": 1,
        "b": (1, 2.5),
        "c": "tensor",
        "d": None,
    }


def test_it_starts_without_what_it_does_not_need():
    code = (
        "import sys; from taskvec import cli; from taskvec.commands import merge, prepare, show;"
        "print([m for m in ('orbax', 'matplotlib', 'huggingface_hub', 'tokenizers', 'PIL') if m in sys.modules])"
    )
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"
