"""Tiny folders on disk whose tensors have the very names that transformers gives them."""

import json

import ml_dtypes
import numpy as np

from taskvec.io import safetensors

V, D, F, L = 11, 4, 6, 3  # vocabulary, width, inner width, blocks


def llama(tied=False):
    block = {
        "self_attn.q_proj.weight": (D, D),
        "self_attn.k_proj.weight": (D // 2, D),
        "self_attn.v_proj.weight": (D // 2, D),
        "self_attn.o_proj.weight": (D, D),
        "mlp.gate_proj.weight": (F, D),
        "mlp.up_proj.weight": (F, D),
        "mlp.down_proj.weight": (D, F),
        "input_layernorm.weight": (D,),
        "post_attention_layernorm.weight": (D,),
    }
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(L) for name, shape in block.items()}
    return shapes if tied else shapes | {"lm_head.weight": (V, D)}


def gpt2():
    block = {
        "ln_1.weight": (D,), "ln_1.bias": (D,), "ln_2.weight": (D,), "ln_2.bias": (D,),
        "attn.c_attn.weight": (D, 3 * D), "attn.c_attn.bias": (3 * D,),
        "attn.c_proj.weight": (D, D), "attn.c_proj.bias": (D,),
        "mlp.c_fc.weight": (D, F), "mlp.c_fc.bias": (F,), "mlp.c_proj.weight": (F, D), "mlp.c_proj.bias": (D,),
    }  # fmt: skip
    shapes = {"wte.weight": (V, D), "wpe.weight": (7, D), "ln_f.weight": (D,), "ln_f.bias": (D,)}
    shapes |= {f"h.{i}.{name}": shape for i in range(L) for name, shape in block.items()}
    return {f"transformer.{name}": shape for name, shape in shapes.items()}


def t5():
    attention = {f"{which}.weight": (D, D) for which in "qkvo"}
    shapes = {"shared.weight": (V, D)}
    for side in ("encoder", "decoder"):
        shapes[f"{side}.final_layer_norm.weight"] = (D,)
        shapes[f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (5, 2)
        for i in range(2):
            names = ["SelfAttention", *(["EncDecAttention"] if side == "decoder" else [])]
            for at, name in enumerate(names):
                shapes |= {f"{side}.block.{i}.layer.{at}.{name}.{k}": v for k, v in attention.items()}
                shapes[f"{side}.block.{i}.layer.{at}.layer_norm.weight"] = (D,)
            last = f"{side}.block.{i}.layer.{len(names)}"
            shapes |= {f"{last}.DenseReluDense.wi.weight": (F, D), f"{last}.DenseReluDense.wo.weight": (D, F)}
            shapes[f"{last}.layer_norm.weight"] = (D,)
    return shapes


def bert(prefix="", head=()):
    dense = lambda name, a, b: {f"{name}.weight": (a, b), f"{name}.bias": (a,)}
    norm = lambda name: {f"{name}.weight": (D,), f"{name}.bias": (D,)}
    block = {}
    for which in ("self.query", "self.key", "self.value", "output.dense"):
        block |= dense(f"attention.{which}", D, D)
    block |= norm("attention.output.LayerNorm") | dense("intermediate.dense", F, D) | dense("output.dense", D, F)
    block |= norm("output.LayerNorm")
    shapes = {
        "embeddings.word_embeddings.weight": (V, D),
        "embeddings.position_embeddings.weight": (7, D),
        "embeddings.token_type_embeddings.weight": (2, D),
        **norm("embeddings.LayerNorm"),
        **dense("pooler.dense", D, D),
    }
    shapes |= {f"encoder.layer.{i}.{name}": shape for i in range(L) for name, shape in block.items()}
    shapes = {prefix + name: shape for name, shape in shapes.items()}
    return shapes | {f"{name}.weight": (3, D) for name in head}


def clip():
    shapes = {
        "logit_scale": (),
        "text_projection.weight": (5, D),
        "visual_projection.weight": (5, D),
        "text_model.embeddings.token_embedding.weight": (V, D),
        "text_model.embeddings.position_embedding.weight": (7, D),
        "vision_model.embeddings.class_embedding": (D,),
        "vision_model.embeddings.patch_embedding.weight": (D, 3, 2, 2),
        "vision_model.embeddings.position_embedding.weight": (5, D),
    }
    for side in ("text_model", "vision_model"):
        for norm in ("final_layer_norm",) if side == "text_model" else ("pre_layrnorm", "post_layernorm"):
            shapes |= {f"{side}.{norm}.weight": (D,), f"{side}.{norm}.bias": (D,)}
        for i in range(2):
            at = f"{side}.encoder.layers.{i}"
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                shapes |= {f"{at}.self_attn.{name}.weight": (D, D), f"{at}.self_attn.{name}.bias": (D,)}
            shapes |= {f"{at}.mlp.fc1.weight": (F, D), f"{at}.mlp.fc1.bias": (F,)}
            shapes |= {f"{at}.mlp.fc2.weight": (D, F), f"{at}.mlp.fc2.bias": (D,)}
            for norm in ("layer_norm1", "layer_norm2"):
                shapes |= {f"{at}.{norm}.weight": (D,), f"{at}.{norm}.bias": (D,)}
    return shapes


SHAPES = {"llama": llama(), "llama_tied": llama(tied=True), "gpt2": gpt2(), "t5": t5(), "bert": bert(), "clip": clip()}


def tensors(shapes, seed, around=None, size=0.05, dtype=np.float32):
    """Random tensors, or random changes of those in `around`."""
    rng = np.random.default_rng(seed)
    drawn = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    if around is not None:
        drawn = {name: np.asarray(around[name], np.float32) + size * x for name, x in drawn.items()}
    return {name: x.astype(dtype) for name, x in drawn.items()}


def write(folder, arrays, config=None, shard_bytes=5_000_000_000):
    """A model folder with a config, a tokenizer and a README."""
    folder.mkdir(parents=True, exist_ok=True)
    specs = {name: np.asarray(x) for name, x in arrays.items()}
    with safetensors.SafetensorsWriter(folder, specs, max_shard_bytes=shard_bytes) as writer:
        for name, x in specs.items():
            writer.write(name, x)
    fields = {"model_type": "any", "dtype": "float32", "text_config": {"dtype": "float32"}} | (config or {})
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "README.md").write_text("the base's card")
    return folder


def family(root, shapes, experts=("a", "b"), dtype=np.float32, shard_bytes=700, config=None):
    """A base and fine-tuned copies as folders; returns ``{name: tensors}``."""
    made = {"base": tensors(shapes, 0, dtype=dtype)}
    for seed, name in enumerate(experts, 1):
        made[name] = tensors(shapes, seed, made["base"], dtype=dtype)
    for name, arrays in made.items():
        write(root / name, arrays, config, shard_bytes)
    return made


def mean(made, names=("a", "b")):
    """The mean of the experts, in float64."""
    return {k: np.mean([made[name][k].astype(np.float64) for name in names], axis=0) for k in made["base"]}


def adapter(folder, factors, **config):
    folder.mkdir(parents=True)
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "bias": "none", "fan_in_fan_out": False} | config
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    safetensors.save(folder / "adapter_model.safetensors", {f"base_model.model.{k}": v for k, v in factors.items()})
    return folder


def pair(module, a, b, kind="lora_{}.weight", seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    draw = lambda shape: rng.standard_normal(shape).astype(dtype)
    return {f"{module}.{kind.format('A')}": draw(a), f"{module}.{kind.format('B')}": draw(b)}


BF16 = ml_dtypes.bfloat16
