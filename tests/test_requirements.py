"""What the code imports is declared, and what is declared is imported."""

import ast
import configparser
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parents[1]
OURS = {"taskvec", "experiments", "configs"}
PACKAGES = {"absl": "absl-py", "orbax": "orbax-checkpoint", "PIL": "pillow", "yaml": "pyyaml"}


def imported():
    """Packages that the library, the experiments and their configs import, under the names of their distributions."""
    for folder in OURS:
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
                yield from (PACKAGES.get(n, n) for n in (name.split(".")[0] for name in names))


def declared(listed):
    return {re.match(r"[\w-]+", line)[0] for line in listed.split("\n") if line}


def test_what_is_imported_is_required_and_pinned():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    required, extra = declared(config["options"]["install_requires"]), config["options.extras_require"]
    found = set(imported()) - OURS - sys.stdlib_module_names
    assert required == found - declared(extra["data"]) - declared(extra["parity"])
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().split("\n")}
    assert required | declared(extra["dev"]) <= pinned
