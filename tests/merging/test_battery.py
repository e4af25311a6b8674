"""The battery over every registered method."""

import pytest

import taskvec as tv
from tests.merging import battery


# Method by method: the checks of a method share compiled programs.
@pytest.mark.parametrize("check", battery.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", sorted(tv.methods()))
def test_battery(check, name):
    check(tv.methods()[name])


@pytest.mark.parametrize("name", sorted(tv.methods()))
def test_streamed_equals_in_memory(name, tmp_path):
    battery.streamed_equals_in_memory(tv.methods()[name], tmp_path)
