"""PEFT LoRA adapters as models: ``W + scaling * B A``, computed for the rows that are asked for.

Nothing of the size of the model is ever made: an adapter's factors stay on disk, and a read multiplies the rows it
needs. ``scaling`` is ``lora_alpha / r`` (LoRA, arXiv 2106.09685) or ``lora_alpha / sqrt(r)`` (rsLoRA, arXiv
2312.03732), with ``rank_pattern`` and ``alpha_pattern`` per module. What is no such sum (DoRA, trained biases, tokens,
several adapters behind a router) is refused by name.
"""

import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from taskvec.io import prefixes
from taskvec.io.safetensors import SafetensorsReader
from taskvec.messages import some

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+?)\.lora_(?P<embedding>embedding_)?(?P<which>[AB])(?:\.weight)?"
)
_WHOLE = re.compile(r"(?:base_model\.model\.)?(?P<name>.+)")
_INSIDE = re.compile(r"\.(modules_to_save|base_layer)(\.default)?(?=\.)")

# Fields of adapter_config.json that change what the adapter computes, and why that is no fixed sum of matrices.
_REFUSED = {
    "use_dora": "DoRA normalises the columns of the sum",
    "lora_bias": "it trains a bias of B",
    "use_qalora": "QALoRA pools its inputs",
    "layer_replication": "it repeats layers of the base",
    "trainable_token_indices": "it trains single rows of the embedding",
    "target_parameters": "it adapts fused parameters",
    "alora_invocation_tokens": "it is switched on by tokens of the input",
    "arrow_config": "it routes between adapters by the input",
    "use_bdlora": "its factors are block-diagonal",
    "kasa_config": "KaSA changes the base",
    "monteclora_config": "its factors are random variables",
    "velora_config": "VeLoRA changes how it is trained and stored",
    "megatron_config": "its factors are split over devices",
}
# Ways of initialising that also change the base, so that the product is relative to another base than the one on disk.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Factors(NamedTuple):
    """How one tensor changes by ``scaling * B A``.

    Attributes:
      a, b: names of the factors in the adapter's file.
      scaling: the number in front.
      transposed: whether the tensor is ``[in, out]`` (GPT-2's Conv1D, embeddings).
    """

    a: str
    b: str
    scaling: float
    transposed: bool


class LoraReader:
    """A base model with an adapter added; tensors that the adapter changes are float32.

    Attributes:
      specs: name -> shape and dtype, in the names of the base.
    """

    def __init__(self, folder: pathlib.Path, config: Mapping[str, Any], base: Any, ref: str):
        """Finds the tensors that the adapter changes.

        Args:
          folder: of the adapter.
          config: its ``adapter_config.json``.
          base: reader of the model that it belongs to.
          ref: its name, for messages.

        Raises:
          ValueError: another kind of adapter than plain LoRA, modules that the base does not have, factors whose
            shapes do not fit.
        """
        self.check(config, ref)
        self._ref, self._base, self._folder = ref, base, folder
        self._adapter = SafetensorsReader(folder / ADAPTER_WEIGHTS, check_finite=False)
        pairs, whole = self._sort_out()
        found = prefixes.match([*(f"{module}.weight" for module in pairs), *whole], base.specs)
        self._factors = {}
        for module, (a, b, embedding) in pairs.items():
            scaling = self._scaling(config, module, a)
            flip = embedding or bool(config.get("fan_in_fan_out"))
            self._factors[found[f"{module}.weight"]] = Factors(a, b, scaling, flip)
        self._whole = {found[name]: key for name, key in whole.items()}
        unknown = sorted(self._factors.keys() - base.specs.keys())
        if unknown:
            raise ValueError(f"{ref} adapts {some(unknown, 4)}, which its base does not have; is it of another model?")
        self.specs = dict(base.specs) | {name: self._adapter.specs[key] for name, key in self._whole.items()}
        for name, factors in self._factors.items():
            self._check_shape(name, factors)
            self.specs[name] = jax.ShapeDtypeStruct(self.specs[name].shape, np.float32)

    @staticmethod
    def check(config: Mapping[str, Any], ref: str) -> None:
        """Raises `ValueError` if an adapter is not ``W + scaling * B A`` on the base that is on disk."""
        kind = config.get("peft_type", "LORA")
        if kind != "LORA":
            raise ValueError(f"{ref} is an adapter of type {kind}; only LORA can be merged as a task vector")
        for field, why in _REFUSED.items():
            if config.get(field):
                raise ValueError(f"{ref} has {field} set, and {why}: merge it into its base with peft first")
        if config.get("bias", "none") != "none":
            raise ValueError(f"{ref} has bias={config['bias']!r}: its biases are trained; merge it with peft first")
        how = config.get("init_lora_weights")
        if isinstance(how, str) and how.startswith(_CHANGES_BASE):
            raise ValueError(
                f"{ref} was started with init_lora_weights={how!r}, which changes the base: convert it with peft "
                "(save_pretrained with path_initial_model_for_weight_conversion) first"
            )

    @property
    def changed(self) -> frozenset[str]:
        """Names of the tensors that the adapter changes."""
        return frozenset((*self._factors, *self._whole))

    def factors(self, name: str) -> tuple[np.ndarray, np.ndarray] | None:
        """``(up [m, r], down [r, n])`` float32, what the adapter adds to a matrix ``[m, n]`` being ``up @ down``.

        The scaling is in ``up``. ``None`` for tensors that it does not change, that are stored whole, or convolutions.
        """
        if name not in self._factors or len(self.specs[name].shape) != 2:
            return None
        a_key, b_key, scaling, transposed = self._factors[name]
        a, b = (self._adapter.read(key).astype(np.float32) for key in (a_key, b_key))
        return (scaling * a.T, b.T) if transposed else (scaling * b, a)

    def path_of(self, name: str) -> pathlib.Path:
        """The adapter's file for tensors that it changes, the base's for the others."""
        if name in self._factors or name in self._whole:
            return self._folder / ADAPTER_WEIGHTS
        return self._base.path_of(name)

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """A tensor of base plus adapter, or some of its rows."""
        x = self._adapter.read(self._whole[name], rows) if name in self._whole else self._base.read(name, rows)
        return x.astype(np.float32) + self._delta(name, rows) if name in self._factors else x

    def _delta(self, name: str, rows: slice | None) -> np.ndarray:
        a_key, b_key, scaling, transposed = self._factors[name]
        rows = rows or slice(None)
        a, b = (self._adapter.read(key).astype(np.float32) for key in (a_key, b_key))
        if a.ndim == 4:  # a convolution by A, then a 1 x 1 convolution by B
            b = b[rows].reshape(-1, a.shape[0])
            return scaling * (b @ a.reshape(a.shape[0], -1)).reshape(-1, *a.shape[1:])
        return scaling * (a.T[rows] @ b.T if transposed else b[rows] @ a)

    def _sort_out(self) -> tuple[dict[str, tuple[str, str, bool]], dict[str, str]]:
        """The modules with their factors, and the tensors that are stored whole (``modules_to_save``)."""
        halves: dict[str, dict[str, str]] = {}
        embeddings, whole = set(), {}
        for key in self._adapter.specs:
            if match := _KEY.fullmatch(key):
                halves.setdefault(match["module"], {})[match["which"]] = key
                if match["embedding"]:
                    embeddings.add(match["module"])
            elif "lora_" in key:
                raise ValueError(f"{self._ref} holds {key}, which is no factor of a plain LoRA")
            else:
                whole[_INSIDE.sub("", _WHOLE.fullmatch(key)["name"])] = key
        odd = sorted(module for module, half in halves.items() if len(half) != 2)
        if odd or not (halves or whole):
            raise ValueError(f"{self._ref} lacks a factor for {some(odd, 4) or 'every module'}; the file is incomplete")
        return {m: (half["A"], half["B"], m in embeddings) for m, half in halves.items()}, whole

    def _scaling(self, config: Mapping[str, Any], module: str, a: str) -> float:
        rank = int(self._adapter.specs[a].shape[0])
        expected = _by_pattern(config.get("rank_pattern"), module, config.get("r", rank))
        if rank != expected:
            raise ValueError(f"{self._ref}: {module} has rank {rank}, but {ADAPTER_CONFIG} says {expected}")
        alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

    def _check_shape(self, name: str, factors: Factors) -> None:
        a, b = (self._adapter.specs[key].shape for key in (factors.a, factors.b))
        if len(a) == 4:
            shape = (b[0], *a[1:]) if b[2:] == (1, 1) else None
        else:
            shape = (a[1], b[0]) if factors.transposed else (b[0], a[1])
        if tuple(self.specs[name].shape) != shape or a[0] != b[1]:
            raise ValueError(
                f"{self._ref}: factors {list(b)} and {list(a)} do not fit {name} {list(self.specs[name].shape)} of "
                "the base (is it of another model, or a grouped convolution?)"
            )


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default
