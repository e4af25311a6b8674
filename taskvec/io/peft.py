"""Writing low-rank factors as a PEFT adapter, which `taskvec merge` (see `lora`) and ``peft`` take."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from taskvec import tree as trees
from taskvec.io import names, safetensors
from taskvec.io.atomic import write_text
from taskvec.io.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from taskvec.tree import Tree


def save_adapter(
    folder: str | os.PathLike, table: names.Table, factors: Tree, alpha: float, base: str | os.PathLike = ""
) -> None:
    """Writes ``adapter_model.safetensors`` and, last, ``adapter_config.json``.

    In the file a module's ``lora_A.weight`` is ``[r, in]`` and its ``lora_B.weight`` ``[out, r]``; the module's weight
    changes by ``alpha / r B A``, transposed where the file keeps the weight as ``[in, out]`` (GPT-2).

    Args:
      folder: to write; made if absent.
      table: names of the model's tensors, which become names of modules.
      factors: nested like the params, ``{"a": [..., in, r], "b": [..., r, out]}`` in place of a kernel, stacked over
        layers where the kernel is.
      alpha: the product is scaled by ``alpha / r``.
      base: the model's folder or hub id, as the adapter's config names it.

    Raises:
      ValueError: kernels that no rule covers or that are no matrices of dense layers; ranks or layouts that differ.
    """
    folder, flat = pathlib.Path(folder), trees.flatten(trees.unstack_layers(_on_host(factors)))
    kernels = sorted({path.rpartition("/")[0] for path in flat})
    places = names.places(names.inverse(table), kernels)
    modules = {path: places[path].path.removesuffix(".weight") for path in kernels}
    odd = [p for p in kernels if flat[f"{p}/a"].ndim != 2 or not places[p].path.endswith(".weight")]
    if odd or not kernels:
        raise ValueError(f"an adapter is of kernels of dense layers, not {', '.join(odd[:4]) or 'of nothing'}")
    ranks, ops = {flat[f"{p}/a"].shape[1] for p in kernels}, {places[p].op for p in kernels}
    if len(ranks) > 1 or len(ops) > 1:
        raise ValueError(f"an adapter has one rank and one layout; found ranks {sorted(ranks)}, layouts {sorted(ops)}")
    weights = {}
    for path, module in modules.items():
        for key, which in (("a", "A"), ("b", "B")):
            name = f"base_model.model.{module}.lora_{which}.weight"
            weights[name] = np.ascontiguousarray(flat[f"{path}/{key}"].T)
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.save(folder / ADAPTER_WEIGHTS, weights)
    config = _config(sorted(modules.values()), ranks.pop(), alpha, ops == {"none"}, str(base))
    write_text(folder / ADAPTER_CONFIG, json.dumps(config, indent=2) + "\n")


def _on_host(tree: Tree) -> Tree:
    return {k: _on_host(v) if isinstance(v, dict) else np.asarray(v, np.float32) for k, v in tree.items()}


def _config(modules: list[str], rank: int, alpha: float, fan_in_fan_out: bool, base: str) -> Mapping[str, Any]:
    """The fields of ``adapter_config.json``; peft finds the modules by the ends of their names."""
    return {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": base, "inference_mode": True,
        "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "use_rslora": False, "use_dora": False,
        "bias": "none", "fan_in_fan_out": fan_in_fan_out, "init_lora_weights": True,
        "target_modules": modules, "modules_to_save": None,
    }  # fmt: skip
