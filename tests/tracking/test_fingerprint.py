"""A stage's fingerprint: which parameters it depends on where that is not said by their group."""

from __future__ import annotations

from pathlib import Path

from toy import toy_config, toy_data

from attribution.models.train import training_key
from attribution.tracking.fingerprint import fingerprint


def test_epochs_with_a_checkpoint_change_the_ensemble_and_not_what_arms_are_retrained_under(
    tmp_path: Path,
) -> None:
    data, plain = toy_data(tmp_path), toy_config()
    wanted = toy_config(checkpoint_epochs="last:2")
    assert fingerprint("finetune", wanted, data) != fingerprint("finetune", plain, data)
    assert training_key(wanted, data) == training_key(plain, data)


def test_a_replay_has_fingerprints_of_its_own(tmp_path: Path) -> None:
    data, plain, again = toy_data(tmp_path), toy_config(), toy_config(replay="r1")
    for stage in ("finetune", "trak", "ablation"):
        assert fingerprint(stage, again, data) != fingerprint(stage, plain, data)
