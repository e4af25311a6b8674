"""A small vision transformer in CLIP's format, trained from nothing: a start for fine-tuning without a download.

It learns to tell the classes of some data sets apart, all in one softmax, by scaled cosines with a learned head, on
images that are shifted by a few pixels. The head is thrown away. The folder is kept in the cache under a digest of all
that it depends on.
"""

import hashlib
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from taskvec import models, tree as trees
from taskvec.adaptive import objectives
from taskvec.adaptive.fit import Loop, fit
from taskvec.data import batches, suites, wheels
from taskvec.data.base import Split
from taskvec.io.atomic import published
from taskvec.io.progress import bar, say
from taskvec.models import clip
from taskvec.training import heads
from taskvec.tree import Tree


def folder(config: Any) -> pathlib.Path:
    """The model of ``config.pretrain``: from the cache, or trained now.

    Args:
      config: with ``suite`` (source and image size) and ``pretrain``: ``tasks``, ``vision`` (fields of CLIP's
        ``config.json``), ``train`` (rows of a task at most), ``steps``, ``batch_size``, ``learning_rate``,
        ``weight_decay``, ``shift`` (pixels), ``seed``.
    """
    settings, suite = config.pretrain.to_dict(), config.suite.to_dict()
    tasks = suites.load_suite({**suite, "tasks": settings["tasks"], "train": None, "held_out": 0, "test": None})
    images, labels, classes = [], [], 0
    for task in tasks:
        images.append(task.train.inputs["image"][: settings["train"]])
        labels.append(task.train.labels[: settings["train"]] + classes)
        classes += len(task.classes)
    rows = Split({"image": np.concatenate(images)}, np.concatenate(labels))
    digest = hashlib.sha256(json.dumps([settings, suite["image_size"], jax.__version__], sort_keys=True).encode())
    digest.update(rows.inputs["image"].tobytes() + rows.labels.tobytes() + pathlib.Path(__file__).read_bytes())
    place = wheels.cache() / "pretrained" / digest.hexdigest()[:20]
    if (place / "config.json").is_file():
        say(f"pretrained model on {', '.join(settings['tasks'])}: from the cache")
        return place
    fields = {"model_type": "clip_vision_model", "image_size": suite["image_size"], **settings["vision"]}
    model = clip.make(clip.from_json(fields))
    params = train(model, rows, classes, settings)
    with published(place) as partial:
        models.save(partial, model, params)
    return place


def train(model: models.Model, rows: Split, classes: int, settings: dict[str, Any]) -> Tree:
    """Trains a model on rows with labels ``0..classes-1``; settings as in `folder`."""
    steps, key = settings["steps"], jax.random.key(settings["seed"])
    head = jax.random.normal(key, (model.feature_dim, classes)) * model.feature_dim**-0.5
    learnables = {"model": initial(model, key), "head": head}

    def loss_fn(learnables, frozen, batch, key):
        kernel = learnables["head"] * jax.lax.rsqrt(jnp.square(learnables["head"]).sum(0) + 1e-12)
        features = model.apply(learnables["model"], shifted(batch, settings["shift"], key))["features"]
        logits = heads.logits(kernel, jnp.ones(classes, bool), 20.0, features)
        return objectives.cross_entropy(logits, batch["label"]), {
            "accuracy": (logits.argmax(-1) == batch["label"]).mean()
        }

    schedule = optax.warmup_cosine_decay_schedule(0.0, settings["learning_rate"], steps // 10, steps)
    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=settings["weight_decay"])
    )
    make = batches.training_batches(rows, settings["batch_size"], steps, settings["seed"])
    with bar(f"pretraining on {len(rows.labels)} images of {classes} classes", steps) as update:
        report = lambda step, metrics: update(
            step, f"loss {metrics['loss'][-1]:.2f}, accuracy {metrics['accuracy'].mean():.0%}"
        )
        found = fit(loss_fn, learnables, optimiser, make, steps, seed=settings["seed"], loop=Loop(on_chunk=report))
    return found.learnables["model"]


def initial(model: models.Model, key: jax.Array) -> Tree:
    """Random params: kernels and embeddings normal with deviation 0.02, scales one, biases zero."""

    def leaf(path: str, spec: jax.ShapeDtypeStruct) -> jax.Array:
        name = path.rpartition("/")[2]
        if name in ("scale", "bias"):
            return jnp.full(spec.shape, float(name == "scale"), spec.dtype)
        number = int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "little")
        return 0.02 * jax.random.normal(jax.random.fold_in(key, number), spec.shape, spec.dtype)

    return trees.map_with_path(leaf, model.abstract)


def shifted(batch: dict[str, jax.Array], pixels: int, key: jax.Array) -> dict[str, jax.Array]:
    """The images of a batch, each moved by up to `pixels` in both directions, with its edge repeated."""
    image = batch["image"]
    padded = jnp.pad(image, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)), mode="edge")
    corner = jax.random.randint(key, (len(image), 2), 0, 2 * pixels + 1)
    cut = lambda x, at: jax.lax.dynamic_slice(x, (at[0], at[1], 0), image.shape[1:])
    return batch | {"image": jax.vmap(cut)(padded, corner)}
