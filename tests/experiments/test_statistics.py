"""Statistics, each compared with another way to compute it."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.integrate import quad
from sklearn.metrics import average_precision_score, roc_auc_score

from attribution.experiments.statistics import (
    bootstrap_interval,
    detectable_effect,
    detection,
    detection_metrics,
    holm,
    lds,
    mean_estimate,
    noise_ceiling,
    power,
    predicted_margins,
    resampled,
    seeds_needed,
)


@pytest.mark.parametrize("n", [2, 3, 10, 50])
def test_a_mean_has_the_interval_and_p_value_of_scipys_t_test(n: int) -> None:
    values = np.random.default_rng(n).normal(0.3, 1, n)
    estimate = mean_estimate(values)
    reference = stats.ttest_1samp(values, 0)
    interval = reference.confidence_interval(0.95)
    np.testing.assert_allclose(
        [estimate.mean, estimate.ci_low, estimate.ci_high, estimate.p],
        [values.mean(), interval.low, interval.high, reference.pvalue],
        rtol=1e-9,
    )


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20))
def test_the_mean_lies_in_the_middle_of_its_interval_and_p_is_a_probability(values) -> None:
    e = mean_estimate(np.array(values))
    assert e.ci_low <= e.mean <= e.ci_high and 0 <= e.p <= 1
    assert e.ci_high - e.mean == pytest.approx(e.mean - e.ci_low, rel=1e-6, abs=1e-6)


@given(st.lists(st.integers(-1000, 1000).map(lambda i: i / 100), min_size=3, max_size=20))
def test_zero_is_outside_the_interval_exactly_where_p_is_below_five_percent(values) -> None:
    e = mean_estimate(np.array(values))
    if len(set(values)) > 1 and abs(e.p - 0.05) > 1e-6:
        assert (e.p < 0.05) == (e.ci_low > 0 or e.ci_high < 0)


def test_the_interval_covers_the_truth_in_95_percent_of_samples() -> None:
    samples = np.random.default_rng(0).normal(0.7, 2, (4000, 5))
    covered = np.mean([e.ci_low <= 0.7 <= e.ci_high for e in map(mean_estimate, samples)])
    assert abs(covered - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 4000)


def test_without_an_effect_p_is_below_five_percent_in_five_percent_of_samples() -> None:
    samples = np.random.default_rng(1).normal(0, 2, (4000, 5))
    rejected = np.mean([mean_estimate(sample).p < 0.05 for sample in samples])
    assert abs(rejected - 0.05) < 4 * np.sqrt(0.95 * 0.05 / 4000)


@pytest.mark.parametrize("n", [2, 5, 10])
def test_equal_values_other_than_zero_get_the_p_value_of_the_sign_flip_test(n: int) -> None:
    e = mean_estimate(np.full(n, 0.1))
    flips = np.array(list(product([-1, 1], repeat=n))) @ np.full(n, 0.1) / n
    assert e.ci_low == e.mean == e.ci_high == pytest.approx(0.1)
    assert e.p == pytest.approx(np.mean(np.abs(flips) >= 0.1 - 1e-9))


def test_equal_values_have_the_interval_of_values_rounded_to_one_image() -> None:
    step, n = 1 / 17, 4
    rounding = stats.uniform(
        -step / 2, step
    ).std()  # of an error that is anything up to half a step
    half = stats.t.ppf(0.975, n - 1) * rounding / np.sqrt(n)
    e = mean_estimate(np.full(n, -step), step)
    assert (e.ci_low, e.ci_high) == pytest.approx((-step - half, -step + half))
    assert e.p == 2 ** (1 - n)


@given(
    st.lists(st.integers(0, 20), min_size=2, max_size=8),
    st.lists(st.integers(0, 20), min_size=8, max_size=8),
)
def test_the_interval_of_a_share_lies_where_shares_can_be_and_holds_the_mean(right, other) -> None:
    share, control = np.array(right) / 20, np.array(other[: len(right)]) / 20
    e = mean_estimate(share, 1 / 20, (0, 1))
    assert 0 <= e.ci_low <= e.mean + 1e-12 and e.mean - 1e-12 <= e.ci_high <= 1 and 0 < e.p <= 1
    d = mean_estimate(share - control, 1 / 20, (-1, 1))
    assert -1 <= d.ci_low <= d.mean + 1e-12 and d.mean - 1e-12 <= d.ci_high <= 1
    assert d.ci_low < d.ci_high and 0 < d.p <= 1


def test_values_that_are_all_zero_give_p_one() -> None:
    e = mean_estimate(np.zeros(5))
    assert (e.mean, e.ci_low, e.ci_high, e.p) == (0, 0, 0, 1)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, np.nan], [1.0, np.inf]])
def test_too_few_or_not_finite_values_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="at least two finite values"):
        mean_estimate(np.array(values))


def test_a_paired_difference_is_scipys_related_samples_test() -> None:
    rng = np.random.default_rng(0)
    seed_effect = rng.normal(0, 5, 12)
    treated, control = seed_effect + rng.normal(0.5, 1, 12), seed_effect + rng.normal(0, 1, 12)
    e = mean_estimate(treated - control)
    reference = stats.ttest_rel(treated, control)
    interval = reference.confidence_interval(0.95)
    np.testing.assert_allclose(
        [e.ci_low, e.ci_high, e.p], [interval.low, interval.high, reference.pvalue]
    )


def test_pairing_the_wrong_seeds_keeps_the_mean_and_widens_the_interval() -> None:
    rng = np.random.default_rng(0)
    control = rng.normal(0, 5, 12)
    treated = control + rng.normal(0.5, 0.1, 12)
    paired = mean_estimate(treated - control)
    mixed = mean_estimate(np.roll(treated, 1) - control)
    assert paired.mean == pytest.approx(mixed.mean)
    assert mixed.ci_high - mixed.ci_low > 10 * (paired.ci_high - paired.ci_low)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=9))
def test_swapping_treated_and_control_mirrors_the_interval(pairs) -> None:
    a, b = np.array(pairs).T
    there, back = mean_estimate(a - b), mean_estimate(b - a)
    np.testing.assert_allclose(
        [there.mean, there.ci_low, there.ci_high, there.p],
        [-back.mean, -back.ci_high, -back.ci_low, back.p],
    )


def test_holm_gives_the_textbook_values() -> None:
    # Sorted: .01 * 4, .03 * 3, then max with what came before; .005 * 5 comes first.
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005, 0.5]), [0.04, 0.09, 0.09, 0.025, 0.5])


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_the_step_down_done_by_hand(p_values) -> None:
    expected, running = [0.0] * len(p_values), 0.0
    for step, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        running = max(running, min(1.0, (len(p_values) - step) * p_values[i]))
        expected[i] = running
    np.testing.assert_allclose(holm(p_values), expected, atol=1e-12)


def test_holm_of_nothing_is_nothing() -> None:
    assert holm([]) == []


def planted(n: int = 100, n_flipped: int = 10) -> np.ndarray:
    return np.arange(n) < n_flipped


def test_a_ranking_that_puts_every_flip_first_is_perfect() -> None:
    metrics = detection_metrics(planted(), {"x": np.arange(100.0)})
    assert metrics == {"flips_auroc_x": 1.0, "flips_recall_10pct_x": 1.0}


def test_a_ranking_that_puts_every_flip_last_finds_nothing() -> None:
    metrics = detection_metrics(planted(), {"x": -np.arange(100.0)})
    assert metrics == {"flips_auroc_x": 0.0, "flips_recall_10pct_x": 0.0}


def test_a_ranking_without_information_has_an_auroc_of_one_half() -> None:
    assert detection_metrics(planted(), {"x": np.zeros(100)})["flips_auroc_x"] == 0.5


def test_auroc_is_the_share_of_pairs_in_the_right_order() -> None:
    rng = np.random.default_rng(0)
    flipped, values = rng.random(60) < 0.3, rng.integers(0, 10, 60).astype(float)
    pairs = [(a < b) + 0.5 * (a == b) for a in values[flipped] for b in values[~flipped]]
    found = detection_metrics(flipped, {"x": values})["flips_auroc_x"]
    assert found == pytest.approx(np.mean(pairs))


def test_recall_counts_the_flips_among_the_first_tenth() -> None:
    values = np.arange(100.0)
    values[[0, 1, 2]] = 1000  # three of ten flips are put last, so clean ones move up
    assert detection_metrics(planted(), {"x": values})["flips_recall_10pct_x"] == 0.7


def test_every_ranking_is_measured() -> None:
    metrics = detection_metrics(planted(), {"a": np.arange(100.0), "b": np.arange(100.0)})
    assert len(metrics) == 4


@pytest.mark.parametrize("n_flipped", [0, 100])
def test_without_flips_or_without_clean_examples_there_is_nothing_to_measure(n_flipped) -> None:
    assert detection_metrics(planted(100, n_flipped), {"x": np.arange(100.0)}) == {}


# Bootstrap


def test_a_bootstrap_interval_is_efrons_expanded_computed_step_by_step() -> None:
    values = np.random.default_rng(3).lognormal(0, 0.35, 15)
    means = np.random.default_rng(7).choice(values, (40_000, 15)).mean(axis=1)
    bias = stats.norm.ppf((means < values.mean()).mean())
    left_out = np.array([np.delete(values, i).mean() for i in range(15)])
    pull = left_out.mean() - left_out
    acceleration = (pull**3).sum() / (6 * (pull**2).sum() ** 1.5)
    expected = []
    wide = np.sqrt(15 / 14) * 2.14479  # Student's t table: 14 degrees of freedom, 97.5 %
    for z in (-wide, wide):
        shifted = bias + (bias + z) / (1 - acceleration * (bias + z))
        expected.append(np.quantile(means, stats.norm.cdf(shifted)))
    np.testing.assert_allclose(bootstrap_interval(values), expected, rtol=0.03)
    percentile = np.quantile(means, stats.norm.cdf([-wide, wide]))  # another interval, told apart
    assert abs(np.array(expected) / percentile - 1).max() > 0.06


def test_a_bootstrap_interval_is_the_same_every_time() -> None:
    values = np.random.default_rng(0).normal(size=8)
    assert bootstrap_interval(values) == bootstrap_interval(values)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-40, 40), min_size=2, max_size=12))
def test_a_bootstrap_interval_lies_around_the_mean_within_the_values(values) -> None:
    values = np.array(values) / 359
    low, high = bootstrap_interval(values, draws=999)
    assert values.min() - 1e-12 <= low <= high <= values.max() + 1e-12
    assert low - 1e-12 <= values.mean() <= high + 1e-12


@pytest.mark.parametrize("scale", [2**-9, 8])
def test_a_bootstrap_interval_has_the_unit_of_its_values(scale) -> None:
    values = np.random.default_rng(1).normal(0.3, 1, 9)
    np.testing.assert_allclose(
        bootstrap_interval(scale * values), scale * np.array(bootstrap_interval(values))
    )


@pytest.mark.parametrize("values", [[0.25] * 5, [0.0, 0.0], [0.1 + 0.2, 0.3, 0.3]])
def test_values_without_spread_have_a_bootstrap_interval_without_width(values) -> None:
    low, high = bootstrap_interval(np.array(values))
    assert low == high == pytest.approx(values[0])


# Power


def power_of(effect: float, n: int, alpha: float = 0.05) -> float:
    """Of a two-sided t test: a normal tail given the sample's spread, integrated over that spread."""
    critical, shift, df = stats.t.ppf(1 - alpha / 2, n - 1), effect * np.sqrt(n), n - 1

    def density(spread: float) -> float:
        tails = stats.norm.cdf(shift - critical * spread) + stats.norm.cdf(
            -shift - critical * spread
        )
        return stats.chi.pdf(spread * np.sqrt(df), df) * np.sqrt(df) * tails

    ends = np.clip(1 + np.array([-9, -3, 0, 3, 9]) / np.sqrt(2 * df), 0, None)
    return sum(quad(density, *pair, epsabs=1e-12)[0] for pair in pairwise(ends))


@pytest.mark.parametrize("effect", [0, 0.01, 0.1, 0.5, 0.8, 1.5, 4, 12, 60])
@pytest.mark.parametrize("n", [2, 3, 4, 5, 10, 30, 72, 120, 300, 1000])
def test_the_power_is_an_integral_over_the_spread(n: int, effect: float) -> None:
    assert power(effect, n) == power(-effect, n) == pytest.approx(power_of(effect, n), abs=1e-9)


@pytest.mark.parametrize("n", [2, 3, 5, 10, 20, 72, 73, 92, 100, 120])
def test_the_detectable_effect_has_its_power(n: int) -> None:
    effect = detectable_effect(1.0, n)
    assert power_of(effect, n) == pytest.approx(0.8, abs=1e-8)
    assert detectable_effect(0.003, n) == pytest.approx(0.003 * effect)


@pytest.mark.parametrize("asked", [0.5, 0.9])
@pytest.mark.parametrize("alpha", [0.01, 0.05])
def test_the_detectable_effect_is_that_of_the_power_and_level_asked_for(asked, alpha) -> None:
    found = power_of(detectable_effect(1.0, 12, asked, alpha), 12, alpha)
    assert found == pytest.approx(asked, abs=1e-8)


def test_the_detectable_effect_is_found_in_four_of_five_samples() -> None:
    effect = detectable_effect(2.0, 7)
    samples = np.random.default_rng(0).normal(effect, 2, (4000, 7))
    found = np.mean(stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.05)
    assert abs(found - 0.8) < 4 * np.sqrt(0.8 * 0.2 / 4000)


def test_without_spread_any_effect_is_detectable() -> None:
    assert detectable_effect(0.0, 10) == 0


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(st.floats(0.05, 4), st.sampled_from([0.5, 0.8, 0.9]))
def test_the_seeds_needed_are_the_first_number_that_has_the_power(size, asked) -> None:
    needed = seeds_needed(0.01 * size, 0.01, asked)
    assert power_of(size, needed) >= asked - 1e-8
    assert needed == 2 or power_of(size, needed - 1) < asked + 1e-8


@pytest.mark.parametrize("size", [5, 5.5, 6, 8, 11, 12, 1e3, 1e6])
def test_large_effects_need_two_or_three_seeds(size: float) -> None:
    assert seeds_needed(size, 1) == (2 if power_of(size, 2) >= 0.8 else 3)


@pytest.mark.parametrize("size", [1e-12, 1e-16])
def test_an_effect_that_is_rounding_noise_is_refused(size: float) -> None:
    with pytest.raises(ValueError, match="more than 1000000 seeds"):
        seeds_needed(size, 1)


@pytest.mark.parametrize("n", [3, 4, 7, 10, 31, 250, 3000])
def test_an_effect_that_is_just_detectable_needs_the_seeds_it_came_from(n: int) -> None:
    effect = detectable_effect(0.004, n)
    change = 0.1 / n  # of the effect: about a fifth of a seed
    for sign in (1, -1):
        assert seeds_needed(sign * effect * (1 + change), 0.004) == n
        assert seeds_needed(sign * effect * (1 - change), 0.004) == n + 1


def test_without_spread_two_seeds_are_enough() -> None:
    assert seeds_needed(0.01, 0.0) == 2


@pytest.mark.parametrize(
    ("effect", "spread"), [(0.0, 1.0), (np.nan, 1.0), (np.inf, 1.0), (1.0, np.nan), (0.0, 0.0)]
)
def test_an_effect_that_no_number_of_seeds_would_show_is_refused(effect, spread) -> None:
    with pytest.raises(ValueError, match="finite number other than 0"):
        seeds_needed(effect, spread)


def test_with_nothing_flipped_or_all_there_is_nothing_to_detect() -> None:
    for value in (True, False):
        assert detection(np.full(5, value), np.arange(5.0)) == {}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_seed_whose_figure_is_not_finite_is_an_error(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        mean_estimate(np.array([0.5, bad]))


@pytest.mark.parametrize("n", [2, 3, 10])
@pytest.mark.parametrize("odd", [0.0, 0.1])
def test_intervals_of_seeds_that_nearly_all_agree_are_finite_and_hold_the_mean(n, odd) -> None:
    values = np.full(n, 0.25)
    values[0] += odd
    low, high = bootstrap_interval(values, draws=999)
    found = mean_estimate(values)
    assert low <= values.mean() <= high and found.ci_low <= values.mean() <= found.ci_high
    assert 0 < found.p <= 1


# Judging scores by retrained subsets


def test_detection_is_scikit_learns_and_a_count() -> None:
    rng = np.random.default_rng(1)
    flipped, values = rng.random(200) < 0.1, rng.normal(size=200)
    found = detection(flipped, values)
    assert found["auroc"] == pytest.approx(roc_auc_score(flipped, -values))
    assert found["average_precision"] == pytest.approx(average_precision_score(flipped, -values))
    first = sorted(range(200), key=lambda i: values[i])[:40]
    assert found["recall_20pct"] == sum(flipped[i] for i in first) / flipped.sum()
    assert found["auroc_ci_low"] < found["auroc"] < found["auroc_ci_high"]


def test_predicted_margins_do_not_depend_on_the_size_of_a_block(monkeypatch) -> None:
    rng = np.random.default_rng(3)
    values, masks = rng.normal(size=(50, 7)), rng.random((9, 50)) < 0.5
    monkeypatch.setattr("attribution.runtime.npy_blocks.BLOCK_ROWS", 8)
    np.testing.assert_allclose(predicted_margins(values, masks), masks @ values, atol=1e-12)


def test_a_draw_takes_rows_and_columns_anew() -> None:
    matrix = np.arange(30).reshape(5, 6)
    drawn = [matrix[part] for part in resampled(5, 6, 200)]
    assert all(d.shape == (5, 6) for d in drawn)
    assert {len(np.unique(d[:, 0] // 6)) for d in drawn} >= {2, 3, 4}
    assert np.mean(drawn) == pytest.approx(matrix.mean(), abs=1)


def test_lds_is_spearmans_correlation_of_summed_scores_with_margins() -> None:
    rng = np.random.default_rng(0)
    values, masks = rng.normal(size=(30, 4)), rng.random((12, 30)) < 0.5
    actual = rng.normal(size=(12, 4)).round(1)  # with ties
    expected = [
        stats.spearmanr([values[mask, j].sum() for mask in masks], actual[:, j]).statistic
        for j in range(4)
    ]
    np.testing.assert_allclose(lds(values, masks, actual), expected, atol=1e-12)


def test_scores_that_generate_the_margins_have_an_lds_of_one() -> None:
    rng = np.random.default_rng(1)
    values, masks = rng.normal(size=(30, 4)), rng.random((12, 30)) < 0.5
    assert lds(values, masks, masks @ values).tolist() == [1, 1, 1, 1]
    assert lds(-values, masks, masks @ values).tolist() == [-1, -1, -1, -1]


def test_the_noise_ceiling_is_what_perfect_knowledge_reaches() -> None:
    rng = np.random.default_rng(2)
    truth = rng.normal(size=(400, 1, 20))
    measured = truth + rng.normal(size=(400, 3, 20))
    reached = [stats.spearmanr(truth[:, 0, j], measured.mean(1)[:, j]).statistic for j in range(20)]
    assert np.mean(noise_ceiling(measured)) == pytest.approx(np.mean(reached), abs=0.02)
    assert np.mean(noise_ceiling(rng.normal(size=(400, 3, 20)))) < 0.25
