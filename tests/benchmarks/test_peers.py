"""The methods of `benchmarks peers` on a toy: shape, sign, agreement with ours, and failures as rows."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from toy import toy_config, toy_data

from attribution.data.splits import TARGETS
from attribution.gradients.per_sample import capture
from attribution.models.checkpoints import train_checkpoints
from attribution.models.classifier import load
from benchmarks import peer_methods, peers
from benchmarks.peer_methods import METHODS, Problem

PACKAGES = ("dattri", "captum", "kronfluence")
TRAIN = 192
SCORERS = [name for name in METHODS if name != "random"]


def require(method: str) -> None:
    package = method.split("-")[0]
    if package in PACKAGES:
        pytest.importorskip(package)


@pytest.fixture(scope="module")
def problem(tmp_path_factory) -> Problem:
    folder = tmp_path_factory.mktemp("peers")
    data = toy_data(folder / "data", n_train=TRAIN, n_other=8)
    # traker cannot score with k up to its block of 100, nor can it and dattri with k above n.
    config = toy_config(preset="digits", num_models=2, proj_dim=104)
    (folder / "checkpoints").mkdir()
    masks = np.ones((2, TRAIN), dtype=bool)
    trained = train_checkpoints(config, data, masks, folder / "checkpoints")
    return Problem(config, data, [c.folder for c in trained], folder, batch=64)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCORERS)
def test_scores_are_finite_and_positive_for_the_same_class(
    name: str, problem: Problem, tmp_path: Path
) -> None:
    require(name)
    scores = METHODS[name].scores(dataclasses.replace(problem, work=tmp_path))
    assert scores.values.shape == (TRAIN, 8)
    assert np.isfinite(scores.values).all()
    train, target = (problem.data.labels(split) for split in ("train", TARGETS))
    same = train[:, None] == target
    assert scores.values[same].mean() > scores.values[~same].mean()
    if scores.self_influence:
        assert scores.self_influence().shape == (TRAIN,)


@pytest.mark.slow
def test_dattri_and_traker_rank_as_our_exact_gradients_do(problem: Problem, tmp_path: Path) -> None:
    pytest.importorskip("dattri")
    config = dataclasses.replace(problem.config, proj_dim=4096)
    wide = dataclasses.replace(problem, config=config, checkpoints=problem.checkpoints[:1])
    ridge = peer_methods.mean_eigenvalue(wide)
    # With a ridge far above the eigenvalues, scores are dot products of gradients.
    many = 1e6 * ridge
    model = load(wide.checkpoints[0])
    train, targets = (gradients(model, *wide.tensors(s)) for s in ("train", TARGETS))
    p = capture(model, *wide.tensors("train")).margins.sigmoid()
    exact = ((train @ targets.T) * (1 - p)[:, None]).numpy()
    for name, method in (
        ("dattri", partial(peer_methods.dattri, ridge=many)),
        ("traker", partial(peer_methods.traker, ridge=many * 4096)),
    ):
        found = method(dataclasses.replace(wide, work=tmp_path / name)).values
        ranks = [spearmanr(found[:, j], exact[:, j])[0] for j in range(found.shape[1])]
        assert np.mean(ranks) > 0.9, name


def gradients(model, images, labels) -> torch.Tensor:
    each = capture(model, images, labels).per_sample()
    return torch.cat([g.flatten(1) for g in each.values()], dim=1)


@pytest.mark.slow
def test_the_ridge_of_the_peers_is_ours_in_their_units(problem: Problem) -> None:
    from trak.projectors import BasicProjector

    model = load(problem.checkpoints[0])
    exact, k = gradients(model, *problem.tensors("train")), problem.config.proj_dim
    projector = BasicProjector(exact.shape[1], k, 0, "normal", "cpu")
    features = projector.project(exact, 0) / exact.shape[1] ** 0.5  # as traker's engine does
    wanted = problem.config.lambda_reg * float(features.square().sum()) / k
    assert k * peer_methods.mean_eigenvalue(problem) == pytest.approx(wanted, rel=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.features])
def test_the_part_that_is_timed_runs_twice(name: str, problem: Problem, tmp_path: Path) -> None:
    require(name)
    run = METHODS[name].features(dataclasses.replace(problem, work=tmp_path))
    assert (run() or 0.0) >= 0.0
    run()


@pytest.mark.slow
def test_a_peer_that_is_missing_or_dies_is_named_and_the_others_go_on() -> None:
    options = argparse.Namespace(repeats=2, limit=120, threads=0)
    tasks = {"missing": (importlib.import_module, ("no_such_peer",)), "killed": (os._exit, (9,))}
    outcomes = peers.in_turn(tasks, options)
    assert outcomes["missing"].error == "ModuleNotFoundError: No module named 'no_such_peer'"
    assert outcomes["killed"].error == "its process died (out of memory?)"
    row = peers._cost(outcomes["missing"], 10, note="of the method")
    assert row == {"note": f"did not run: {outcomes['missing'].error}"}


def test_a_peer_that_takes_too_long_is_ended() -> None:
    assert "not done within" in peers.in_child(time.sleep, (60,), limit=0.0, threads=0).error


def test_cost_is_for_a_thousand_examples_and_counts_what_is_fixed_once() -> None:
    outcome = peers.Outcome(seconds=[12.0], fixed=10.0)
    assert peers._cost(outcome, 20, note="")["s_per_1000"] == pytest.approx(10 + 2 * 50)


def test_bootstrap_covers_the_mean_and_leaves_out_targets_without_a_value() -> None:
    mean, low, high = peers.bootstrap(np.array([0.1, 0.2, 0.3, np.nan]))
    assert mean == pytest.approx(0.2) and 0.1 <= low < mean < high <= 0.3


def test_the_speed_problem_is_a_resnet_18_on_images_of_that_size(tmp_path: Path) -> None:
    problem = peers.synthetic(tmp_path, 32, n=2, k=64)
    images, labels = problem.tensors("train")
    assert images.shape == (2, 3, 32, 32) and labels.shape == (2,)
    assert sum(p.numel() for p in load(problem.checkpoints[0]).parameters()) > 11_000_000
