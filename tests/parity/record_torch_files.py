"""Records small files that PyTorch writes, and the numbers that it says are in them.

Needs torch; run once, from the root of the repository:

    python tests/parity/record_torch_files.py
"""

import json
import pathlib

import numpy as np
import torch

HERE = pathlib.Path(__file__).parent.parent / "io" / "recorded" / "torch_files"


def main() -> None:
    """A state dict whole, whole in the layout before PyTorch 1.6, and in two shards with an index."""
    torch.manual_seed(0)
    layer, table = torch.nn.Linear(4, 5), torch.randn(9, 3)
    tensors = {f"layer.{name}": x for name, x in layer.state_dict(keep_vars=True).items()}
    tensors |= {
        "half": torch.randn(3, 2).half(), "bfloat16": torch.randn(4, 2).bfloat16(), "double": torch.randn(3).double(),
        "position_ids": torch.arange(7)[None], "mask": torch.tensor([True, False, True]), "scale": torch.tensor(2.5),
        "transposed": torch.randn(4, 6).T, "slice": table[2:7], "tied": table, "every_second": table[::2, 1:],
    }  # fmt: skip
    (HERE / "sharded").mkdir(parents=True, exist_ok=True)
    torch.save(tensors, HERE / "pytorch_model.bin")
    torch.save(tensors, HERE / "legacy.bin", _use_new_zipfile_serialization=False)
    place = {name: f"pytorch_model-{1 + i % 2:05}-of-00002.bin" for i, name in enumerate(tensors)}
    for file in set(place.values()):
        torch.save({name: x for name, x in tensors.items() if place[name] == file}, HERE / "sharded" / file)
    index = {"metadata": {}, "weight_map": place}
    (HERE / "sharded" / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=1) + "\n")
    # NumPy has no bfloat16: its bits.
    plain = lambda x: (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).detach().numpy()
    np.savez_compressed(HERE / "numbers.npz", **{name: plain(x) for name, x in tensors.items()})


if __name__ == "__main__":
    main()
