"""Paired differences: the formula, and the error against the spread of simulated repetitions."""

import numpy as np

from taskvec.evaluation.statistics import paired_difference


def test_one_seed_is_the_textbook_paired_error():
    rng = np.random.default_rng(0)
    a, b = ([rng.random(n) < p for n in (40, 70)] for p in (0.6, 0.7))
    d = [y.astype(float) - x.astype(float) for x, y in zip(a, b, strict=True)]
    mean, error = paired_difference([a], [b])
    assert np.isclose(mean, (d[0].mean() + d[1].mean()) / 2)
    assert np.isclose(error, np.sqrt(d[0].var(ddof=1) / 40 + d[1].var(ddof=1) / 70) / 2)


def test_a_method_against_itself():
    correct = [[np.array([True, False, True])]] * 3
    assert paired_difference(correct, correct) == (0.0, 0.0)


def test_the_error_is_that_of_repetitions():
    """Items and seeds both matter; the mean estimated error must be at, or a little above, the true spread."""
    rng, found = np.random.default_rng(1), []
    for _ in range(400):
        hard, seeds = [rng.normal(size=60) for _ in range(2)], rng.normal(0, 0.3, 4)
        noise = lambda: rng.normal(0, 0.5, 60)
        worse = [[h + noise() < 0.3 for h in hard] for _ in seeds]
        better = [[h + noise() + s < 0.5 for h in hard] for s in seeds]
        found.append(paired_difference(worse, better))
    means, errors = np.array(found).T
    true = means.std()
    assert 0.95 * true < np.sqrt(np.mean(errors**2)) < 1.35 * true, (true, np.sqrt(np.mean(errors**2)))
