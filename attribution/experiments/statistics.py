"""Statistics of the comparison and the evaluation: intervals, tests, power, detection, LDS."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.optimize import brentq
from sklearn.metrics import average_precision_score, roc_auc_score

from attribution.runtime.npy_blocks import row_blocks

CONFIDENCE = 0.95
MOST_SEEDS = 10**6


@dataclass(frozen=True)
class Estimate:
    """A mean with its two-sided 95 % interval and the p-value of the hypothesis that it is zero."""

    mean: float
    ci_low: float
    ci_high: float
    p: float

    def columns(self, name: str, suffix: str = "") -> dict[str, float]:
        """The mean, under the name and suffix, and the ends of its interval, as a table's columns."""
        ends = {f"{name}_ci_low": self.ci_low, f"{name}_ci_high": self.ci_high}
        return {f"{name}{suffix}": self.mean, **ends}

    def contrast(self) -> dict[str, float]:
        """The same as columns of contrasts.csv."""
        ends = {"ci_low": self.ci_low, "ci_high": self.ci_high, "p": self.p}
        return {"difference": self.mean, **ends}


def mean_estimate(
    values: np.ndarray, step: float = 0.0, within: tuple[float, float] = (-np.inf, np.inf)
) -> Estimate:
    """Student's t interval and test of the mean of (n_seeds,) values, n_seeds at least 2.

    Student's t is undefined if the values have no spread. Equal values are then taken for rounded
    ones: their standard deviation is that of rounding to multiples of `step`, step / sqrt(12) (JCGM
    100:2008, "Guide to the expression of uncertainty in measurement", F.2.2.1), and p is 1 if they
    are zero, else that of the sign-flip test, 2^(1 - n_seeds).

    Args:
        step: what one test image changes a value by; 0 gives equal values an interval of no width.
        within: the least and the largest value there can be; the interval is cut off there.

    Raises:
        ValueError: fewer than two values, or one that is not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2 or not np.isfinite(values).all():
        raise ValueError("an interval needs at least two finite values")
    mean, spread = float(values.mean()), float(values.std(ddof=1))
    is_equal = spread <= 1e-12 * max(1.0, abs(mean))
    standard_error = (step / np.sqrt(12) if is_equal else spread) / np.sqrt(len(values))
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * standard_error
    low, high = max(mean - half, within[0]), min(mean + half, within[1])
    if is_equal:
        p = 1.0 if abs(mean) <= 1e-12 else 2.0 ** (1 - len(values))
    else:
        p = 2 * stats.t.sf(abs(mean) / standard_error, len(values) - 1)
    return Estimate(mean, float(low), float(high), float(p))


def bootstrap_interval(values: np.ndarray, draws: int = 9999) -> tuple[float, float]:
    """Bias-corrected and accelerated 95 % bootstrap interval of the mean (Efron 1987), by scipy.

    For few values the plain interval is too narrow: for ten normal values it holds the mean 89 times
    in 100. Its level is therefore raised (Hesterberg 2015, "What Teachers Should Know About the
    Bootstrap"): each tail is the normal tail beyond sqrt(n / (n - 1)) times Student's t quantile.

    Args:
        values: (n_seeds,); without spread the interval has no width.
    """
    values = np.asarray(values, dtype=np.float64)
    if np.ptp(values) <= 1e-12 * max(1.0, abs(values[0])):
        return float(values.mean()), float(values.mean())
    n = len(values)
    wide = np.sqrt(n / (n - 1)) * stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)
    level = 1 - 2 * max(stats.norm.sf(wide), 1 / draws)  # no quantile lies beyond the last draw
    found = stats.bootstrap(
        (values,), np.mean, confidence_level=level, n_resamples=draws, rng=0
    ).confidence_interval
    return float(found.low), float(found.high)


def power(effect: float, n_seeds: int, alpha: float = 0.05) -> float:
    """Chance that a two-sided paired t test detects a mean difference of `effect` standard deviations.

    The square of Student's t has an F distribution, whose noncentrality is n effect^2. scipy's is
    wrong at zero and fails for huge ones, where the chance no longer changes.
    """
    noncentrality = np.clip(n_seeds * effect**2, 1e-30, 1e8)
    bound = stats.f.isf(alpha, 1, n_seeds - 1)
    return float(stats.ncf.sf(bound, 1, n_seeds - 1, noncentrality))


def detectable_effect(
    spread: float, n_seeds: int, at_power: float = 0.8, alpha: float = 0.05
) -> float:
    """The smallest mean difference that a two-sided paired t test detects with this power.

    Args:
        spread: standard deviation of the paired difference over seeds.
    """
    size = brentq(lambda x: power(x, n_seeds, alpha) - at_power, 0, 1e4 / np.sqrt(n_seeds))
    return spread * float(size)


def seeds_needed(effect: float, spread: float, at_power: float = 0.8, alpha: float = 0.05) -> int:
    """How many paired seeds a two-sided t test needs to detect a mean difference with this power.

    Args:
        effect: the difference; its sign does not matter.
        spread: standard deviation of the paired difference over seeds.

    Raises:
        ValueError: an effect of zero, or so small that more than MOST_SEEDS would be needed.
    """
    if effect == 0 or not np.isfinite([effect, spread]).all():
        raise ValueError("the effect must be a finite number other than 0")
    if spread == 0:
        return 2
    size = abs(effect) / spread
    if power(size, MOST_SEEDS, alpha) < at_power:
        raise ValueError(f"an effect of {effect:.3g} would need more than {MOST_SEEDS} seeds")
    counts = range(2, MOST_SEEDS + 1)  # power rises with the number of seeds
    return counts[bisect_left(counts, at_power, key=lambda n: power(size, n, alpha))]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: keeps the family-wise error rate (Holm 1979)."""
    p = np.asarray(p_values, dtype=np.float64)
    order, adjusted = np.argsort(p, kind="stable"), np.empty_like(p)
    steps = p[order] * np.arange(len(p), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted.tolist()


def detection_metrics(is_flipped: np.ndarray, rankings: dict[str, np.ndarray]) -> dict[str, float]:
    """How well rankings find flipped labels: AUROC and recall in the first 10 %.

    Args:
        is_flipped: (n_train,) bool; if all or none are flipped, the result is empty.
        rankings: name to (n_train,) values, low = suspect.
    """
    return {
        f"flips_{figure}_{name}": value
        for name, values in rankings.items()
        for figure, value in detection(is_flipped, values, draws=0).items()
        if figure in ("auroc", "recall_10pct")
    }


def detection(is_flipped: np.ndarray, values: np.ndarray, draws: int = 200) -> dict[str, float]:
    """AUROC (with a 95 % bootstrap interval), average precision, recall in the first 10 and 20 %.

    Args:
        is_flipped: (n,) bool; if all or none are flipped, the result is empty.
        values: (n,), low = suspect.
        draws: of the bootstrap over examples; 0 leaves out the interval.
    """
    if is_flipped.all() or not is_flipped.any():
        return {}
    found = {"auroc": float(roc_auc_score(is_flipped, -values))}
    if draws:
        drawn = [
            roc_auc_score(is_flipped[rows], -values[rows]) for rows in _with_both(is_flipped, draws)
        ]
        low, high = percentile_interval(drawn)
        found |= {"auroc_ci_low": float(low), "auroc_ci_high": float(high)}
    found["average_precision"] = float(average_precision_score(is_flipped, -values))
    order = np.argsort(values, kind="stable")
    for percent in (10, 20):
        first = order[: max(1, round(percent / 100 * len(order)))]
        found[f"recall_{percent}pct"] = float(is_flipped[first].sum() / is_flipped.sum())
    return found


def _with_both(is_flipped: np.ndarray, draws: int) -> Iterator[np.ndarray]:
    """Bootstrap draws of rows; flipped and other examples are drawn separately."""
    rng = np.random.default_rng(0)
    sides = np.flatnonzero(is_flipped), np.flatnonzero(~is_flipped)
    for _ in range(draws):
        yield np.concatenate([rng.choice(side, len(side)) for side in sides])


def lds(values: np.ndarray, masks: np.ndarray, margins: np.ndarray) -> np.ndarray:
    """Linear datamodeling score of each target, (m,), from -1 to 1; NaN if its margins are constant.

    Spearman's correlation, over subsets, of the measured margin with the predicted one: the sum of
    the scores of the subset's examples (Park et al. 2023, definition 2.4).

    Args:
        values: (n, m) scores, positive = helpful.
        masks: (S, n) bool, the subsets.
        margins: (S, m) margins of models retrained on the subsets.
    """
    return spearman(predicted_margins(values, masks), margins)


def predicted_margins(values: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Sum of the scores of each subset's examples, (S, m), computed by blocks of rows."""
    predicted, start = np.zeros((len(masks), values.shape[1])), 0
    for block in row_blocks(values):
        held = masks[:, start : start + len(block)]
        predicted += held.astype(block.dtype) @ block
        start += len(block)
    return predicted


def resampled(rows: int, columns: int, draws: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Indices of bootstrap draws of a matrix: both rows and columns are drawn."""
    rng = np.random.default_rng(0)
    for _ in range(draws):
        yield np.ix_(rng.integers(rows, size=rows), rng.integers(columns, size=columns))


def percentile_interval(drawn: Sequence) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the 95 % interval of bootstrap draws, along their first axis; NaN draws do not count."""
    low, high = np.nanquantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return low, high


def noise_ceiling(margins: np.ndarray) -> np.ndarray:
    """The LDS of a perfect method that knows each subset's expected margin, (m,), at least 0.

    The mean of R repeats correlates with its expectation by the square root of its reliability, which
    the Spearman-Brown formula gives from the correlation between single repeats. With few subsets the
    mean over targets is a little low (in simulation, for ceilings of .5 to .8: by .02 to .04 with 50
    subsets and 2 repeats, by at most .01 with 100 and 3). For targets that nothing moves it overestimates:
    about .2 instead of 0.

    Args:
        margins: (S, R, m), R at least 2.
    """
    repeats = margins.shape[1]
    pairs = [(a, b) for a in range(repeats) for b in range(a)]
    single = np.mean([spearman(margins[:, a], margins[:, b]) for a, b in pairs], axis=0)
    reliability = repeats * single / (1 + (repeats - 1) * single)
    return np.sqrt(np.maximum(reliability, 0))


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rank correlation of each column of two (S, m) matrices, (m,).

    scipy's spearmanr correlates every column with every other.
    """
    ranks = [stats.rankdata(x, axis=0) for x in (a, b)]
    a, b = (r - r.mean(axis=0) for r in ranks)
    with np.errstate(invalid="ignore"):
        return (a * b).sum(0) / np.sqrt((a**2).sum(0) * (b**2).sum(0))
