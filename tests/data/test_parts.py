"""The names that people give to the parts of a data set."""

from __future__ import annotations

import pytest

from attribution.data.parts import by_role, role_of


@pytest.mark.parametrize(
    ("role", "names"),
    [
        (
            "train",
            ["train", "Train", "TRAINING", "seg_train", "train_set", "trainset", "train-images"],
        ),
        ("validation", ["val", "Valid", "validation", "dev", "val2017", "my_dev", "valid_labels"]),
        ("test", ["test", "Testing", "seg_test", "test_data", "eval", "PublicTest"]),
        (
            None,
            ["cat", "trainer", "protest", "latest", "invalid", "devil", "retrieval", "", "images"],
        ),
    ],
)
def test_roles_of_names(role: str | None, names: list[str]) -> None:
    assert {name: role_of(name) for name in names} == dict.fromkeys(names, role)


def test_of_two_names_for_one_role_one_is_used() -> None:
    assert by_role(["train", "test", "eval"]) == {
        "train": "train", "test": "test", "validation": "eval",
    }  # fmt: skip
    assert by_role(["training", "dev", "eval"]) == {
        "train": "training", "validation": "dev", "test": "eval",
    }  # fmt: skip
    assert by_role(["train", "valid", "val"]) == {"train": "train", "validation": "valid"}
    assert by_role(["a", "b"]) == {}
