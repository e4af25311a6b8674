"""Golden configs: what each experiment resolves to is under version control.

After a change that is meant, write them anew with ``python -m tests.configs.test_configs``.
"""

import importlib
import json
import pathlib

import pytest

from configs import common

GOLDEN = pathlib.Path(__file__).parent / "golden"
NAMES = (
    "clip", "clip_small", "finetune_clip", "finetune_text", "glue", "learned", "llama_pair", "quickstart", "text4",
    "text8", "vision3", "vision5",
    *(f"adaptive.{name}" for name in (
        "adamerging", "adarank", "atlas", "atlas_few_shot", "atlas_negation", "atlas_ufm", "concrete", "divmerge",
        "fw_merging", "lorahub", "prodistill", "samerging", "self_positioning", "sens_merging", "supermerge", "surgery",
        "surgery_v2", "symerge",
    )),
)  # fmt: skip


def resolved(name: str) -> str:
    config = importlib.import_module(f"configs.{name}").get_config()
    return json.dumps(config.to_dict(), indent=1, sort_keys=True) + "\n"


def test_every_config_has_a_golden_file():
    root = pathlib.Path(common.__file__).parent
    files = {".".join(p.relative_to(root).with_suffix("").parts) for p in root.rglob("*.py") if p.stem != "__init__"}
    assert files - {"common"} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_config_is_as_recorded(name):
    assert resolved(name) == (GOLDEN / f"{name}.json").read_text(), "python -m tests.configs.test_configs, if meant"


def test_arguments_are_checked():
    module = importlib.import_module("configs.text4")
    assert module.get_config("seeds=5").seeds == (0, 1, 2, 3, 4)
    with pytest.raises(ValueError, match=r"unknown config argument 'seed'; allowed.*runlocal=False"):
        module.get_config("seed=5")
    with pytest.raises(ValueError, match="seeds='many' should be of type int"):
        module.get_config("seeds=many")


def test_a_mistyped_key_is_refused():
    config = importlib.import_module("configs.text4").get_config()
    config.lock()
    with pytest.raises((AttributeError, KeyError), match="learning_rate"):
        config.finetune.learning_rat = 1.0


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for each in NAMES:
        (GOLDEN / f"{each}.json").write_text(resolved(each))
