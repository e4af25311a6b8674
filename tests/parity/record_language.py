"""Records what transformers computes for tiny random language models; see ``record.py`` for how and why.

python tests/parity/record_language.py
"""

import copy

import numpy as np
import torch
import transformers
from record import HERE, pooled, random_batch

LLAMA3 = {"rope_type": "llama3", "rope_theta": 30.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
DECODER = {"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 4,
           "num_key_value_heads": 2, "max_position_embeddings": 64, "eos_token_id": 2}  # fmt: skip
T5 = {"d_model": 24, "d_kv": 7, "d_ff": 30, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 3,
      "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "decoder_start_token_id": 0,
      }  # fmt: skip
TINY = {
    "roberta_tiny": transformers.RobertaConfig(
        vocab_size=53, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
        max_position_embeddings=20, type_vocab_size=1, layer_norm_eps=1e-5, pad_token_id=1,
    ),
    "gpt2_tiny": transformers.GPT2Config(
        vocab_size=59, n_positions=40, n_embd=24, n_layer=2, n_head=3, eos_token_id=2, bos_token_id=2, pad_token_id=0
    ),
    "llama_scaled": transformers.LlamaConfig(
        vocab_size=59, head_dim=10, rope_parameters=LLAMA3, attention_bias=True, mlp_bias=True, pad_token_id=0,
        **DECODER
    ),
    "qwen2_tied": transformers.Qwen2Config(
        vocab_size=43, tie_word_embeddings=True, pad_token_id=0, **{**DECODER, "eos_token_id": 37}
    ),
    "t5_relu": transformers.T5Config(vocab_size=61, eos_token_id=26, **T5),
    "t5_gated": transformers.T5Config(
        vocab_size=47, feed_forward_proj="gated-gelu", tie_word_embeddings=False, eos_token_id=22, **T5
    ),
}  # fmt: skip
NEW = 12


def random_model(name: str, seed: int) -> torch.nn.Module:
    """A random model whose biases, scales and heads matter; a Flan-T5's head is its own, as in the published files."""
    torch.manual_seed(seed)
    config = copy.deepcopy(TINY[name])
    kind = {"roberta": transformers.AutoModel, "t5": transformers.AutoModelForSeq2SeqLM}
    model = kind.get(config.model_type, transformers.AutoModelForCausalLM).from_config(config)
    if name == "t5_gated":
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    size = 0.1 if config.model_type == "t5" else 0.2  # T5 does not scale logits: larger ones amplify rounding
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return model


def outputs(model: torch.nn.Module, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Features, tokens and logits, in float64."""
    ids, mask = torch.from_numpy(batch["ids"]).long(), torch.from_numpy(batch["mask"])
    model = copy.deepcopy(model).double().eval()
    kind = model.config.model_type
    with torch.no_grad():
        if kind == "roberta":
            tokens = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
            out = {"tokens": tokens, "features": pooled(tokens, mask)}
        elif kind == "t5":
            said = torch.from_numpy(batch["decoder_ids"]).long()
            full = model(input_ids=ids, attention_mask=mask.long(), decoder_input_ids=said)
            tokens = full.encoder_last_hidden_state
            out = {"tokens": tokens, "features": pooled(tokens, mask), "logits": full.logits}
        else:
            full = model(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
            tokens = full.hidden_states[-1]
            last = tokens[torch.arange(len(ids)), mask.sum(1) - 1]
            out = {"tokens": tokens, "features": last, "logits": full.logits}
    return {key: value.numpy().astype(np.float32) for key, value in out.items()}


def generated(model: torch.nn.Module, batch: dict[str, np.ndarray], new: int = NEW, **how) -> np.ndarray:
    """New tokens of `generate`, int32 ``[B, new]``, -1 after the end of a text; decoders read prompts padded left."""
    eos = model.config.eos_token_id
    ids, mask = batch["ids"], batch["mask"]
    if model.config.model_type != "t5":
        order = np.argsort(mask, axis=1, kind="stable")  # padding first
        ids, mask = np.take_along_axis(ids, order, 1), np.take_along_axis(mask, order, 1)
    with torch.no_grad():
        out = model.generate(
            input_ids=torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(mask).long(), max_new_tokens=new,
            do_sample=False, pad_token_id=0, **how,
        ).numpy()  # fmt: skip
    out = out[:, 1 if model.config.model_type == "t5" else ids.shape[1] :]
    out = np.pad(out, ((0, 0), (0, new - out.shape[1])))
    ended = np.cumsum(out == eos, axis=1) - (out == eos) > 0
    return np.where(ended, -1, out).astype(np.int32)


SEARCHES = {
    "greedy": {},
    "beam": {"num_beams": 3},
    "long": {"num_beams": 4, "length_penalty": 2.0, "early_stopping": "never"},
    "early": {"num_beams": 2, "length_penalty": 0.5, "early_stopping": True},
}


def make_batch(config: transformers.PretrainedConfig, seed: int, length: int) -> dict[str, np.ndarray]:
    """Random texts, padded at the end with the config's padding token."""
    ids, mask = random_batch(seed, config.vocab_size, length)
    ids = np.where(ids == config.pad_token_id, 3, ids)
    batch = {"ids": np.where(mask, ids, config.pad_token_id).astype(np.int32), "mask": mask}
    if config.model_type == "t5":
        batch["decoder_ids"] = np.pad(random_batch(seed + 1, config.vocab_size, 9)[0], ((0, 0), (1, 0)))
    return batch


def record(name: str, seed: int) -> None:
    """A Hugging Face folder with an ``outputs.npz``."""
    model = random_model(name, seed).eval()
    model.save_pretrained(HERE / name)
    batch = make_batch(model.config, seed, 18)
    out = outputs(model, batch)
    if model.config.model_type != "roberta":
        out |= {key: generated(model, batch, **how) for key, how in SEARCHES.items()}
    np.savez_compressed(HERE / name / "outputs.npz", **batch, **out)


if __name__ == "__main__":
    for number, variant in enumerate(TINY):
        record(variant, number)
