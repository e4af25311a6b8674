"""Seconds of one fine-tuning step, ours and PyTorch's, taken in turns on the same machine.

    python -m benchmarks.finetune --peer PYTHON [--only clip_b32,minilm] [--repeats 9]
    python -m benchmarks.finetune --only clip_b32 --rows 128 --dtype bfloat16

PYTHON is that of an environment with torch and transformers; without it only ours and the floor are timed. A step is
forward and backward of the whole encoder under a frozen head, clipping and AdamW, on random rows, 32 unless ``--rows``
says otherwise: ``clip_b32`` is CLIP's ViT-B/32 image tower on images, ``minilm`` the MiniLM-L6 encoder on texts of 32
tokens. The floor is one product of two square matrices with as many multiplications as the step's dense layers. Both
compute in ``--dtype``, the weights are float32; PyTorch is always float32. Ours has its layers written out
(``config.compute.unroll`` of a fine-tuning run) and keeps freed memory, as such runs do. The second command is for an
accelerator, where the goal is 1.5 times the floor.
"""

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
import rich.table

from experiments import memory, pretrain
from taskvec import models, tree as trees
from taskvec.models import bert, clip

LENGTH, CLASSES = 32, 100
CLIP = {"model_type": "clip_vision_model"}  # the defaults are B/32's
MINILM = {
    "model_type": "bert", "vocab_size": 30522, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
    "intermediate_size": 1536, "max_position_embeddings": 512,
}  # fmt: skip
CASES = {"clip_b32": (CLIP, 50), "minilm": (MINILM, LENGTH)}  # config, tokens of a row

_PEER = """
import json, sys, time
import torch, transformers
fields, rows, length, classes = json.loads(sys.argv[1])
kind = fields.pop("model_type")
if kind == "bert":
    model = transformers.BertModel(transformers.BertConfig(**fields), add_pooling_layer=False)
    ids = torch.randint(0, fields["vocab_size"], (rows, length))
    batch = {"input_ids": ids, "attention_mask": torch.ones(rows, length)}
    pooled = lambda out: out.last_hidden_state.mean(1)
else:
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**fields))
    batch = {"pixel_values": torch.randn(rows, 3, 224, 224)}
    pooled = lambda out: out.pooler_output
model.train()
head = torch.randn(model.config.hidden_size, classes)
labels = torch.randint(0, classes, (rows,))
optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.1)
print(json.dumps({"torch": torch.__version__, "transformers": transformers.__version__}), flush=True)
for _ in sys.stdin:
    start = time.perf_counter()
    optimiser.zero_grad()
    loss = torch.nn.functional.cross_entropy(pooled(model(**batch)) @ head, labels)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    loss.item()
    print(time.perf_counter() - start, flush=True)
"""


def ours(fields: dict[str, Any], rows: int, length: int, dtype: Any) -> tuple[Callable[[], float], int]:
    """A function that takes one step and returns its seconds; and the number of weights in dense layers."""
    is_text = fields["model_type"] == "bert"
    model = bert.make(bert.Config.from_json(fields)) if is_text else clip.make(clip.from_json(fields))
    params, batch, head = (
        pretrain.initial(model, jax.random.key(0)),
        random_batch(fields, rows, length),
        random_head(model),
    )
    labels = jax.random.randint(jax.random.key(1), (rows,), 0, CLASSES)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-5, weight_decay=0.1))

    def loss_fn(params, batch, head):
        logits = model.apply(params, batch, dtype=dtype, unroll=fields.get("num_hidden_layers", 12))["features"] @ head
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(params, state, batch, head):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch, head)
        updates, state = optimiser.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    step, held = jax.jit(step, donate_argnums=(0, 1)), {"params": params, "state": optimiser.init(params)}

    def take() -> float:
        start = time.perf_counter()
        held["params"], held["state"], loss = step(held["params"], held["state"], batch, head)
        jax.block_until_ready((loss, held))
        return time.perf_counter() - start

    dense = sum(x.size for path, x in trees.flatten(params["blocks"]).items() if path.endswith("kernel"))
    return take, dense


def random_head(model: models.Model) -> jax.Array:
    """A frozen head ``[d, C]``."""
    return jax.random.normal(jax.random.key(0), (model.feature_dim, CLASSES))


def random_batch(fields: dict[str, Any], rows: int, length: int) -> dict[str, jax.Array]:
    """Random rows."""
    rng = np.random.default_rng(0)
    if fields["model_type"] == "bert":
        ids = jnp.asarray(rng.integers(0, fields["vocab_size"], (rows, length)), jnp.int32)
        return {"ids": ids, "mask": jnp.ones((rows, length), bool)}
    return {"image": jnp.asarray(rng.standard_normal((rows, 224, 224, 3)), jnp.float32)}


def floor(multiplications: int, dtype: Any) -> Callable[[], float]:
    """A function that multiplies two square matrices and returns the seconds of that many multiplications."""
    n = max(64, round(multiplications ** (1 / 3)) // 64 * 64)  # accelerators are slow with odd sizes
    a = jax.random.normal(jax.random.key(0), (n, n), dtype or jnp.float32)
    product = jax.jit(lambda a: a @ a)

    def take() -> float:
        start = time.perf_counter()
        jax.block_until_ready(product(a))
        return (time.perf_counter() - start) * multiplications / n**3

    return take


class Peer:
    """A process of PyTorch that takes a step whenever it is asked to."""

    def __init__(self, python: str, fields: dict[str, Any], rows: int, length: int):
        command = [python, "-c", _PEER, json.dumps([fields, rows, length, CLASSES])]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self.versions = json.loads(self._line())

    def __call__(self) -> float:
        print("step", file=self.process.stdin, flush=True)
        return float(self._line())

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()

    def _line(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the peer ended; its message stands above")
        return line


def compare(case: str, rows: int, python: str, repeats: int, dtype: Any) -> dict[str, Any]:
    """Medians of steps taken in turns."""
    fields, length = CASES[case]
    take, dense = ours(fields, rows, length, dtype)
    sides = {"taskvec": take, "floor": floor(3 * dense * rows * length, dtype)}
    peer = Peer(python, fields, rows, length) if python else None
    if peer:
        sides["peer"] = peer
    for side in sides.values():  # compilation, first touch
        side()
        side()
    found = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            found[name].append(side())
    if peer:
        peer.close()
    return {name: statistics.median(times) for name, times in found.items()} | (peer.versions if peer else {})


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", default="", help="a Python with torch and transformers")
    parser.add_argument("--only", default=",".join(CASES), help="cases, separated by commas")
    parser.add_argument("--rows", type=int, default=32, help="of a batch")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of ours and the floor")
    args = parser.parse_args()
    memory.keep_freed()
    table = rich.table.Table("step", "torch s", "taskvec s", "taskvec / torch", "floor s", "taskvec / floor")
    for case in args.only.split(","):
        dtype = None if args.dtype == "float32" else jnp.bfloat16
        found = compare(case, args.rows, args.peer, args.repeats, dtype)
        table.add_row(case, *_cells(found))
    rich.print(table)


def _cells(found: dict[str, Any]) -> list[str]:
    ours, peer, least = found["taskvec"], found.get("peer"), found["floor"]
    theirs = [f"{peer:.3f}", f"{ours:.3f}", f"{ours / peer:.2f}"] if peer else ["", f"{ours:.3f}", ""]
    return [*theirs, f"{least:.3f}", f"{ours / least:.2f}"]


if __name__ == "__main__":
    main()
