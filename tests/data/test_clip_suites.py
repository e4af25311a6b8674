"""The published image suites: names and templates, protocols, and both layouts on disk."""

import io
import json
import tarfile

import numpy as np
import pytest

from taskvec.data import base, clip_suites, lazy, sources, suites, webdataset
from tests.data.pictures_for_tests import folders, picture, png
from tests.io import hub_for_tests as fake_hub

COUNTS = {  # classes and templates, counted in the sources
    "sun397": (397, 2), "cars": (196, 8), "resisc45": (45, 18), "eurosat": (10, 3), "svhn": (10, 1), "gtsrb": (43, 3),
    "mnist": (10, 1), "dtd": (47, 8), "flowers102": (102, 1), "pcam": (2, 1), "fer2013": (7, 6), "pets": (37, 1),
    "stl10": (10, 2), "cifar100": (100, 18), "cifar10": (10, 18), "food101": (101, 1), "fashion_mnist": (10, 2),
    "emnist": (26, 1), "kmnist": (10, 1), "rendered_sst2": (2, 1),
}  # fmt: skip
SIZES = {"train": None, "held_out": None, "test": None}


def test_suites_and_counts():
    assert [len(clip_suites.SUITES[name]) for name in ("clip8", "clip14", "clip20")] == [8, 14, 20]
    assert clip_suites.SUITES["clip20"][:14] == clip_suites.SUITES["clip14"] and set(COUNTS) == set(clip_suites.TASKS)
    for task, (classes, templates) in COUNTS.items():
        for family in clip_suites.FAMILIES:
            names = clip_suites.class_names(task, family)
            digits = task == "emnist" and family != "fusion_bench"
            assert len(names) == len(set(names)) == (10 if digits else classes), task
            assert all(name == name.strip() and name for name in names)
            prompts = clip_suites.templates(task, family)
            assert len(prompts) == templates and all(t.count("{}") == 1 for t in prompts)


def test_families_differ_where_published():
    ours = lambda task: clip_suites.class_names(task, "tall_masks")
    theirs = lambda task: clip_suites.class_names(task, "fusion_bench")
    differ = {task for task in clip_suites.TASKS if ours(task) != theirs(task)}
    assert differ == {"flowers102", "fer2013", "pets", "food101", "cifar100", "fashion_mnist", "kmnist", "emnist"}
    assert (ours("kmnist")[0], theirs("kmnist")[0]) == ("o", "お")
    assert ours("fer2013")[3] == "['happy', 'smiling']" and theirs("fer2013")[6] == "surprised"
    assert clip_suites.class_names("eurosat", "task_vectors")[2] == "brushland or shrubland"
    assert len({clip_suites.tag(family) for family in clip_suites.FAMILIES}) == 3
    with pytest.raises(ValueError, match="unknown family 'ilharco'; there is task_vectors"):
        clip_suites.tag("ilharco")
    with pytest.raises(ValueError, match="unknown task 'imagenet'"):
        clip_suites.templates("imagenet", "fusion_bench")


def dtd(root, per_class=1):
    names = clip_suites.class_names("dtd", "fusion_bench")
    for i, which in enumerate(("train", "val", "test")):
        folders(root / "dtd" / which, names, per_class, first=1000 * i)
    return root


def test_dtd_is_scored_as_the_family_says(tmp_path):
    dtd(tmp_path, 2)
    load = lambda family: clip_suites.load("dtd", family, str(tmp_path))
    np.testing.assert_array_equal(load("tall_masks").test.inputs["raw"][0][0], picture(1000))
    for family in ("task_vectors", "fusion_bench"):
        task = load(family)
        np.testing.assert_array_equal(task.test.inputs["raw"][0][0], picture(2000))
        assert len(task.held_out.labels) == 0 and len(task.train.labels) == 94


def test_a_suite_of_a_family(tmp_path):
    dtd(tmp_path, 2)
    spec = {
        "kind": "image",
        "family": "fusion_bench",
        "source": str(tmp_path),
        "tasks": ["dtd"],
        "image_size": 8,
        **SIZES,
    }
    (task,) = suites.load_suite(spec)
    sizes = lambda task: [len(getattr(task, s).labels) for s in base.SPLITS]
    rows = lambda split: set(split.inputs["image"].rows.tolist())
    assert sizes(task) == [94, 9, 94] and rows(task.held_out) < rows(task.train)  # trained on all
    (other,) = suites.load_suite(spec | {"family": "task_vectors"})
    assert sizes(other) == [85, 9, 94] and rows(other.held_out) == rows(task.held_out) == rows(task.train) - rows(
        other.train
    )
    assert task.test.inputs["image"][[0, 1]].shape == (2, 8, 8, 3)
    assert suites.protocol(spec) == (
        "image/fusion_bench-dtd:test-emnist:letters/dtd/trainall/heldpublished/testall/px8-clip"
    )
    tags = {suites.protocol(spec | {"family": family}) for family in clip_suites.FAMILIES}
    assert len(tags) == 3
    corrupted = spec | {"corruption": "contrast:5:32"}
    assert suites.protocol(corrupted).endswith("px8-clip/contrast:5:32")
    (worse,) = suites.load_suite(corrupted)
    assert np.asarray(worse.test.inputs["image"][:3]).std() < np.asarray(task.test.inputs["image"][:3]).std()
    np.testing.assert_array_equal(worse.train.inputs["image"][:1], task.train.inputs["image"][:1])
    ((names, templates),) = suites.classes_and_templates(spec)
    assert len(names) == 47 and templates[0] == "a photo of a {} texture."
    assert suites.parse(spec | {"tasks": ["clip8"]}).tasks == clip_suites.SUITES["clip8"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "none"}, "unknown image family 'none'; allowed: task_vectors, tall_masks, fusion_bench"),
        ({"source": "registry"}, "source must be a folder, 'hub' or 'tfds'"),
        ({"corruption": "snow:1"}, "unknown corruption 'snow'"),
        ({"corruption": "contrast"}, "want KIND:SEVERITY"),
        ({"tasks": ["dtd", "imagenet"]}, "unknown image tasks imagenet"),
    ],
)
def test_bad_specs(tmp_path, change, message):
    spec = {"kind": "image", "family": "fusion_bench", "source": str(tmp_path), "tasks": ["dtd"], **SIZES}
    with pytest.raises(ValueError, match=message):
        suites.load_suite(spec | change)


def test_missing_and_wrong_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither .*dtd.train nor .*tanganke.dtd.*train-\*\.parquet"):
        clip_suites.load("dtd", "fusion_bench", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"lay them out as FOLDER/dtd/\{train,val\}"):
        clip_suites.load("dtd", "tall_masks", str(tmp_path))
    folders(tmp_path / "svhn" / "train", "0123456789", 1)
    with pytest.raises(FileNotFoundError, match="the test images of svhn belong there"):
        clip_suites.load("svhn", "fusion_bench", str(tmp_path))
    folders(tmp_path / "mnist" / "train", [f"class {i}" for i in range(9)], 1)
    folders(tmp_path / "mnist" / "test", [f"class {i}" for i in range(9)], 1)
    with pytest.raises(ValueError, match="train has 9 classes, fusion_bench has 10 names"):
        clip_suites.load("mnist", "fusion_bench", str(tmp_path))
    with pytest.raises(ValueError, match="tensorflow-datasets has no such set"):
        clip_suites.load("gtsrb", "fusion_bench", "tfds")


def test_folders_called_like_classes_are_ordered_like_them(tmp_path):
    names = ["Angry", "disgusted", "fearful", "happy", "neutral", "sad", "surprised"]
    for which in ("train", "test"):
        folders(tmp_path / "fer2013" / which, names, 1)
    for family, order in (("tall_masks", [0, 1, 2, 3, 5, 6, 4]), ("fusion_bench", range(7))):
        task = clip_suites.load("fer2013", family, str(tmp_path))
        np.testing.assert_array_equal(task.test.inputs["raw"][:], np.stack([picture(i) for i in order]))
        assert task.test.labels.tolist() == list(range(7))


def test_hub_layout(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    root = tmp_path / "ufldl-stanford" / "svhn"
    for config, first in (("cropped_digits", 0), ("full_numbers", 50)):
        (root / config).mkdir(parents=True)
        for split in ("train", "test", "extra"):
            rows = {"image": [{"bytes": png(first + i), "path": None} for i in range(10)], "label": list(range(10))}
            info = {"info": {"features": {"label": {"names": list("0123456789")}}}}
            table = pa.table(rows).replace_schema_metadata({"huggingface": json.dumps(info)})
            parquet.write_table(table, root / config / f"{split}-00000-of-00001.parquet")
    task = clip_suites.load("svhn", "fusion_bench", str(tmp_path))
    assert task.classes == tuple("0123456789") and len(task.train.labels) == 10
    np.testing.assert_array_equal(task.test.inputs["raw"][3][0], picture(3))


FACES = ("angry", "disgusted", "fearful", "happy", "neutral", "sad", "surprised")


def faces(root):
    """FER2013 as on the hub: two shards of training rows, one of test rows, and the names of the labels."""
    for split, shards in (("train", 2), ("test", 1)):
        (root / split).mkdir(parents=True)
        for shard in range(shards):
            with tarfile.open(root / split / f"{shard}.tar", "w") as tar:
                for row in range(7 * shard, 7 * shard + 7):
                    for suffix, data in (("cls", str(row % 7).encode()), ("png", png(row))):
                        info = tarfile.TarInfo(f"s{row:07}.{suffix}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
    (root / "classnames.txt").write_text("".join(f"{name}\n" for name in FACES))
    return root


def test_faces_in_tar_files(tmp_path, monkeypatch):
    root = faces(tmp_path / "clip-benchmark" / "wds_fer2013")
    fake_hub.install(monkeypatch, tmp_path, tmp_path / "fetched")
    for source in (str(tmp_path), "hub"):
        task = clip_suites.load("fer2013", "fusion_bench", source)
        assert task.classes == FACES and task.train.labels.tolist() == [*range(7)] * 2 and len(task.test.labels) == 7
        np.testing.assert_array_equal(task.train.inputs["raw"][[9, 2]], [picture(9), picture(2)])
        # The open_clip line counts sad 4, surprised 5, neutral 6.
        other = clip_suites.load("fer2013", "tall_masks", source)
        assert other.test.labels.tolist() == [0, 1, 2, 3, 6, 4, 5] and other.classes[6] == "['neutral', 'bored']"
    (root / "test" / "0.tar").write_bytes((root / "test" / "0.tar").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"test.0\.tar: not a readable tar file"):
        clip_suites.load("fer2013", "fusion_bench", str(tmp_path))
    (root / "classnames.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"classnames\.txt is not there"):
        clip_suites.load("fer2013", "fusion_bench", str(tmp_path))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.png": png(0)}, r"x\.tar, row a: no label \(\.cls\); it has \.png"),
        ({"a.cls": b"1", "a.txt": b""}, r"row a: 0 images; want one"),
        ({"in/a.cls": b"2", "in/a.jpg": b""}, r"row in/a: label b'2', allowed 0 to 1"),
        ({"a.cls": b"one", "a.jpg": b""}, "label b'one', allowed 0 to 1"),
    ],
)
def test_rows_of_tar_files_that_are_not_whole(tmp_path, files, message):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with pytest.raises(ValueError, match=message):
        webdataset.read([tmp_path / "x.tar"], ("no", "yes"))


def test_the_hub_out_of_reach(monkeypatch):
    import huggingface_hub

    def fail(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match="tanganke/dtd could not be had"):
        clip_suites.load("dtd", "fusion_bench", "hub")


def test_labels_follow_the_names_of_a_source(monkeypatch, caplog):
    """tensorflow-datasets sorts cheesecake before cheese_plate; FusionBench takes the hub's numbers as they are."""
    names = list(clip_suites.class_names("food101", "fusion_bench"))
    at = names.index("cheese plate")
    swapped = [*names[:at], "cheesecake", "cheese_plate", *names[at + 2 :]]
    labels = np.arange(101, dtype=np.int32)
    table = sources.Table(lazy.of_array(np.zeros((101, 4, 4), np.uint8), "x"), labels, tuple(swapped))
    monkeypatch.setattr(sources, "tfds", lambda *args: table)
    monkeypatch.setattr(sources, "parquet", lambda *args: table)
    monkeypatch.setattr(clip_suites, "hub_files", lambda *args: [])
    for family in clip_suites.FAMILIES:
        assert clip_suites.load("food101", family, "tfds").test.labels[at : at + 2].tolist() == [at + 1, at]
    assert clip_suites.load("food101", "tall_masks", "hub").test.labels[at] == at + 1
    with caplog.at_level("WARNING"):
        assert clip_suites.load("food101", "fusion_bench", "hub").test.labels[at] == at
    assert "FusionBench, which files 'cheesecake' under 'cheese plate'" in caplog.text
