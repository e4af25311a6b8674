"""How busy decoding keeps the cores: JPEG files through CLIP's training crops, by one thread and by all.

    python -m benchmarks.decode [--images 400 --pixels 500 --repeats 3]

Pictures are smooth noise, which compresses about as photographs do. Printed for each number of threads: rows per
second, and CPU seconds by seconds, the cores that were busy; medians of runs in turns.
"""

import argparse
import pathlib
import statistics
import tempfile
import time

import numpy as np
import rich
import rich.table
from PIL import Image

from taskvec.data import lazy, preprocessing


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--pixels", type=int, default=500, help="of the longer side")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = [picture(pathlib.Path(folder) / f"{n}.jpg", n, args.pixels) for n in range(args.images)]
        images = lazy.Images(files.__getitem__, str, np.arange(len(files)), preprocessing.clip_train(224), draw=True)
        sides = {threads: images.replace(threads=threads) for threads in sorted({1, lazy.THREADS})}
        found = {threads: [] for threads in sides}
        for epoch in range(args.repeats + 1):
            for threads, side in sides.items():
                found[threads].append(timed(side, epoch))
    table = rich.table.Table("threads", "rows per second", "cores busy")
    for threads, runs in found.items():
        seconds, busy = (statistics.median(values) for values in zip(*runs[1:], strict=True))
        table.add_row(str(threads), f"{args.images / seconds:.0f}", f"{busy:.2f}")
    rich.print(table)


def picture(path: pathlib.Path, seed: int, pixels: int) -> pathlib.Path:
    """Writes one."""
    noise = np.random.default_rng(seed).integers(0, 256, (pixels // 10, pixels // 8, 3), np.uint8)
    Image.fromarray(noise).resize((pixels, pixels * 3 // 4), Image.Resampling.BICUBIC).save(path, quality=90)
    return path


def timed(images: lazy.Images, epoch: int) -> tuple[float, float]:
    """Seconds, and CPU seconds by them, of all rows in batches of 128."""
    start, before = time.perf_counter(), time.process_time()
    for at in range(0, len(images), 128):
        images.read(np.arange(at, min(at + 128, len(images))), epoch=epoch)
    seconds = time.perf_counter() - start
    return seconds, (time.process_time() - before) / seconds


if __name__ == "__main__":
    main()
