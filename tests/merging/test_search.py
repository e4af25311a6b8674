"""Searches: published grids, ties, failures, going on after an interruption, evolution, soups."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import taskvec as tv
from taskvec.merging import registry, search
from taskvec.merging.evolution import cma_es
from taskvec.transforms import run

BASE = {"w": jnp.zeros(4), "count": jnp.array([3])}
MODELS = [{"w": jnp.eye(4)[t], "count": jnp.array([t])} for t in range(3)]


def nearness(target):
    """The score of merged weights: larger the nearer they come to `target`."""
    return lambda params: -float(jnp.abs(params["w"] - jnp.asarray(target)).sum())


@pytest.mark.parametrize(
    ("name", "setting", "first", "last", "count"),
    [
        ("task_arithmetic", "scale", 0.0, 1.0, 21),
        ("tall_masks", "scale", 0.1, 1.0, 10),
        ("tall_masks_threshold", "threshold", 0.2, 0.6, 5),
        ("lines_ties", "scale", 0.1, 1.5, 15),
        ("lines_edit", "alpha", 0.0, 1.0, 11),
        ("tsv", "scale", 0.1, 3.0, 30),
        ("iso", "scale", 0.1, 3.0, 30),
        ("tsv_baselines", "scale", 0.033333, 1.0, 30),
        ("ties_nlp", "scale", 0.8, 2.5, 18),
        ("magmax", "scale", 0.05, 1.0, 20),
    ],
)
def test_published_grids(name, setting, first, last, count):
    values = search.GRIDS[name].values[setting]
    assert (values[0], values[-1], len(values)) == (first, last, count)
    assert all(round(v, 6) == v for v in values), "0.3, not 0.30000000000000004"


def test_grid_finds_the_scale():
    seen = []
    target = 0.35 * jnp.array([1.0, 1, 1, 0])
    found = search.grid("task_arithmetic", BASE, MODELS, nearness(target), "task_arithmetic", on_trial=seen.append)
    assert found.settings == {"scale": 0.35} and math.isclose(found.score, 0.0, abs_tol=1e-6)
    assert found.trials == seen and len(seen) == 21


def test_grid_over_several_settings_and_fixed_ones():
    values = {"density": (0.5, 1.0), "scale": (0.5, 1.0)}
    found = search.grid("ties", BASE, MODELS, lambda p: float(p["w"].sum()), values, aggregate="sum")
    assert len(found.trials) == 4 and found.settings == {"density": 0.5, "scale": 1.0}  # a tie over the density


@pytest.mark.parametrize("values", [(0.1, 0.5, 1.0), (1.0, 0.5, 0.1)])
@pytest.mark.parametrize("score", [0.0, 1.0, -2.0])
def test_ties_go_to_the_smallest_coefficient(values, score):
    """Also where the metric is zero throughout, at which the released searches return nothing."""
    found = search.grid("task_arithmetic", BASE, MODELS, lambda p: score, {"scale": values})
    assert found.settings == {"scale": 0.1} and found.score == score


def test_scores_that_are_not_numbers_are_never_chosen():
    evaluate = lambda params: math.nan if params["w"][0] > 0.7 else -float(params["w"][0])
    found = search.grid("task_arithmetic", BASE, MODELS, evaluate, {"scale": (0.5, 1.0)})
    assert found.settings == {"scale": 0.5} and math.isnan(found.trials[1].score)
    with pytest.raises(ValueError, match="none of 2 trials has a finite score"):
        search.grid("task_arithmetic", BASE, MODELS, lambda p: math.inf, {"scale": (0.5, 1.0)})


def test_patience():
    found = search.grid("task_arithmetic", BASE, MODELS, nearness([0.2, 0.2, 0.2, 0]), "iso")
    assert found.settings == {"scale": 0.2} and len(found.trials) == 5  # two that improve, three that do not


def test_going_on_from_a_file():
    """Earlier trials, as JSON, are not run again; new ones are reported."""
    evaluated, values = [], {"weights": ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0)), "scale": (0.5, 1.0)}

    def evaluate(params):
        evaluated.append(params)
        return {"a": params["w"][0], "b": params["w"][1]}

    full = search.grid("task_arithmetic", BASE, MODELS, evaluate, values)
    lines = [json.dumps(trial._asdict()) for trial in full.trials[:3]]
    seen = []
    again = search.grid(
        "task_arithmetic",
        BASE,
        MODELS,
        evaluate,
        values,
        earlier=[json.loads(line) for line in lines],
        on_trial=seen.append,
    )
    assert again == full and len(evaluated) == 5 and seen == full.trials[3:]
    assert full.trials[1].scores == {"a": 1.0, "b": 0.0}


def test_one_program_for_all_numbers():
    """Scales, weights and thresholds are arguments of the compiled program; a second search compiles nothing."""
    block = lambda value: {"blocks": {"w": jnp.full((3, 2), value)}}
    pretrained, finetuned = block(0.0), [block(1.0), block(2.0), block(-1.0)]
    for method, values in (
        ("task_arithmetic", {"scale": (0.1, 0.2, 0.3), "weights": ((1.0, 2.0, 3.0), (1.0, 1.0, 0.5))}),
        ("consensus_ta", {"threshold": (0.2, 0.3, 0.4), "at_least": (1, 2)}),
        ("tall_masks", {"threshold": ((0.2, 0.3, 0.4), (0.5, 0.5, 0.5))}),
        ("lines_edit", {"alpha": (0.1, 0.2)}),
        ("layer_swapping", {"weight": (0.1, 0.2)}),
    ):
        models = finetuned[:2] if method == "layer_swapping" else finetuned
        first = {name: each[:1] for name, each in values.items()}
        search.grid(method, pretrained, models, lambda result: 0.0, first)
        programs = run.applied._cache_size(), run.measured._cache_size()
        search.grid(method, pretrained, models, lambda result: 0.0, values)
        assert (run.applied._cache_size(), run.measured._cache_size()) == programs, method


def test_normalised_score():
    """The ratio to the fine-tuned model first, then the mean: a weak task counts as much as a strong one."""
    evaluate = lambda params: {"easy": 0.9 * params["w"][0], "hard": 0.2 * params["w"][1]}
    weights = {"weights": ((1.0, 0.0, 0.0), (0.0, 1.1, 0.0))}
    by_mean = search.grid("task_arithmetic", BASE, MODELS, evaluate, weights, scale=1.0)
    score = search.normalised({"easy": 0.9, "hard": 0.2})
    by_ratio = search.grid("task_arithmetic", BASE, MODELS, evaluate, weights, scale=1.0, score=score)
    assert by_mean.settings["weights"][0] == 1.0 and by_ratio.settings["weights"][1] == 1.1
    assert math.isclose(by_ratio.score, 0.55, rel_tol=1e-6)


def test_negation():
    """The lowest target at which the control task keeps 95 %; scale 0 always does."""
    evaluate = lambda params: {"target": 0.8 + params["w"][0], "ImageNet": 0.6 - 0.1 * params["w"][0] ** 2}
    score = search.negation("ImageNet", 0.6)
    found = search.grid("task_negation", BASE, MODELS[:1], evaluate, "task_arithmetic", score=score)
    assert found.settings == {"scale": 0.5} and math.isclose(found.score, -0.3, rel_tol=1e-5)


def test_trade_off():
    score = search.trade_off("own", 0.9, {"a": 0.5, "b": 0.6})
    assert math.isclose(score({"own": 0.9, "a": 0.25, "b": 0.6}), 2.0 + 0.75)


def test_thresholds_of_every_task():
    """Each task takes its own best threshold, the smallest in a tie; the result can be merged with."""
    wanted = {"a": 0.5, "b": 0.2, "c": 0.3}
    calls = []

    def evaluate(result):
        threshold = (0.2, 0.3, 0.4, 0.5, 0.6)[len(calls)]
        calls.append(result.params(0))
        return {task: -max(abs(threshold - best), 0.15 if task == "c" else 0.0) for task, best in wanted.items()}

    found = search.per_task("tall_masks", BASE, MODELS, evaluate)
    assert found.settings == {"threshold": (0.5, 0.2, 0.2)} and len(found.trials) == 5
    assert math.isclose(found.score, (0 + 0 - 0.15) / 3)
    assert tv.merge("tall_masks", BASE, MODELS, **found.settings).num_tasks == 3
    with pytest.raises(ValueError, match="one score for each of the 3 tasks"):
        search.per_task("tall_masks", BASE, MODELS, lambda result: {"a": 1.0})
    with pytest.raises(ValueError, match="per_task chooses one setting"):
        search.per_task("tall_masks", BASE, MODELS, evaluate, "mergelm_ties")


def test_evolution_finds_the_weights_of_every_task():
    """A quadratic score with its top inside the box in two tasks and outside in the third."""
    target = np.array([0.9, 1.2, 1.6, 0.0])
    score = lambda params: -float(((np.asarray(params["w"]) - target) ** 2).sum())
    found = search.evolve("task_arithmetic", BASE, MODELS, score, "pcb_vision", scale=1.0)
    assert len(found.trials) == 100 and found.trials[0].settings == {"weights": (1.0, 1.0, 1.0)}
    assert all(0.8 <= w <= 1.3 for trial in found.trials for w in trial.settings["weights"])
    np.testing.assert_allclose(found.settings["weights"], [0.9, 1.2, 1.3], atol=0.02)
    again = search.evolve("task_arithmetic", BASE, MODELS, score, "pcb_vision", scale=1.0, earlier=found.trials[:40])
    assert again == found


def test_evolution_of_pcb():
    box = search.Box(0.8, 1.3, 1.0, 6)
    found = search.evolve("pcb", BASE, MODELS[:2], lambda params: float(params["w"].sum()), box, density=0.5)
    assert len(found.trials) == 6 and found.score == max(trial.score for trial in found.trials)
    assert len({trial.score for trial in found.trials}) == 6


@pytest.mark.parametrize("n", [1, 2, 5, 20])
def test_strategy_on_a_tilted_bowl(n):
    rng = np.random.default_rng(n)
    turn, top = np.linalg.qr(rng.standard_normal((n, n)))[0], rng.uniform(-0.4, 0.4, n)
    scales = np.logspace(0, 1, n)
    value = lambda x: -float((scales * (turn @ (x - top)) ** 2).sum())
    points = cma_es(np.full(n, 0.7), np.full(n, -1.0), np.full(n, 1.0), 0.25, seed=3)
    start, point = next(points), next(points)
    best = value(start)
    for _ in range(200 * n):
        best = max(best, value(point))
        point = points.send(value(point))
    assert best > 1e-6 * value(start)


def test_greedy_soup():
    """Best first; what does not help strictly is left out; the running mean; integers of the best model."""
    models = [{"w": jnp.array([x, 0.0]), "count": jnp.array([i])} for i, x in enumerate([4.0, 1.0, 9.0, 1.0, -1.5])]
    evaluate = lambda params: -abs(float(params["w"][0]) - 2.0)
    soup = search.greedy_soup(models, evaluate)
    # From the best: 1 (score -1); the other 1 is no better; 4 makes 2.5; -1.5 makes 1.17, 9 makes 4.67: worse.
    assert soup.ingredients == (1, 0) and soup.score == -0.5
    np.testing.assert_allclose(soup.params["w"], [2.5, 0.0])
    assert soup.params["count"].tolist() == [1]
    tried = [trial.settings["ingredients"] for trial in soup.trials]
    assert tried == [(0,), (1,), (2,), (3,), (4,), (1, 3), (1, 0), (1, 0, 4), (1, 0, 2)]


def test_greedy_soup_of_three_is_their_mean():
    rng = np.random.default_rng(0)
    models = [{"w": jnp.asarray(rng.standard_normal(5), jnp.bfloat16)} for _ in range(3)]
    mean = np.mean([np.asarray(m["w"], np.float32) for m in models], 0)
    evaluate = lambda params: -float(np.abs(np.asarray(params["w"], np.float32) - mean).sum())
    soup = search.greedy_soup([lambda m=m: m for m in models], evaluate)
    assert sorted(soup.ingredients) == [0, 1, 2] and soup.params["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(soup.params["w"], jnp.asarray(mean, jnp.bfloat16))


def test_greedy_soup_goes_on_and_survives_broken_models():
    loads = []

    def load(i):
        loads.append(i)
        return {"w": jnp.full(2, float(i))}

    evaluate = lambda params: math.nan if params["w"][0] == 0 else -float(params["w"][0])
    models = [lambda i=i: load(i) for i in range(3)]
    soup = search.greedy_soup(models, evaluate)
    assert soup.ingredients[0] == 1
    loads.clear()
    assert search.greedy_soup(models, evaluate, earlier=soup.trials)[1:3] == soup[1:3]
    assert sorted(loads) == [0, 1, 2]  # each once, to average; none to evaluate
    with pytest.raises(ValueError, match="none of 3 models has a finite score"):
        search.greedy_soup(models, lambda params: math.nan)


def test_searches_have_cards_but_no_chain():
    found = registry.searches()
    assert set(found) == {"greedy_soup", "pcb_search"} and not found.keys() & tv.methods().keys()
    assert {each.card.data for each in found.values()} == {"few labelled"}
    assert found["pcb_search"].defaults == {"box": "pcb_vision", "setting": "weights", "sigma": 0.25, "seed": 0}
    for name in found:
        with pytest.raises(ValueError, match=f"{name} needs the scores of models on held-out data: call"):
            tv.merge(name, BASE, MODELS)


def test_wrong_searches():
    with pytest.raises(ValueError, match=r"unknown protocol 'ta'; there are: .*task_arithmetic"):
        search.grid("task_arithmetic", BASE, MODELS, nearness(0), "ta")
    with pytest.raises(ValueError, match="every setting of a grid needs values"):
        search.grid("task_arithmetic", BASE, MODELS, nearness(0), {"scale": ()})
    with pytest.raises(ValueError, match="no setting 'scales'"):
        search.grid("task_arithmetic", BASE, MODELS, nearness(0), {"scales": (1.0,)})
    with pytest.raises(ValueError, match="unknown protocol 'pcb'; there are: pcb_nlp, pcb_vision"):
        search.evolve("pcb", BASE, MODELS, nearness(0), "pcb")
    with pytest.raises(ValueError, match="low <= start <= high"):
        search.evolve("pcb", BASE, MODELS, nearness(0), search.Box(0.0, 1.0, 2.0, 5))
    with pytest.raises(ValueError, match="a soup needs at least one model"):
        search.greedy_soup([], nearness(0))
    with pytest.raises(ValueError, match=r"model 1 is not a fine-tuned copy .* differs in shape w"):
        search.greedy_soup([{"w": jnp.ones(2)}, {"w": jnp.ones(3)}], lambda params: 1.0)


def test_searches_do_not_change_their_inputs():
    before = jax.tree.map(np.array, MODELS)
    search.greedy_soup(MODELS, nearness([1.0, 1, 1, 0]))
    search.grid("task_arithmetic", BASE, MODELS, nearness(0), "tall_masks")
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(MODELS), strict=True))
