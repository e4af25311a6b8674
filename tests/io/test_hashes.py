"""Hashes of input files: right, begun before it is known which are wanted, and before jax is imported."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest

from taskvec.io import hashes

PROGRAM = """
import json, sys
from taskvec import cli
seen = {}
whole = cli._start
cli._start = lambda *args: seen.update(begun=len(args[-1]._begun | set(args[-1]._left)))
from taskvec.io import hashes
begin = hashes.Hashes.want
def want(self, files):
    seen.setdefault("jax", "jax" in sys.modules)
    begin(self, files)
hashes.Hashes.want = want
cli.main(["merge", "--method", "ties", "--base", sys.argv[1], "--expert", "a=" + sys.argv[1], "--out", "never"])
print(json.dumps(seen))
"""


@pytest.fixture(name="files")
def _files(tmp_path, monkeypatch):
    monkeypatch.setattr(hashes, "_BLOCK", 1 << 10)
    rng = np.random.default_rng(0)
    files = [tmp_path / f"{n}.bin" for n in range(7)]
    for n, file in enumerate(files):
        file.write_bytes(rng.bytes((0, 1, 1023, 1024, 1025, 5000, 100_000)[n]))
    return files


def digests(files):
    return {file.resolve(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_files_of_any_size(files):
    assert hashes.Hashes(files).result() == digests(files)


def test_only_what_is_wanted_at_last(files, tmp_path):
    found = hashes.Hashes([*files[:5], tmp_path / "absent"])
    found.want([*files[3:], files[3].parent / ".." / tmp_path.name / files[4].name])
    assert found.result() == digests(files[3:])


def test_a_file_that_cannot_be_read(files, tmp_path):
    found = hashes.Hashes(files)
    found.want([files[0], tmp_path / "absent"])
    with pytest.raises(FileNotFoundError, match="absent"):
        found.result()


def test_the_command_line_begins_before_jax_is_there(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"jax": False, "begun": 1}
