"""Seeds that are derived from one root."""

from __future__ import annotations

from attribution.runtime.hashing import derive_seed


def test_derived_seeds_are_distinct_over_many_paths_and_roots() -> None:
    seeds = [
        derive_seed(root, name, i)
        for root in range(4)
        for name in ("retrain", "checkpoint", "subset", "weights", "order")
        for i in range(100)
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_a_derived_seed_stays_the_same_from_run_to_run() -> None:
    assert derive_seed(0, "retrain", 3) == 1102325635
