"""A stage's fingerprint: what it hashes for runs of earlier versions too."""

from __future__ import annotations

from pathlib import Path

from toy import toy_config, toy_data

from attribution.models.train import training_key
from attribution.runtime.hashing import digest
from attribution.tracking.fingerprint import ESTIMATOR_VERSION, fingerprint


def test_epochs_are_part_of_it_only_where_they_are_wanted(tmp_path: Path) -> None:
    data, plain = toy_data(tmp_path), toy_config(num_models=3, subset_fraction=0.5)
    wanted = toy_config(num_models=3, subset_fraction=0.5, checkpoint_epochs="last:2")
    key, known = training_key(plain, data), {"num_models": 3, "subset_fraction": 0.5}
    assert fingerprint("finetune", plain, data) == digest("finetune", key, known)
    assert fingerprint("finetune", wanted, data) != digest("finetune", key, known)
    assert training_key(wanted, data) == key  # what arms are retrained under


def test_cross_fitting_is_part_of_it_only_where_it_is_done(tmp_path: Path) -> None:
    data, config = toy_data(tmp_path), toy_config()
    known = config.group("trak")
    del known["cross_fit"]
    old = digest("trak", ESTIMATOR_VERSION, fingerprint("finetune", config, data), known)
    for value, is_old in (("auto", True), ("no", True), ("yes", False)):
        assert (fingerprint("trak", toy_config(cross_fit=value), data) == old) is is_old
