"""Is one method better than another, or is it noise? Paired differences over test rows, tasks and seeds."""

from collections.abc import Sequence

import numpy as np

Correct = Sequence[Sequence[np.ndarray]]  # seeds -> tasks -> bool [N]


def paired_difference(worse: Correct, better: Correct) -> tuple[float, float]:
    """Mean accuracy of `better` minus that of `worse`, and its standard error.

    The mean is over seeds of the mean over tasks, as in tables. Two things vary: test rows, which are the same in all
    seeds, and the seeds (training rows, batches). With ``d_{s,t,i}`` in {-1, 0, 1} the difference on row i of task t
    under seed s, D_s the mean over tasks of the mean over rows, S seeds and T tasks,

        SE^2 = sum_t var_i(mean_s d_{s,t,i}) / N_t / T^2  +  var_s(D_s) / S,

    the first term for the choice of rows, the second, with S > 1, for the choice of seeds (it holds some row noise
    too, so that the error is rather too large than too small).

    Args:
      worse, better: for every seed and task the correctness of each test row, in the same order of rows.
    """
    d = [
        [b.astype(np.float64) - w.astype(np.float64) for b, w in zip(*pair, strict=True)]
        for pair in zip(better, worse, strict=True)
    ]
    seeds, tasks = len(d), len(d[0])
    of_seed = np.array([np.mean([x.mean() for x in per_task]) for per_task in d])
    rows = [np.mean([d[s][t] for s in range(seeds)], axis=0) for t in range(tasks)]
    of_rows = sum(x.var(ddof=1) / len(x) for x in rows) / tasks**2
    of_seeds = of_seed.var(ddof=1) / seeds if seeds > 1 else 0.0
    return float(of_seed.mean()), float(np.sqrt(of_rows + of_seeds))
