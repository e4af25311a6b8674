"""Sources: what they read, and that whatever is wrong with a row is said with its file and line."""

import json
import sys
import types

import numpy as np
import pytest

from taskvec.data import sources
from taskvec.data.lazy import BrokenImage, Images
from tests.data.pictures_for_tests import folders, picture, png

IMAGE, TEXT = sources.Columns(image="image"), sources.Columns(text=("text",))


def test_image_folder(tmp_path):
    folders(tmp_path, ["b", "a"], 3)
    (tmp_path / "a" / "more").mkdir()
    (tmp_path / "a" / "more" / "z.PNG").write_bytes(png(9))
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    table = sources.image_folder(tmp_path)
    assert table.classes == ("a", "b") and table.labels.tolist() == [0] * 4 + [1] * 3
    np.testing.assert_array_equal(table.rows[[0, 3, 4]], np.stack([picture(3), picture(9), picture(0)]))
    assert sources.image_folder(tmp_path, ("b", "a", "c")).labels.tolist() == [0] * 3 + [1] * 4


def test_classes_that_are_numbers(tmp_path):
    names = [str(n) for n in (10, 0, 2, 1)]
    table = sources.image_folder(folders(tmp_path / "a", names, 1))
    assert table.classes == ("0", "1", "2", "10") and table.labels.tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(table.rows[3], [picture(0)])
    assert sources.image_folder(folders(tmp_path / "b", ["010", "002"], 1)).classes == ("002", "010")
    assert sources.image_folder(folders(tmp_path / "c", ["10", "2", "x"], 1)).classes == ("10", "2", "x")
    lines(tmp_path / "a.jsonl", [{"text": "one", "label": name} for name in names])
    assert sources.jsonl(tmp_path / "a.jsonl", TEXT).labels.tolist() == [3, 0, 2, 1]


def test_image_folder_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no class folders; want .*CLASS"):
        sources.image_folder(tmp_path / "none")
    folders(tmp_path, ["a", "b"], 1)
    with pytest.raises(ValueError, match="unknown class b; the training set has a, c"):
        sources.image_folder(tmp_path, ("a", "c"))
    (tmp_path / "c").mkdir()
    with pytest.raises(FileNotFoundError, match="c: no images"):
        sources.image_folder(tmp_path)
    (tmp_path / "c" / "cut.png").write_bytes(png(0)[:70])
    with pytest.raises(BrokenImage, match=r"c.cut\.png: not a readable image"):
        sources.image_folder(tmp_path).rows.read([0, 2])


def test_folder_order(tmp_path):
    folders(tmp_path, ["Am_Car", "zebra fish", "Bus (red)"], 1)
    assert sources.folder_order(tmp_path, ("zebra-fish", "am car", "bus red")) == ("zebra fish", "Am_Car", "Bus (red)")
    assert sources.folder_order(tmp_path, ("x", "y", "z")) == ()
    with pytest.raises(ValueError, match=r"unknown class Bus \(red\); none for bus blue"):
        sources.folder_order(tmp_path, ("zebra-fish", "am car", "bus blue"))


def test_label_order():
    order = lambda found, names: sources.label_order(found, names, "here")
    assert order(["b", "a", "c"], ["a", "B", "c!"]) == [1, 0, 2]
    assert order(["a", "moss", "c"], ["a", "air plant", "c"]) == [0, 1, 2]
    assert order(["お", "き"], ["き", "お"]) == [1, 0]
    with pytest.raises(ValueError, match="here: unknown class moss; none for air plant"):
        order(["c", "moss", "a"], ["a", "air plant", "c"])


def lines(path, rows):
    path.write_text("\n\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_jsonl(tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"text": "x", "label": "no"}, {"text": "y\u2028z", "label": "yes"}])
    table = sources.jsonl(path, TEXT)
    assert (
        table.classes == ("no", "yes") and table.labels.tolist() == [0, 1] and table.rows.tolist() == ["x", "y\u2028z"]
    )
    assert sources.jsonl(path, TEXT, ("yes", "no")).labels.tolist() == [1, 0]
    path = lines(tmp_path / "b.jsonl", [{"a": "x", "b": "y", "label": 2.5}, {"a": "p", "b": "q", "label": 3}])
    table = sources.jsonl(path, sources.Columns(text=("a", "b")))
    assert table.labels.dtype == np.float32 and table.rows.tolist() == [["x", "y"], ["p", "q"]]
    folders(tmp_path / "pictures", ["all"], 2)
    path = lines(tmp_path / "c.jsonl", [{"image": f"pictures/all/{i}.png", "label": i} for i in (1, 0)])
    table = sources.jsonl(path, IMAGE)
    assert isinstance(table.rows, Images) and table.labels.tolist() == [1, 0]
    np.testing.assert_array_equal(table.rows[0][0], picture(1))
    (tmp_path / "pictures" / "all" / "1.png").unlink()
    with pytest.raises(BrokenImage, match=r"c\.jsonl, line 1: .*1\.png: not a readable image"):
        table.rows[0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "line 3: no label"),
        ({"text": "x", "label": None}, "line 3: no label"),
        ({"text": "x", "label": "c"}, "line 3: unknown class 'c'; there is a, b"),
        ({"text": "x", "label": [1]}, "line 3: label must be"),
        ({"text": " ", "label": "a"}, "line 3: column 'text' must be a string that is not empty"),
        ({"label": "a"}, "line 3: column 'text'"),
        ("{broken", "line 3: not JSON"),
        ("[1]", "line 3: want an object"),
    ],
)
def test_bad_jsonl(tmp_path, row, message):
    path = lines(tmp_path / "a.jsonl", [{"text": "x", "label": "a"}, row])
    with pytest.raises(ValueError, match=message):
        sources.jsonl(path, TEXT, ("a", "b"))


def test_label_out_of_range(tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"text": "x", "label": 0}, {"text": "x", "label": 2}])
    with pytest.raises(ValueError, match="line 3: label 2, allowed 0 to 1"):
        sources.jsonl(path, TEXT, ("a", "b"))
    path = lines(tmp_path / "a.jsonl", [{"text": "x", "label": -1}])
    with pytest.raises(ValueError, match="line 1: label -1, allowed 0 or more"):
        sources.jsonl(path, TEXT)


def test_parquet_without_pyarrow(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match="pip install pyarrow"):
        sources.parquet(["a.parquet"], TEXT)


def write_parquet(path, numbers, labels, names=None, group=2):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    blobs = [n if n is None or isinstance(n, bytes) else png(n) for n in numbers]
    table = pa.table({"image": [{"bytes": b, "path": None} for b in blobs], "label": labels})
    if names:
        info = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    parquet.write_table(table, path, row_group_size=group)
    return path


def test_parquet(tmp_path):
    paths = [
        write_parquet(tmp_path / "train-0.parquet", [3, 1, 4], [0, 1, 1], ["cat", "dog"]),
        write_parquet(tmp_path / "train-1.parquet", [5, b"cut"], [True, False]),
    ]
    table = sources.parquet(paths, IMAGE)
    assert table.classes == ("cat", "dog") and table.labels.tolist() == [0, 1, 1, 1, 0]
    np.testing.assert_array_equal(table.rows[[3, 0, 2]], np.stack([picture(5), picture(3), picture(4)]))
    with pytest.raises(BrokenImage, match=r"train-1\.parquet, row 1: not a readable image"):
        table.rows.read([0, 4])
    with pytest.raises(ValueError, match="no column sentence; it has image, label"):
        sources.parquet(paths, sources.Columns(text=("sentence",)))
    with pytest.raises(ValueError, match=r"train-0\.parquet, row 1: no label"):
        sources.parquet([write_parquet(tmp_path / "train-0.parquet", [3, 1], [0, None])], IMAGE)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"bad\.parquet: not a readable Parquet file"):
        sources.parquet([tmp_path / "bad.parquet"], IMAGE)
    with pytest.raises(FileNotFoundError):
        sources.parquet([tmp_path / "none.parquet"], IMAGE)


def fake_tfds(splits):
    label = types.SimpleNamespace(names=["cat", "dog"])
    rows = [{"image": png(i), "label": np.int64(i % 2)} for i in range(3)]
    builder = types.SimpleNamespace(
        info=types.SimpleNamespace(splits=splits, features={"image": None, "label": label}),
        as_data_source=lambda split, decoders: rows,
    )
    decode = types.SimpleNamespace(SkipDecoding=lambda: "skip")
    return types.SimpleNamespace(builder=lambda name, data_dir, file_format: builder, decode=decode)


def test_tfds(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", fake_tfds({"train": 3}))
    table = sources.tfds("pets", "train", IMAGE)
    assert table.classes == ("cat", "dog") and table.labels.tolist() == [0, 1, 0]
    np.testing.assert_array_equal(table.rows[2][0], picture(2))
    with pytest.raises(FileNotFoundError, match=r"split test is not prepared; .*train.*(?s:.)*download_and_prepare"):
        sources.tfds("pets", "test", IMAGE)
    with pytest.raises(ValueError, match="no column text; it has image, label"):
        sources.tfds("pets", "train", TEXT)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match="pip install tensorflow-datasets"):
        sources.tfds("pets", "train", IMAGE)
