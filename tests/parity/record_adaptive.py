"""Records what FusionBench's adaptive methods do, step by step (fusion-bench 0.2.33, transformers 5); from the root:

    python -m tests.parity.record_adaptive

Its own loops run, in float64, on the tiny model of tests/adaptive/fusionbench_setting.py. Replaced are the data
sets, the zero-shot heads, which it would make from a downloaded text tower, and uniform draws of masks. Recorded
are learnables and losses of every step, float32, in tests/adaptive/recorded/fusionbench.npz.
"""

import argparse
import contextlib
import copy
import math
import pathlib
from unittest import mock

import lightning
import numpy as np
import torch
import transformers
from omegaconf import DictConfig
from transformers.models.clip import modeling_clip

# Surgery's wrapper imports this name, which it does not use and transformers 5 does not have.
vars(modeling_clip).setdefault("CLIPVisionTransformer", transformers.CLIPVisionModel)

from fusion_bench import BaseModelPool  # noqa: E402
from fusion_bench.method.adamerging.clip_layer_wise_adamerging import CLIPLayerWiseAdaMergingAlgorithm  # noqa: E402
from fusion_bench.method.adamerging.clip_task_wise_adamerging import CLIPTaskWiseAdaMergingAlgorithm  # noqa: E402
from fusion_bench.method.adamerging.entropy_loss import entropy_loss  # noqa: E402
from fusion_bench.method.concrete_subspace.clip_concrete_adamerging import (  # noqa: E402
    ConcreteLayerWiseAdaMergingForCLIP,
)
from fusion_bench.method.concrete_subspace.clip_concrete_task_arithmetic import (  # noqa: E402
    ConcreteTaskArithmeticAlgorithmForCLIP,
)
from fusion_bench.method.surgery import clip_layer_wise_adamerging_surgery as surgery  # noqa: E402
from fusion_bench.models.masks import MaskModel  # noqa: E402

from tests.adaptive import fusionbench_setting as setting  # noqa: E402

HERE = pathlib.Path(__file__).parent.parent / "adaptive" / "recorded"
COMMON = {
    "weights": None, "optimizer": "adam", "lr": setting.RATE, "init_values": 0.3, "clamp_weights": False,
    "tie_weights": True, "strict": False, "max_steps": setting.STEPS, "batch_size": setting.ROWS, "num_workers": 0,
}  # fmt: skip
MASKS = COMMON | {
    "scaling_factor": 0.3, "initial_logits": 0, "temperature": 0.5, "eval_mask_type": "continuous", "lr":
    setting.MASK_RATE, "mask_checkpoint": None, "skip_training": False, "save_interval": 10**6,
}  # fmt: skip


def model(expert: int | None = None) -> torch.nn.Module:
    """The tower in float64, with weights of the setting."""
    tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**setting.CONFIG)).eval()
    assert [name for name, _ in tower.named_parameters()] == list(setting.shapes())
    tower.load_state_dict({k: torch.from_numpy(x) for k, x in setting.weights(expert).items()}, strict=False)
    return tower.double()


class Pool(BaseModelPool):
    """Models in memory. They are copied: FusionBench turns the experts that it is given into task vectors."""

    def __init__(self):
        super().__init__({"_pretrained_": model(), **{name: model(i) for i, name in enumerate(setting.TASKS)}})

    def load_model(self, *args, **kwargs) -> torch.nn.Module:
        """A copy of one."""
        return copy.deepcopy(super().load_model(*args, **kwargs))


class Watched:
    """Data and heads of the setting for FusionBench's algorithms, and a record of their losses and coefficients."""

    def __init__(self, config: dict, **more):
        super().__init__(DictConfig(config | more))
        self.fabric = self._fabric = lightning.Fabric(accelerator="cpu", devices=1, precision="64-true")
        self.taken = dict.fromkeys(setting.TASKS, 0)
        self.losses, self.coefficients, self.module = [], [], None

    def log_hyperparams(self, *args, **kwargs) -> None:
        """Nothing: it needs a logger."""

    def setup_zero_shot_classification_head(self) -> None:
        """Heads of the setting."""
        out, inner = setting.projection().shape
        self.visual_projection = torch.nn.Linear(inner, out, bias=False).requires_grad_(False)
        self.visual_projection.weight.data = torch.from_numpy(setting.projection()).double()
        self.logit_scale_exp = torch.tensor(setting.SCALE)
        self.zeroshot_weights = {
            name: torch.from_numpy(setting.text(t)).double() for t, name in enumerate(setting.TASKS)
        }

    on_test_time_adaptation_start = setup_zero_shot_classification_head

    def get_shuffled_test_loader_iter(self, task: str):
        """The task's next batch."""
        number = self.taken[task]
        self.taken[task] += 1
        return iter([(torch.from_numpy(setting.images(setting.TASKS.index(task), number)).double(), None)])

    def compute_logits(self, module, batch, task: str) -> torch.Tensor:
        """Theirs; records."""
        if task == setting.TASKS[0]:
            self.module = module
            self.coefficients.append(module.merge_weight.detach().numpy().copy())
        logits = super().compute_logits(module, batch, task)
        self.losses.append(float(entropy_loss(logits.detach())))
        return logits

    def record(self, name: str) -> dict[str, np.ndarray]:
        """Runs; losses ``[rounds, T]`` before, coefficients ``[rounds + 1, T, ...]`` before and after every round."""
        merged = self.run(Pool())
        last = self.module.merge_weight.detach().numpy()
        return {
            f"{name}_losses": np.reshape(self.losses, (-1, len(setting.TASKS))),
            f"{name}_coefficients": np.stack([*self.coefficients, last]),
            f"{name}_merged": setting.probed({k: x.detach().numpy() for k, x in merged.named_parameters()}),
        }


class LayerWise(Watched, CLIPLayerWiseAdaMergingAlgorithm):
    pass


class TaskWise(Watched, CLIPTaskWiseAdaMergingAlgorithm):
    pass


class ConcreteTaskArithmetic(Watched, ConcreteTaskArithmeticAlgorithmForCLIP):
    pass


class ConcreteAdaMerging(Watched, ConcreteLayerWiseAdaMergingForCLIP):
    def setup_models(self) -> tuple:
        """Theirs; what coefficients are reset to is made float64 too."""
        models = super().setup_models()
        self.init_layer_wise_weight = self.init_layer_wise_weight.double()
        return models


@contextlib.contextmanager
def injected_draws(logits: list[np.ndarray]):
    """Masks are drawn from the setting's uniforms; their logits at every draw go to the list."""
    theirs = MaskModel.sample_mask

    def sample_mask(self, *args, **kwargs):
        named = dict(self.named_parameters())
        logits.append(setting.probed({k: x.detach().numpy() for k, x in named.items()}))
        values = setting.uniforms(len(logits) - 1)
        each = iter([torch.from_numpy(values[k]).double() for k in named])
        with mock.patch.object(torch, "rand", lambda *args, **kwargs: next(each)):
            return theirs(self, *args, **kwargs)

    with mock.patch.object(MaskModel, "sample_mask", sample_mask):
        yield


def record_concrete() -> dict[str, np.ndarray]:
    """Concrete task arithmetic and Concrete AdaMerging; logits of the masks before every step and after the last."""
    out = {}
    two_stages = {"base_lr": setting.INNER_RATE, "adamerging_lr": setting.RATE, "max_steps": setting.MASK_STEPS}
    two_stages["max_adamerging_steps"] = setting.STEPS - setting.MASK_STEPS
    runs = {"concrete_ta": ConcreteTaskArithmetic(MASKS), "concrete_ada": ConcreteAdaMerging(MASKS, **two_stages)}
    for name, algorithm in runs.items():
        logits = []
        with injected_draws(logits):
            out |= algorithm.record(name) | {f"{name}_logits": np.stack(logits)}
    del out["concrete_ta_coefficients"]  # fixed
    return out


class Adapters(surgery.SurgeryModelWrapper):
    """Theirs, from given first matrices; keeps what they are before every step."""

    def __init__(self, *args, **kwargs):
        self.kept = {name: [] for name in setting.TASKS}
        super().__init__(*args, **kwargs)

    def of(self, name: str, part: str) -> torch.Tensor:
        """One matrix of a task."""
        return getattr(self, f"feature_mapping_to_head_{part}_proj_{name}").weight

    def add_surgery_module(self, dataset_name: str) -> None:
        """Theirs, but for the draw."""
        super().add_surgery_module(dataset_name)
        at = setting.TASKS.index(dataset_name)
        self.of(dataset_name, "down").data = torch.from_numpy(setting.down()[at]).double()

    def keep(self, name: str) -> None:
        """Remembers the matrices of a task."""
        self.kept[name].append([self.of(name, part).detach().numpy().copy() for part in ("down", "up")])

    def compute_surgery_features(self, compute_features_fn, dataset_name: str) -> tuple:
        """Theirs; keeps."""
        self.keep(dataset_name)
        return super().compute_surgery_features(compute_features_fn, dataset_name)


class Surgery(Watched, surgery.CLIPLayerWiseAdaMergingSurgeryAlgorithm):
    pass


def record_surgery() -> dict[str, np.ndarray]:
    """Surgery on task arithmetic of 0.3, which is AdaMerging before its first step."""
    losses, theirs = [], torch.nn.functional.l1_loss

    def l1_loss(*args):
        losses.append(theirs(*args))
        return losses[-1]

    more = {"max_steps": 0, "surgery_steps": setting.STEPS, "eval_iterations": 10**6}
    swap = mock.patch.object(surgery, "SurgeryModelWrapper", Adapters)
    with swap, mock.patch.object(torch.nn.functional, "l1_loss", l1_loss):
        adapters = Surgery(COMMON, **more).run(Pool())["surgery"].module
    for name in setting.TASKS:
        adapters.keep(name)
    down, up = (np.stack([[each[i] for each in adapters.kept[n]] for n in setting.TASKS], 1) for i in (0, 1))
    losses = np.reshape([float(x.detach()) for x in losses], (-1, len(setting.TASKS)))
    return {"surgery_losses": losses, "surgery_down": down, "surgery_up": up}


def record() -> dict[str, np.ndarray]:
    """All recorded arrays."""
    torch.set_num_threads(1)  # the tensors are tiny
    torch.set_default_dtype(torch.float64)  # or Fabric would round outputs to float32
    try:
        out = LayerWise(COMMON).record("layer_wise") | TaskWise(COMMON).record("task_wise")
        out |= record_concrete() | record_surgery()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(math.isfinite(x.sum()) for x in out.values())
    out = {name: x.astype(np.float32) for name, x in out.items()}
    return out | {"names": np.array(list(setting.shapes())), "checksum": np.array(setting.checksum())}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "fusionbench.npz")
    out = parser.parse_args().out
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out, **record())
