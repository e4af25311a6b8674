"""Checkpoints to time merges on: random weights in the shapes of real models, and noisy copies of them.

    python -m benchmarks.models tower WORK       # WORK/ckpt/{base,t0..t7}.safetensors
    python -m benchmarks.models llama WORK       # WORK/models/f32/{base,ft0..ft3}, Hugging Face folders
    python -m benchmarks.models compare A B      # norms and largest difference of two models on disk

`benchmarks.merge` calls this where its work folder has no checkpoints. Names and shapes are those of
``transformers``' CLIPVisionModel and LlamaForCausalLM, so that the peers open the same files.
"""

import argparse
import json
import pathlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from taskvec.io.safetensors import SafetensorsReader, SafetensorsWriter

DTYPES = {"f32": np.float32, "bf16": jnp.bfloat16}
NAMES = {"f32": "float32", "bf16": "bfloat16"}
SHARD_BYTES = 200_000_000

Shapes = dict[str, tuple[int, ...]]


def tower_shapes(small: bool = False) -> Shapes:
    """Tensors of a CLIP-ViT-B/32 vision tower, 87.5 M entries; `small` keeps the structure at a thousandth."""
    width, inner, layers, side, positions = (24, 96, 2, 4, 5) if small else (768, 3072, 12, 32, 50)
    shapes: Shapes = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, 3, side, side),
        "embeddings.position_embedding.weight": (positions, width),
    }
    matrices = {f"self_attn.{x}_proj": (width, width) for x in "kvq"} | {"self_attn.out_proj": (width, width)}
    matrices |= {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
    for layer in range(layers):
        prefix = f"encoder.layers.{layer}."
        for name, shape in matrices.items():
            shapes |= {f"{prefix}{name}.weight": shape, f"{prefix}{name}.bias": shape[:1]}
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{prefix}{name}.weight": (width,), f"{prefix}{name}.bias": (width,)}
    for name in ("pre_layrnorm", "post_layernorm"):
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return shapes


def llama_config(small: bool = False) -> dict:
    """The ``config.json`` of a Llama of 134 M parameters, or of a tiny one."""
    width, inner, layers, vocabulary = (24, 64, 2, 128) if small else (768, 2048, 12, 32000)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "vocab_size": vocabulary,
        "max_position_embeddings": 1024,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }


def llama_shapes(config: dict) -> Shapes:
    """Tensors of a Llama without grouped queries."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    shapes: Shapes = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{x}_proj.weight": (width, width) for x in "qkvo"}
        shapes |= {f"{prefix}mlp.{x}_proj.weight": (inner, width) for x in ("gate", "up")}
        shapes |= {f"{prefix}mlp.down_proj.weight": (width, inner)}
        shapes |= {f"{prefix}{x}_layernorm.weight": (width,) for x in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (width,), "lm_head.weight": (config["vocab_size"], width)}


def _base(shapes: Shapes, rng: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
    """Matrices of standard deviation .02, norms of one, biases of zero."""
    for name, shape in shapes.items():
        if len(shape) > 1:
            yield name, rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
        else:
            yield name, np.full(shape, "norm" in name and name.endswith("weight"), np.float32)


def _dense_noise(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32) * np.float32(1e-3)


def _heavy_tailed_noise(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    spread = rng.random(shape, dtype=np.float32) ** 2 * np.float32(2e-3)
    return rng.standard_normal(shape, dtype=np.float32) * spread


def _write(path: pathlib.Path, shapes: Shapes, dtype, noise: Callable | None, seed: int) -> None:
    """Writes the base model, plus noise drawn from `seed` if there is a noise."""
    specs = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}
    rng = np.random.default_rng(seed)
    with SafetensorsWriter(path, specs, max_shard_bytes=SHARD_BYTES) as writer:
        for name, x in _base(shapes, np.random.default_rng(0)):
            writer.write(name, (x + noise(rng, x.shape) if noise else x).astype(dtype))


def make_tower(work: pathlib.Path, tasks: int = 8, small: bool = False) -> None:
    """Writes a vision tower and `tasks` copies with dense noise of standard deviation 1e-3."""
    folder, shapes = work / "ckpt", tower_shapes(small)
    for task in range(tasks):
        _write(folder / f"t{task}.safetensors", shapes, np.float32, _dense_noise, 1000 + task)
    _write(folder / "base.safetensors", shapes, np.float32, None, 0)  # last: there when all is there


def make_llama(work: pathlib.Path, tag: str = "f32", experts: int = 4, small: bool = False) -> None:
    """Writes a Llama and `experts` copies with heavy-tailed noise, as Hugging Face folders in shards."""
    config = llama_config(small)
    shapes = llama_shapes(config)
    for i in [*range(experts), None]:
        folder = work / "models" / tag / ("base" if i is None else f"ft{i}")
        noise, seed = (None, 0) if i is None else (_heavy_tailed_noise, 100 + i)
        _write(folder, shapes, DTYPES[tag], noise, seed)
        config_text = json.dumps(config | {"dtype": NAMES[tag]}, indent=2)
        (folder / "config.json").write_text(config_text, encoding="utf-8")


def norm(path: pathlib.Path) -> float:
    """Euclidean norm of all floats of a model on disk, summed in float64."""
    reader = SafetensorsReader(path)
    return sum(float(np.square(reader.read(n).astype(np.float64)).sum()) for n in reader.specs) ** 0.5


def largest_difference(one: pathlib.Path, other: pathlib.Path) -> float:
    """Largest absolute difference of two models on disk; raises `ValueError` if their tensors have other names."""
    a, b = SafetensorsReader(one), SafetensorsReader(other)
    if a.specs.keys() != b.specs.keys():
        raise ValueError(f"{one} and {other} hold different tensors: {sorted(a.specs.keys() ^ b.specs.keys())[:5]}")
    of = lambda name: np.abs(a.read(name).astype(np.float32) - b.read(name).astype(np.float32)).max(initial=0.0)
    return float(max(of(name) for name in a.specs))


def main() -> None:
    """Writes one kind of checkpoints, or compares two models."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=("tower", "llama", "compare"))
    parser.add_argument("paths", nargs="+", type=pathlib.Path)
    parser.add_argument("--dtype", choices=DTYPES, default="f32")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    found = {}
    if args.kind == "tower":
        make_tower(args.paths[0], args.tasks, args.small)
    elif args.kind == "llama":
        make_llama(args.paths[0], args.dtype, small=args.small)
    else:
        found["norms"] = [round(norm(path), 6) for path in args.paths]
        found |= {"largest_difference": largest_difference(*args.paths)} if len(args.paths) == 2 else {}
    print("RESULT " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
