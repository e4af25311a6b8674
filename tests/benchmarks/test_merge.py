"""The merge benchmark on tiny models, without peers: what it measures, compares and writes."""

import json
import sys

import numpy as np
import pytest

from benchmarks import floors, merge, models, peers as peers_lib, rows as rows_lib, table as table_lib, tower
from benchmarks.rows import DISK, MEMORY
from taskvec.io import safetensors


def test_a_run_leaves_figures_and_a_table(tmp_path, capsys):
    args = ["--work", str(tmp_path), "--out", str(tmp_path / "out"), "--small", "--repeats", "1"]
    merge.main([*args, "--only", "average,linear", "--ours-options=--no-hash"])
    found = json.loads((tmp_path / "out.json").read_text())
    average, linear = found["rows"]
    assert (average["name"], linear["name"]) == ("average", "linear") and average["peer"] == linear["peer"] == {}
    assert found["checkpoints made here"] == {MEMORY: True, DISK: True} and found["rates"]["copy_bytes"] > 1e8
    for row, names in ((average, ("seconds_again", "models_mb")), (linear, ("anonymous_mb", "resident_mb"))):
        assert all(row["ours"][name] > 0 for name in ("seconds", "cpu_seconds", *names)) and row["floor"]["seconds"] > 0
    for row, pattern in ((average, "ckpt/t*"), (linear, "models/f32/ft*")):
        models = [safetensors.load(path) for path in (tmp_path / "small").glob(pattern)]
        mean = [np.mean([model[name] for model in models], axis=0, dtype=np.float64) for name in models[0]]
        assert row["ours"]["norms"] == pytest.approx([np.sqrt(sum(np.sum(x**2) for x in mean))], rel=1e-6)
    table = (tmp_path / "out.md").read_text()
    assert table in capsys.readouterr().out and "| average |" in table and "TINY MODELS" in table
    assert "options of ours on disk: `--no-hash`" in table


def test_a_missing_method_is_said_and_settings_are_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tower", str(tmp_path), "no_such_method"])
    tower.main()
    assert json.loads(capsys.readouterr().out.removeprefix("RESULT "))["error"] == "not registered: no_such_method"


def test_checkpoints_have_the_real_shapes(tmp_path):
    count = lambda shapes: sum(int(np.prod(shape)) for shape in shapes.values())
    assert count(models.tower_shapes()) == 87_456_000
    assert count(models.llama_shapes(models.llama_config())) == 134_105_856
    models.make_llama(tmp_path, "bf16", experts=1, small=True)
    base, tuned = (tmp_path / "models" / "bf16" / name for name in ("base", "ft0"))
    assert json.loads((base / "config.json").read_text())["dtype"] == "bfloat16"
    assert models.largest_difference(base, base) == 0 < models.largest_difference(base, tuned) < 0.02
    assert models.norm(base) == pytest.approx(models.norm(tuned), rel=1e-2)


def test_processes_are_watched():
    program = "import json, time; x = bytearray(80 << 20); time.sleep(0.2); print('RESULT', json.dumps({'a': 1}))"
    found = peers_lib.watch([sys.executable, "-c", program])
    assert found["a"] == 1 and found["seconds"] > 0.2
    assert 80 <= found["anonymous_mb"] <= found["resident_mb"] < 400
    assert peers_lib.watch([sys.executable, "-c", "raise SystemExit('no luck')"])["error"] == "no luck"
    late = peers_lib.watch([sys.executable, "-c", "import time; time.sleep(30)"], limit=0.3)
    assert late["error"].startswith("ended after") and late["seconds"] < 10


def test_floors_count_bytes_and_decompositions(tmp_path):
    rates = floors.Rates()
    rates.__dict__ |= {"copy_bytes": 1e9, "flops": 1e9, "_eigh": {(6, 6): 2.0, (6, 1): 1.0, (6, 0): 0.0, (10, 10): 3.0}}
    shapes = {"a": (6, 10), "b": (10,)}
    floor = lambda method, **settings: floors.in_memory(method, settings, shapes, 4, rates)
    average = floor("weight_average")
    assert average["bytes"] == 4 * 70 * (5 + 1) and average["seconds"] == average["bytes"] / 1e9
    assert floor("ties")["bytes"] == 4 * 70 * (2 * 5 + 1)
    assert floor("iso_c")["eigh"] == {"6, leading 6": 1}
    assert floor("tsv_m")["seconds"] == pytest.approx(4 * 1.0, rel=1e-3)
    assert floor("wudi", solver="exact")["seconds"] == pytest.approx(3.0, rel=1e-3)
    assert floor("wudi", steps=7)["flops"] - floor("wudi", steps=5)["flops"] == 2 * 2 * 6 * 10 * 10
    assert floors.Rates().eigh(8, 2) > 0 and floors.Rates().polar(8) > 0
    (tmp_path / "in").write_bytes(bytes(1000))
    floor = floors.on_disk([tmp_path / "in"], 500, tmp_path / "scratch")
    assert floor["bytes"] == 1500 and floor["seconds"] > 0 and not (tmp_path / "scratch").exists()


def test_rows_and_recipes(tmp_path):
    assert {row.name for row in rows_lib.chosen(None, ["ties", "Iso-C"])} == {"TIES", "Iso-C"}
    with pytest.raises(ValueError, match="no row tise; there are average, task_arithmetic"):
        rows_lib.chosen(MEMORY, ["tise"])
    linear, ties = rows_lib.chosen(DISK, ["linear", "ties"])
    assert "base_model" not in rows_lib.recipe(linear, tmp_path, "float32")
    recipe = rows_lib.recipe(ties, tmp_path, "bfloat16")
    assert recipe["base_model"] == str(tmp_path / "base") and recipe["dtype"] == "bfloat16"
    assert recipe["models"][3] == {"model": str(tmp_path / "ft3"), "parameters": {"weight": 1.0, "density": 0.2}}
    assert len(rows_lib.inputs(linear, tmp_path)) == 4 and len(rows_lib.inputs(ties, tmp_path)) == 5


def test_table_of_a_run_with_peers(tmp_path):
    side = lambda seconds, mb: merge.summary(
        [
            {
                "seconds": s,
                "seconds_again": s / 2,
                "cpu_seconds": s,
                "extra_mb": mb,
                "anonymous_mb": mb,
                "resident_mb": mb,
            }
            for s in (seconds, seconds + 2)
        ]
    )
    base = {"goal": 7, "note": "a note", "floor": {"seconds": 0.5}, "cold": {"seconds": 9.0}}
    row = {**base, "part": MEMORY, "name": "TIES", "peer": side(27, 20480), "ours": side(3, 1024)}
    failed = merge.summary([{"error": "out of memory", "seconds": 3.0}])
    rows = [row, {**row, "part": DISK, "largest difference": 1e-7}, {**row, "part": DISK, "peer": failed}]
    earlier = {"rows": rows, "options": {"small": False, "dtype": "f32"}, "machine": {"cpu": "old", "date": "then"}}
    (linear, ties), options = rows_lib.chosen(DISK, ["linear", "ties"]), earlier["options"]
    assert merge.reused(linear, earlier, options, tmp_path / "old.json") == {}
    assert merge.reused(ties, earlier, {**options, "dtype": "bf16"}, tmp_path / "old.json") == {}
    again = merge.reused(ties, earlier, options, tmp_path / "old.json")
    machine = {**merge.machine(), "load": 0.1}
    rows = [*rows, {**row, "part": DISK, "peer": again}]
    table = table_lib.markdown({"machine": machine, "options": {**options, "repeats": 2}, "versions": {}, "rows": rows})
    assert "| TIES | 28 (least 27) | 4 (least 3) | 2 | 7 / 14 | 20.00 | 1.00 | 20 | 0.5 | 4 |" in table
    assert "| TIES | out of memory | 4 (least 3) (4) | 9 | – |" in table and "- TIES (peer): out of memory" in table
    assert "| TIES† |" in table and "peer's figures from old.json, old, then" in table
    assert table_lib.line(rows[1]) == "disk TIES: peer 28 s, ours 4 s, floor 0.5 s"


def test_mistakes_on_the_command_line(tmp_path, capsys):
    for wrong, match in ((["--small", "--fusionbench", "python"], "full-sized"), (["--repeats", "0"], "at least 1")):
        with pytest.raises(SystemExit):
            merge.arguments(["--work", str(tmp_path), *wrong])
        assert match in capsys.readouterr().err
    with pytest.raises(ValueError, match="--fusionbench needs --peers"):
        peers_lib.Peers("python", None, None, tmp_path)
