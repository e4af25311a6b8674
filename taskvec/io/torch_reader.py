"""Models whose weights PyTorch wrote (``pytorch_model.bin``), tensor by tensor; and whichever kind a folder has.

The pickles are read without PyTorch and without running anything in them (`taskvec.io.torch_checkpoint`). They say
where the tensors lie, so that memory is one tensor at a time here as well.
"""

import pathlib

import numpy as np

from taskvec.io import safetensors_format, torch_checkpoint
from taskvec.io.atomic import PathLike
from taskvec.io.safetensors import SafetensorsReader
from taskvec.io.tensor_files import Place, TensorFiles, entries, weight_files

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"
SUFFIXES = (".bin", ".pt", ".pth")


class TorchReader(TensorFiles):
    """Reads the tensors of state dicts one at a time; see `TensorFiles`."""

    def __init__(self, path: PathLike, check_finite: bool = True):
        """Opens `path` and checks names, shapes and places.

        Args:
          path: a file of ``torch.save``, or a folder with ``pytorch_model.bin`` or with shards and their index.
          check_finite: whether `read` raises on NaN or infinity.

        Raises:
          FileNotFoundError: no such file, or a shard of the index is absent; says what the folder holds.
          taskvec.io.pickles.Forbidden: a pickle holds anything but dicts of tensors.
          ValueError: a file is cut short or holds something else, or the index and the shards disagree.
        """
        super().__init__(check_finite)
        path = pathlib.Path(path)
        self._strided: dict[str, tuple[torch_checkpoint.TorchTensor, Place]] = {}
        self.files, promised = weight_files(path, SINGLE, INDEX)
        for file in self.files:
            size = file.stat().st_size
            tensors, spans = torch_checkpoint.places(file)
            for name, tensor in tensors.items():
                storage = Place(file, size, spans[tensor.storage.key].start)
                dtype = np.dtype(tensor.storage.dtype)
                place = storage._replace(start=storage.start + tensor.offset * dtype.itemsize)
                self._add(name, tensor.shape, dtype, place)
                if not tensor.contiguous:
                    self._strided[name] = tensor, storage
        self._check_promised(path / INDEX, promised)

    def _flat(self, name: str, start: int, stop: int) -> np.ndarray:
        if name not in self._strided:
            return super()._flat(name, start, stop)
        tensor, place = self._strided[name]
        numbers = entries(place, 0, tensor.storage.size, self.specs[name].dtype)
        flat = tensor.of(numbers)[start:stop].flatten()
        flat.flags.writeable = False
        return flat


def open_weights(path: PathLike, check_finite: bool = True) -> TensorFiles:
    """The reader of a file or a folder: safetensors, or what PyTorch wrote where a folder has no safetensors.

    Raises:
      FileNotFoundError, ValueError: as `SafetensorsReader` and `TorchReader`.
    """
    path = pathlib.Path(path)
    reader = TorchReader if path.suffix in SUFFIXES or is_torch(path) else SafetensorsReader
    return reader(path, check_finite)


def is_torch(folder: pathlib.Path) -> bool:
    """Whether a folder's weights are PyTorch's alone."""
    has = lambda *names: any((folder / name).is_file() for name in names)
    return has(SINGLE, INDEX) and not has(safetensors_format.SINGLE, safetensors_format.INDEX)
