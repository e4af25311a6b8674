"""Records what the reference implementations compute, so that the tests need neither torch nor transformers.

Needs the extra `parity` (torch, transformers, efficientnet-lite-pytorch); run once, from the root of the repository:

    python tests/parity/record.py --minilm FOLDER --efficientnet FILE.pth

All numbers are computed in float64 and stored as float32. The tiny models are random and small enough to be
stored whole.
"""

import argparse
import json
import pathlib

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).parent.parent / "models" / "recorded"
SENTENCES = (
    "Task vectors are what fine-tuning changed.",
    "a film",
    "The quick brown fox jumps over the lazy dog, twice, and then once more because nobody was looking at it.",
    "Is it cheaper to merge models than to train one for all tasks?",
    "Ça coûte 3,50 €; 日本語 too.",
    "antidisestablishmentarianism",
)
TINY = {
    "even": {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
             "intermediate_size": 64, "max_position_embeddings": 40},
    "odd": {"vocab_size": 53, "hidden_size": 30, "num_hidden_layers": 1, "num_attention_heads": 3,
            "intermediate_size": 37, "max_position_embeddings": 19, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
}  # fmt: skip
IMAGES = {"square": (64, 64), "wide": (96, 80), "odd": (71, 53)}


def pooled(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens of the mask, as sentence-transformers computes it."""
    weight = mask[..., None].to(tokens.dtype)
    return (tokens * weight).sum(1) / weight.sum(1).clamp(min=1e-9)


def run_bert(
    model: torch.nn.Module, ids: np.ndarray, mask: np.ndarray, types: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Last layer and features of a transformers BERT, in float64."""
    ids, mask = torch.from_numpy(ids).long(), torch.from_numpy(mask)
    more = {} if types is None else {"token_type_ids": torch.from_numpy(types).long()}
    with torch.no_grad():
        tokens = model.double().eval()(input_ids=ids, attention_mask=mask.long(), **more).last_hidden_state
    return {"tokens": tokens.numpy().astype(np.float32), "features": pooled(tokens, mask).numpy().astype(np.float32)}


def random_batch(seed: int, vocab: int, length: int, batch: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens, padded at the end to different lengths."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, vocab, (batch, length)).astype(np.int32)
    return ids, np.arange(length) < rng.integers(1, length + 1, (batch, 1))


def record_tiny() -> None:
    """Random BERTs, each a Hugging Face folder with an ``outputs.npz``."""
    for seed, (name, fields) in enumerate(TINY.items()):
        torch.manual_seed(seed)
        model = transformers.BertModel(transformers.BertConfig(**fields, hidden_act="gelu"))
        with torch.no_grad():  # the usual initialisation is too small to show a wrong bias or scale
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(HERE / f"bert_{name}")
        ids, mask = random_batch(seed, fields["vocab_size"], fields["max_position_embeddings"] - seed)
        out = {"ids": ids, "mask": mask, **run_bert(model, ids, mask)}
        if fields.get("type_vocab_size") != 1:  # pairs of texts: the second, of type 1, begins anywhere
            begin = np.random.default_rng(seed + 10).integers(0, ids.shape[1], (len(ids), 1))
            types = ((np.arange(ids.shape[1]) >= begin) & mask).astype(np.int32)
            out |= {"types": types} | {f"typed_{k}": x for k, x in run_bert(model, ids, mask, types).items()}
        np.savez_compressed(HERE / f"bert_{name}" / "outputs.npz", **out)


def record_minilm(folder: pathlib.Path) -> None:
    """The real encoder on a few sentences: all features, and the last layer of the first sentence."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="np")
    ids, mask = batch["input_ids"].astype(np.int32), batch["attention_mask"].astype(bool)
    out = run_bert(transformers.AutoModel.from_pretrained(folder), ids, mask)
    first = out["tokens"][0, : mask[0].sum()]
    text = json.dumps(SENTENCES)
    np.savez_compressed(HERE / "minilm.npz", ids=ids, mask=mask, features=out["features"], first=first, sentences=text)


def record_efficientnet(file: pathlib.Path) -> None:
    """Pooled features of random images of three sizes, with padding computed from the actual size."""
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0", image_size=None).eval()
    model.load_state_dict(torch.load(file, weights_only=True))
    model.double()
    out = {}
    for seed, (name, size) in enumerate(IMAGES.items()):
        images = np.random.default_rng(seed).integers(0, 256, (3, *size, 3), np.uint8)
        x = (torch.from_numpy(images).double() - 127) / 128
        with torch.no_grad():
            y = model.extract_features(x.permute(0, 3, 1, 2)).mean((2, 3))
        out |= {f"{name}_features": y.numpy().astype(np.float32), f"{name}_size": np.array(size)}
        out[f"{name}_sum"] = images.sum(dtype=np.int64)  # tells a changed random generator from a changed model
    np.savez_compressed(HERE / "efficientnet.npz", **out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minilm", type=pathlib.Path, required=True)
    parser.add_argument("--efficientnet", type=pathlib.Path, required=True)
    args = parser.parse_args()
    HERE.mkdir(parents=True, exist_ok=True)
    record_tiny()
    record_minilm(args.minilm)
    record_efficientnet(args.efficientnet)
