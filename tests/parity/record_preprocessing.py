"""Records CLIP's evaluation preprocessing by the reference implementations, on small pictures.

Needs transformers, torchvision and pillow; run once, from the root of the repository:

    python tests/parity/record_preprocessing.py

Pictures are smooth random ones, so that a resize at a wrong place shows; sizes have odd and even margins. Results are
stored as pixels before mean and deviation.
"""

import pathlib

import numpy as np
from PIL import Image

SIZES = {"wide": (53, 37), "tall": (30, 61), "small": (11, 17), "same": (24, 24), "long": (24, 29)}  # width, height
TARGET = 24


def picture(name: str) -> np.ndarray:
    """uint8 ``[h, w, 3]``."""
    rng = np.random.default_rng(len(name) + SIZES[name][0])
    coarse = rng.integers(0, 256, (7, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize(SIZES[name], Image.Resampling.BILINEAR))


def main() -> None:
    """Writes ``tests/data/recorded/preprocessing.npz``."""
    from torchvision import transforms
    from transformers import CLIPImageProcessorPil

    edge = {"height": TARGET, "width": TARGET}
    processor = CLIPImageProcessorPil(size={"shortest_edge": TARGET}, crop_size=edge)
    bicubic = transforms.InterpolationMode.BICUBIC
    openai = transforms.Compose([transforms.Resize(TARGET, interpolation=bicubic), transforms.CenterCrop(TARGET)])
    out = {}
    for name in SIZES:
        x = picture(name)
        made = np.asarray(processor(Image.fromarray(x))["pixel_values"][0]).transpose(1, 2, 0)
        pixels = (made * np.array(processor.image_std) + np.array(processor.image_mean)) * 255
        out[f"{name}_input"], out[f"{name}_transformers"] = x, pixels.astype(np.float32)
        out[f"{name}_torchvision"] = np.asarray(openai(Image.fromarray(x)))
    folder = pathlib.Path(__file__).parent.parent / "data" / "recorded"
    folder.mkdir(exist_ok=True)
    np.savez_compressed(folder / "preprocessing.npz", **out)


if __name__ == "__main__":
    main()
