"""Records a tiny CLIP of OpenCLIP in the formats that its weights are published in, and what it computes.

Needs open_clip_torch and safetensors; run once, from the root of the repository:

    python tests/parity/record_open_clip.py

* ``whole.safetensors``: the state dict of both towers.
* ``encoder.pt``: the image encoder as the task_vectors line pickles it, a module with the preprocessing and what is
  left of the text tower.
* ``script.pt``: TorchScript in half precision, as OpenAI published its models.
"""

import pathlib
import sys
import types

import numpy as np
import open_clip
import safetensors.torch
import torch

HERE = pathlib.Path(__file__).parent.parent / "io" / "recorded" / "open_clip"
VISION = {"image_size": 16, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8}
TEXT = {"context_length": 7, "vocab_size": 30, "width": 16, "heads": 2, "layers": 1}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

source = types.ModuleType("src")
source.modeling = types.ModuleType("src.modeling")
sys.modules |= {"src": source, "src.modeling": source.modeling}


class ImageEncoder(torch.nn.Module):
    """As in the task_vectors line: a whole CLIP less the text blocks, and the preprocessing."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model
        self.train_preprocess, self.val_preprocess = (open_clip.image_transform(16, is_train=x) for x in (True, False))
        self.cache_dir = None
        delattr(self.model, "transformer")


ImageEncoder.__module__, source.modeling.ImageEncoder = "src.modeling", ImageEncoder


def main() -> None:
    """Writes all files."""
    torch.manual_seed(0)
    model = open_clip.CLIP(embed_dim=10, vision_cfg=VISION, text_cfg=TEXT, quick_gelu=True).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    HERE.mkdir(parents=True, exist_ok=True)
    image = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    ids = np.random.default_rng(1).integers(1, 28, (4, 7)).astype(np.int32)
    ids[np.arange(4), [6, 2, 4, 5]] = 29
    safetensors.torch.save_file({k: x.contiguous() for k, x in model.state_dict().items()}, HERE / "whole.safetensors")
    torch.jit.script(Script(model).half()).save(HERE / "script.pt")
    model = model.float()
    model.load_state_dict(safetensors.torch.load_file(HERE / "whole.safetensors"))
    model = model.double()
    x = (torch.from_numpy(image).double() / 255 - torch.tensor(MEAN).double()) / torch.tensor(STD).double()
    with torch.no_grad():
        out = {
            "image_features": model.encode_image(x.permute(0, 3, 1, 2)),
            "text_features": model.encode_text(torch.from_numpy(ids).long()),
        }
    np.savez_compressed(
        HERE / "outputs.npz", image=image, ids=ids, **{k: v.numpy().astype(np.float32) for k, v in out.items()}
    )
    encoder = ImageEncoder(model.float())
    torch.save(encoder, HERE / "encoder.pt")


class Script(torch.nn.Module):
    """The parameters of a CLIP in modules that TorchScript takes."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        for name, parameter in module.named_parameters(recurse=False):
            self.register_parameter(name, torch.nn.Parameter(parameter.detach().clone()))
        for name, child in module.named_children():
            self.add_module(name, Script(child))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Nothing that matters."""
        return x


if __name__ == "__main__":
    main()
