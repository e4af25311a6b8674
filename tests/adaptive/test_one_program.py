"""Methods that run for one task after the other compile for the first one alone."""

import gc
import weakref

import jax
import numpy as np
import pytest

from taskvec import vectors
from taskvec.adaptive import registry, rows as rows_lib
from taskvec.adaptive.learn import heads_of
from tests.adaptive import toy_mlp

SETTINGS = {
    "atlas_few_shot": {"budget": 1, "epochs": 2, "batch_size": 4, "least_batches": 1, "keep": "best"},
    "atlas_ufm": {"epochs": 1, "batch_size": 4},
    "lorahub": {"budget": 12},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_tasks_in_turn_share_their_programs(name, caplog):
    """Tasks of 4, 2 and 3 classes and 9, 8 and 30 rows; lorahub takes all rows at once, so that it gets 8 of each."""
    theta0, tau, kernels, rows = toy_mlp.setting()
    whole = toy_mlp.problem(theta0, tau, kernels)
    whole = whole._replace(apply_fn=lambda *given: toy_mlp.apply_fn(*given))  # of which nothing is compiled yet
    if name == "lorahub":
        rows = rows_lib.chosen(rows, [np.arange(8)] * 3)
    compiled, held = [], []
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for t in range(3):
            others = vectors.take(whole.tau, [s for s in range(3) if s != t])
            problem = whole._replace(tau=others, heads=heads_of(whole.heads, [t]))
            held += [weakref.ref(x) for x in jax.tree.leaves(others)]
            more = {"validation": rows.only([t])} if name == "atlas_few_shot" else {}
            caplog.clear()
            found = registry.get(name)(problem, rows.only([t]), **SETTINGS[name], **more)
            compiled.append(sum(record.message.startswith("Compiling") for record in caplog.records))
            assert len(found.history["loss"]) > 0
    assert compiled[0] > 1 and compiled[1:] == [0, 0]
    del others, problem, found
    gc.collect()
    assert not any(x() is not None for x in held)  # programs are kept, task vectors are not
