"""The words for a difference."""

from __future__ import annotations

import pandas as pd
import pytest

from attribution.experiments.verdicts import verdict

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("low", "high", "p_holm", "words"),
    [
        (0.0, 0.1, 0.01, "indistinguishable from random"),
        (-0.1, 0.0, 0.01, "indistinguishable from random"),
        (0.01, 0.1, 0.06, "not significant after Holm"),
        (-0.1, -0.01, 0.06, "not significant after Holm"),
        (0.01, 0.1, 0.04, "better than random"),
        (-0.1, -0.01, 0.04, "worse than random"),
    ],
)
def test_a_verdict_needs_the_interval_and_the_adjusted_p_value(low, high, p_holm, words) -> None:
    versus = {"ci_low": low, "ci_high": high, "p_holm": p_holm}
    row = {f"accuracy_vs_random_{name}": value for name, value in versus.items()}
    assert verdict(pd.Series(row | {"arm": "harmful", "n_removed": 5}), "accuracy") == words
