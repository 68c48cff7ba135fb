"""Labels that a person has corrected, in place of the data set's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from attribution.config import Config, nearest
from attribution.data.splits import check_trained_classes
from attribution.errors import InputError


def relabelled(examples: pd.DataFrame, names: list[str], config: Config) -> pd.DataFrame:
    """The examples with the labels of training examples that parameter `labels` gives; they count as true.

    Raises:
        InputError: the file cannot be read, names an example or a class that does not exist, or leaves a
            class without training examples.
    """
    shown = f"labels={config.labels}"
    try:
        table = pd.read_csv(Path(config.labels).expanduser(), dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{shown}: cannot be read ({error})") from None
    key = "example_id" if "example_id" in table else "file_name"
    if not {key, "label"} <= set(table):
        raise InputError(f"{shown}: needs the columns example_id (or file_name) and label")
    table = table.drop_duplicates(key, keep="last")
    is_train = examples["split"] == "train"
    train = examples.loc[is_train, key]
    unknown = sorted(set(table[key]) - set(train))
    if unknown:
        raise InputError(f"{shown}: {unknown[0][:60]!r} is no {key} of this training set")
    wrong = sorted(set(table["label"]) - set(names))
    if wrong:
        raise InputError(f"{shown}: no such class {wrong[0]!r}; {nearest(wrong[0], names)}")
    new = train.map(dict(zip(table[key], table["label"]))).dropna()
    examples = examples.copy()
    labels = new.map({name: label for label, name in enumerate(names)}).astype(np.int64)
    for column in ("label", "true_label"):
        examples.loc[new.index, column] = labels
    examples.loc[new.index, "label_name"] = new
    examples.loc[new.index, "is_flipped"] = False
    check_trained_classes(examples["label"][is_train], names, shown)
    return examples
