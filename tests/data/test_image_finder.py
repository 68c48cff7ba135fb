"""Images that a table names in other ways than by their file names."""

from __future__ import annotations

from image_folders import LABELS, NAMES, labels_of, png


def test_names_may_differ_in_case_and_accents(load, tmp_path) -> None:
    (tmp_path / "set").mkdir()
    for i, name in enumerate(NAMES):
        (tmp_path / "set" / f"É{name}.PNG").write_bytes(png(i))  # composed
    rows = "".join(f"é{name}.png , {label} \n" for name, label in zip(NAMES, LABELS))
    (tmp_path / "set" / "LABELS.CSV").write_text(f"file,label\n{rows}")
    found = labels_of(load(tmp_path / "set"))
    assert found == {f"É{name}": label for name, label in zip(NAMES, LABELS)}
