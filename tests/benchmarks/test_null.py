"""Scores without meaning show no effect."""

from __future__ import annotations

import argparse

import pytest

from benchmarks import null


@pytest.mark.slow
def test_scores_without_meaning_show_no_effect() -> None:
    student, bootstrap, family = null.run(argparse.Namespace(experiments=10, num_seeds=8))
    assert student["n"] == bootstrap["n"] == 40 and family["n"] == 10
    for intervals in (student, bootstrap):
        assert intervals["ci_low"] < 0.95 < intervals["ci_high"] + 0.03
    assert family["ci_low"] <= 0.05
