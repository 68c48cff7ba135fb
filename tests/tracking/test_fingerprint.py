"""A stage's fingerprint: what it hashes for runs of earlier versions too."""

from __future__ import annotations

from pathlib import Path

from toy import toy_config, toy_data

from attribution.models.train import training_key
from attribution.runtime.hashing import digest
from attribution.tracking.fingerprint import fingerprint


def test_epochs_are_part_of_it_only_where_they_are_wanted(tmp_path: Path) -> None:
    data, plain = toy_data(tmp_path), toy_config(num_models=3, subset_fraction=0.5)
    wanted = toy_config(num_models=3, subset_fraction=0.5, checkpoint_epochs="last:2")
    key, known = training_key(plain, data), {"num_models": 3, "subset_fraction": 0.5}
    assert fingerprint("finetune", plain, data) == digest("finetune", key, known)
    assert fingerprint("finetune", wanted, data) != digest("finetune", key, known)
    assert training_key(wanted, data) == key  # what arms are retrained under
