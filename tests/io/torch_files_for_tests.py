"""State dicts as ``torch.save`` writes them, without PyTorch."""

import json

import numpy as np

from tests.io.test_torch_checkpoint import WRITERS, Call, Global, Storage, tensor

KINDS = {
    "float32": "FloatStorage", "float64": "DoubleStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage",
    "int64": "LongStorage", "bool": "BoolStorage",
}  # fmt: skip


def save(path, arrays, kind="zip"):
    """A file of ``torch.save``; `kind` is ``zip``, or ``legacy`` for the layout before PyTorch 1.6."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.ascontiguousarray(x).reshape(np.shape(x)) for name, x in arrays.items()}
    table, storages = Call(Global("collections", "OrderedDict"), []), {}
    pairs = []
    for number, (name, x) in enumerate(arrays.items()):
        storage = Storage(KINDS[str(x.dtype)], str(number), x.size, view=kind == "legacy")
        strides = tuple(step // x.itemsize for step in x.strides)
        pairs.append((name, tensor(storage, 0, x.shape, strides)))
        storages[str(number)] = x.reshape(-1)
    table.args = ([list(pair) for pair in pairs],)
    WRITERS[kind](path, table, storages)
    return path


def save_folder(folder, arrays, shards=1, kind="zip"):
    """``pytorch_model.bin``, or shards and their index; what else is in the folder stays, safetensors do not."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")):
        old.unlink()
    if shards == 1:
        save(folder / "pytorch_model.bin", arrays, kind)
        return folder
    place = {name: f"pytorch_model-{1 + i % shards:05}-of-{shards:05}.bin" for i, name in enumerate(arrays)}
    for file in set(place.values()):
        save(folder / file, {name: x for name, x in arrays.items() if place[name] == file}, kind)
    index = {"metadata": {"total_size": 0}, "weight_map": place}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder
