"""Tables as programs and spreadsheets write them."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from image_folders import LABELS, NAMES, fails, labels_of

WRITTEN = {
    "ids without suffix": ("train.csv", {"id": NAMES, "breed": LABELS}, ","),
    "names, semicolons": ("labels.csv", {"file": [f"{n}.png" for n in NAMES], "class": LABELS}, ";"),
    "paths": ("l.tsv", {"path": [f"images/{n}.png" for n in NAMES], "label": LABELS}, "\t"),
    "windows paths": ("l.csv", {"file": [f"images\\{n}.png" for n in NAMES], "label": LABELS}, ","),
    "more columns": (
        "meta.csv", {"file_name": [f"{n}.png" for n in NAMES], "width": range(12), "label": LABELS}, ",",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRITTEN)
def test_a_table_beside_the_images_gives_their_labels(load, folder, kind) -> None:
    name, columns, delimiter = WRITTEN[kind]
    pd.DataFrame(columns).to_csv(folder / name, sep=delimiter, index=False, encoding="utf-8-sig")
    loaded = load(folder)
    assert loaded.class_names == ("cat", "dog", "emu")
    assert labels_of(loaded) == dict(zip(NAMES, LABELS))


def test_other_kinds_of_tables(load, folder, tmp_path) -> None:
    expected = dict(zip(NAMES, LABELS))
    files = [f"images/{name}.png" for name in NAMES]
    written = {
        "list.txt": "".join(f"{file} {label}\n" for file, label in zip(files, LABELS)),
        "labels.json": json.dumps(dict(zip(files, LABELS))),
        "metadata.jsonl": "".join(
            json.dumps({"file_name": file, "label": label}) + "\n"
            for file, label in zip(files, LABELS)
        ),
    }
    for name, text in written.items():
        (folder / name).write_text(text)
        assert labels_of(load(folder)) == expected
        (folder / name).unlink()
    pd.DataFrame({"file_name": files, "label": LABELS}).to_parquet(folder / "labels.parquet")
    assert labels_of(load(folder)) == expected


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-8-sig"])
def test_tables_as_spreadsheets_write_them(load, folder, capsys, encoding) -> None:
    labels = [name.replace("cat", "Bär").replace("dog", "Bör") for name in LABELS]
    text = "".join(f"{name}.png,{label}\n" for name, label in zip(NAMES, labels))
    (folder / "t.csv").write_bytes(f"file,label\n{text}".encode(encoding))
    assert labels_of(load(folder)) == dict(zip(NAMES, labels))
    assert ("read as cp1252" in capsys.readouterr().err) == (encoding == "cp1252")


def test_a_label_of_several_words_and_one_that_is_unknown(load, folder) -> None:
    rows = [f"{name}.png {label}" for name, label in zip(NAMES, LABELS)]
    (folder / "t.txt").write_text("\n".join(rows).replace("dog", "big dog"))
    assert load(folder).class_names == ("big dog", "cat", "emu")
    (folder / "t.txt").write_text("\n".join(rows).replace("dog", "NaN"))
    fails(load, folder, "4 of 12 images have no label")
    table = pd.DataFrame({"image": NAMES, "smiles": ["1", "-1"] * 6})
    table.to_csv(folder / "t.csv", index=False)
    (folder / "t.txt").unlink()
    assert load(folder).class_names == ("-1", "1")


def test_a_label_with_the_delimiter_in_the_first_row(load, folder) -> None:
    rows = [f"{name}.png, {label}" for name, label in zip(NAMES, LABELS)]
    text = "file,label\n" + "\n".join(rows).replace("cat", "cat, black") + ","
    (folder / "t.csv").write_text(text)
    assert load(folder).class_names == ("cat,black", "dog", "emu")


def test_empty_tables_beside_class_folders_do_not_matter(load, root) -> None:
    (root / "a.json").write_text("[]")
    (root / "b.jsonl").write_text("")
    (root / "c.csv").write_text("")
    assert load(root).class_names == ("cat", "dog")
