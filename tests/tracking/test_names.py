"""Texts of any kind become names that MLflow accepts."""

from __future__ import annotations

import re

from hypothesis import given, settings
from hypothesis import strategies as st


@settings(deadline=None)
@given(st.one_of(st.text(max_size=400), st.sampled_from(["..", "../x", ".", "a//b", "a/", "/a"])))
def test_a_class_of_any_name_can_be_counted_in_mlflow(name: str) -> None:
    from mlflow.utils.validation import _validate_metric_name

    from attribution.tracking.names import metric_name

    _validate_metric_name(metric_name(f"removed/{name}"))
    if len(name) < 200 and re.fullmatch(r"[\w-]+( [\w-]+)*", name):
        assert metric_name(f"removed/{name}") == f"removed/{name}"


def test_classes_whose_names_mlflow_would_write_alike_are_counted_apart() -> None:
    from attribution.tracking.names import metric_name

    names = ["a?", "a*", "a_", "a/../b", "b", "a//b", "a/b", "c" * 300, "c" * 299 + "d"]
    found = [metric_name(f"removed/{name}") for name in names]
    assert len(set(found)) == len(names)
    assert [metric_name(name) for name in found] == found  # as in every other arm
