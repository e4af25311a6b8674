"""State dicts as ``torch.save`` writes them, without PyTorch."""

import io
import json
import pickle
import zipfile

import ml_dtypes
import numpy as np

MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001
KINDS = {
    "float32": "FloatStorage", "float64": "DoubleStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage",
    "int64": "LongStorage", "bool": "BoolStorage",
}  # fmt: skip


class Global:
    """Pickles as the name ``module.name`` without being it."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Call:
    """Pickles as a call ``function(*args)``."""

    def __init__(self, function, *args):
        self.function, self.args = function, args


class Storage:
    def __init__(self, kind, key, size, *, view=False):
        self.pid = ("storage", Global("torch", kind), key, "cpu", size, *([None] if view else []))


class Pickler(pickle._Pickler):
    """A pickler that writes the names PyTorch would, without PyTorch (the pure Python one lets us save names)."""

    def persistent_id(self, obj):
        return obj.pid if isinstance(obj, Storage) else None

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Global):
            self.write(b"c" + f"{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, Call):
            self.save(obj.function)
            self.save(obj.args)
            self.write(pickle.REDUCE)
        else:
            super().save(obj, save_persistent_id)


def pickled(obj):
    out = io.BytesIO()
    Pickler(out, 2).dump(obj)
    return out.getvalue()


def tensor(storage, offset, shape, strides):
    rebuild = Global("torch._utils", "_rebuild_tensor_v2")
    return Call(rebuild, storage, offset, shape, strides, False, Call(Global("collections", "OrderedDict")))


def write_zip(path, table, storages, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled(table))
        archive.writestr("archive/byteorder", "little")
        for key, array in storages.items():
            archive.writestr(f"archive/data/{key}", array.tobytes())


def write_legacy(path, table, storages):
    machine = {"protocol_version": VERSION, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    with open(path, "wb") as file:
        for obj in (MAGIC, VERSION, machine, table, list(storages)):
            file.write(pickled(obj))
        for array in storages.values():
            file.write(array.size.to_bytes(8, "little") + array.tobytes())


WRITERS = {"zip": write_zip, "legacy": write_legacy}


def example(legacy):
    flat = np.arange(24, dtype=np.float32)
    bf16 = np.linspace(-2, 2, 6).astype(ml_dtypes.bfloat16)
    storages = {"0": flat, "1": np.array([5], np.int64), "2": bf16}
    a, b, c = (Storage(k, key, storages[key].size, view=legacy) for k, key in
               (("FloatStorage", "0"), ("LongStorage", "1"), ("BFloat16Storage", "2")))  # fmt: skip
    table = {
        "whole": tensor(a, 0, (2, 3, 4), (12, 4, 1)),
        "transposed.shared": tensor(a, 12, (4, 3), (1, 4)),
        "count": tensor(b, 0, (), ()),
        "parameter": Call(Global("torch._utils", "_rebuild_parameter"), tensor(c, 1, (2, 2), (2, 1)), True, {}),
        "empty": tensor(a, 24, (0, 5), (5, 1)),
    }
    expected = {
        "whole": flat.reshape(2, 3, 4),
        "transposed.shared": flat.reshape(2, 3, 4)[1].T,
        "count": np.array(5),
        "parameter": bf16[1:5].reshape(2, 2),
        "empty": np.empty((0, 5), np.float32),
    }
    return table, storages, expected


def evil(marker):
    return [
        Call(Global("os", "system"), f"touch {marker}"),
        Call(Global("posix", "system"), f"touch {marker}"),
        Call(Global("builtins", "eval"), f"open({str(marker)!r}, 'w')"),
        Call(Global("builtins", "getattr"), {}, "clear"),
        Call(Global("subprocess", "Popen"), ["touch", str(marker)]),
        Call(Global("torch.nn.modules.linear", "Linear")),
        Call(Global("numpy", "fromfile"), str(marker)),
    ]


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
