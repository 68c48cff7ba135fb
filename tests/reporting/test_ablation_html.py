"""report.html and the pages of commands: whole, self-contained, escaped, and true to the figures."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from page_parser import Element, after, image_of, parsed, tables_after
from PIL import Image
from places import Place
from scipy import stats
from toy import toy_config

from attribution.data.dataset import ImageData
from attribution.experiments.arms import Trial, removed_table
from attribution.experiments.comparison import (
    CLASS_COLUMNS,
    Comparison,
    class_effects,
    comparison_table,
)
from attribution.experiments.contrasts import contrast
from attribution.experiments.names import ARM_SPECS
from attribution.experiments.outcome import compare
from attribution.reporting import ablation_html, answer
from attribution.reporting.terminal import power

pytestmark = pytest.mark.usefixtures("one_thread")

NASTY = ("<script>alert(1)</script>", "\"'><b onclick=x>", "$a_1$ & {{ 7*7 }} &amp;")


N_SEEDS = 4


def made_data(folder: Path, names: Sequence[str], n_train: int = 60, per_class: int = 25):
    """Images told apart by every pixel; every seventh training label is flipped."""
    classes = len(names)
    n_test = per_class * classes
    n = n_train + n_test + 2 * classes
    true = np.arange(n) % classes
    flipped = (np.arange(n) % 7 == 3) & (np.arange(n) < n_train)
    label = np.where(flipped, (true + 1) % classes, true)
    rng = np.random.default_rng(3)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "pixels.npy", rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8))
    files = [f"{names[own]}-{i}.png" if i % 2 else "" for i, own in enumerate(label)]
    examples = pd.DataFrame(
        {
            "example_id": [f"id{i}" for i in range(n)],
            "file_name": files,
            "split": ["train"] * n_train + ["test"] * n_test + ["validation"] * 2 * classes,
            "label": label,
            "label_name": np.array(names, object)[label],
            "true_label": true,
            "is_flipped": flipped,
        }
    )
    return ImageData(folder / "pixels.npy", tuple(names), examples, "made", (), 0)


@dataclass
class Made:
    """A page with all that it was made from."""

    tree: Element
    data: ImageData
    trials: list[Trial]
    logits: list[np.ndarray]
    comparison: Comparison
    html: str


def removed_by(made: Made, trial: Trial) -> pd.DataFrame:
    return removed_table(trial, made.comparison.evidence)


def trials_of(spec: dict[tuple[str, int, str], Any], n: int) -> list[Trial]:
    """Trials of (arm, size, action); those that are drawn take other examples under each seed."""
    found = []
    for arm, size, action in spec:
        step = 5 if arm in ("random", "balanced") else 0
        chosen = tuple(np.sort((np.arange(size) * 3 + 1 + step * s) % n) for s in range(N_SEEDS))
        assert all(len(set(rows.tolist())) == size for rows in chosen)
        trial = Trial(arm, size / n, chosen)
        if action == "relabel":
            trial = replace(trial, new_labels=tuple(np.zeros(size, int) for _ in chosen))
        found.append(trial)
    return found


def made_page(
    folder: Path, spec: dict[tuple[str, int, str], Sequence[int]], names: Sequence[str],
    frac: str = "0.1,0.2", action: str = "remove", **sizes: int,
) -> Made:  # fmt: skip
    """Args: spec: of (arm, size, action) how many of the first test images are right, by seed."""
    data = made_data(folder / "data", names, **sizes)
    labels, train = data.labels("test"), data.table("train")
    rng, n = np.random.default_rng(1), len(train)
    train = train.assign(
        loss=rng.permutation(n) / 10, alignment=(rng.permutation(n) - n / 4) / 100, trust=rng.permutation(n) / 100,
        self_influence=rng.random(n), label_quality=rng.random(n),
    )  # fmt: skip
    trials, logits = trials_of(spec, n), []
    for right in spec.values():
        shown = np.where(
            np.arange(len(labels)) < np.array(right)[:, None], labels, (labels + 1) % len(names)
        )
        logits.append(3.0 * np.eye(len(names))[shown])
    outcomes = compare(trials, logits, labels)
    for i, name in enumerate(("comparison", "curves")):
        Image.new("RGB", (3, 3), (i, 7, 9)).save(folder / f"{name}.png")
    effects = class_effects(outcomes, labels, names)
    contrasts = contrast(outcomes, [])
    table = comparison_table(outcomes)
    comparison = Comparison(outcomes, table, contrasts, effects, train)
    html = ablation_html.page(
        toy_config(dataset=f"somewhere/{NASTY[1]}", action=action, frac=frac), data, comparison, folder,
        {"ablation run": ("a0", ""), "trak run": ("t1", ""), "finetune run": ("f2", "")},
        {"torch": NASTY[0]},
    )  # fmt: skip
    return Made(parsed(html), data, trials, logits, comparison, html)


# Of 75 test images of three classes.
SPEC = {
    ("none", 0, "remove"): [50, 52, 51, 49],
    ("random", 6, "remove"): [50, 51, 51, 50],
    ("random", 10, "remove"): [49, 51, 50, 49],
    ("harmful", 6, "remove"): [61, 63, 62, 61],  # better
    ("harmful", 10, "remove"): [50, 50, 51, 49],  # as good
    ("helpful", 6, "remove"): [39, 41, 41, 39],  # worse
    ("loss", 6, "remove"): [53, 53, 55, 51],  # an interval that excludes zero, but not after Holm
    ("balanced", 6, "remove"): [50, 51, 50, 51],
    ("negative", 0, "remove"): [50, 52, 51, 49],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    return made_page(tmp_path_factory.mktemp("made"), SPEC, NASTY)


def verdicts(spec: dict[tuple[str, int, str], Sequence[int]], n_test: int) -> dict:
    """(difference, low, high, Holm's p, words) by trial, each step by hand."""
    found = {}
    for (arm, size, action), right in spec.items():
        if arm not in ("none", "random") and size:
            d = (np.array(right) - spec["random", size, action]) / n_test
            t = stats.ttest_1samp(d, 0)
            low, high = t.confidence_interval()
            found[arm, size, action] = [d.mean(), low, high, t.pvalue]
    running, ordered = 0.0, sorted(found, key=lambda key: found[key][3])
    for step, key in enumerate(ordered):
        running = max(running, min(1, (len(found) - step) * found[key][3]))
        found[key][3] = running
    for row in found.values():
        mean, low, high, p = row
        if low <= 0 <= high:
            words = "indistinguishable from random"
        elif p >= 0.05:
            words = "not significant after Holm"
        else:
            words = "better than random" if mean > 0 else "worse than random"
        row.append(words)
    return found


def test_the_comparison_says_what_the_figures_say(made) -> None:
    expected = verdicts(SPEC, 75)
    assert {words for *_, words in expected.values()} == {
        "better than random", "worse than random", "indistinguishable from random",
        "not significant after Holm",
    }  # fmt: skip
    ((header, *rows),) = tables_after(made.tree, "The comparison")
    assert header[:4] == ["arm", "share", "examples", "test accuracy"] and len(rows) == len(SPEC)
    for ((arm, size, action), right), row in zip(SPEC.items(), rows, strict=True):
        share = np.array(right) / 75
        half = stats.t.ppf(0.975, 3) * share.std(ddof=1) / 2
        start = [arm, f"{100 * size / 60:.3g} %", str(size), f"{share.mean():.4f} ± {half:.4f}"]
        assert row[:4] == start
        if (arm, size, action) in expected:
            mean, low, high, p, words = expected[arm, size, action]
            assert row[4] == f"{mean:+.4f} ± {(high - low) / 2:.4f}"
            assert row[5:] == [f"{p:.2g}", words]
        else:
            words = "baseline" if arm in ("none", "random") else "removes nothing"
            assert row[4:] == ["", "", words]


def test_colours_go_with_the_verdict(made) -> None:
    expected, elements = verdicts(SPEC, 75), after(made.tree, "The comparison")
    (table,) = [t for e in elements for t in e.all("table")]
    for key, row in zip(SPEC, table.all("tr")[1:], strict=True):
        cells = [c for c in row.children if isinstance(c, Element)]
        tone = {"better than random": "good", "worse than random": "bad"}
        words = expected[key][4] if key in expected else ""
        classes = (cells[-1].attributes["class"] or "").split()
        assert ("good" in classes, "bad" in classes) == (
            tone.get(words) == "good", tone.get(words) == "bad",
        )  # fmt: skip


def test_the_answer_stands_first_and_then_how_it_was_found(made) -> None:
    (body,) = made.tree.all("body")
    paragraphs = [each.text for each in body.all("p")]
    found = answer.sentences(made.comparison.table)
    assert paragraphs[: len(found)] == found
    sentences = [text for text in paragraphs[len(found) :] if text.strip()][:2]
    flips = int(made.data.table("train")["is_flipped"].sum())
    assert f"60 training images of 3 classes ({flips} labels were flipped" in sentences[0]
    assert "4 paired seeds" in sentences[1] and "75 test images" in sentences[1]
    assert power(made.comparison.table) in made.tree.text


def class_loop(made: Made) -> list[dict[str, Any]]:
    """class_effects, by explicit loops."""
    labels, rows = made.data.labels("test"), []
    for trial, logits in zip(made.trials, made.logits, strict=True):
        size = len(trial.removed[0])
        if trial.arm in ("none", "random") or not size:
            continue
        (control,) = [
            other
            for t, other in zip(made.trials, made.logits, strict=True)
            if (t.arm, len(t.removed[0]), t.action) == ("random", size, trial.action)
        ]
        for label, name in enumerate(made.data.class_names):
            d = []
            for s in range(N_SEEDS):
                hits = [[row[i].argmax() == label for i in range(len(labels)) if labels[i] == label]
                        for row in (logits[s], control[s])]  # fmt: skip
                d.append(np.mean(hits[0]) - np.mean(hits[1]))
            low = high = np.mean(d)
            if np.std(d) > 1e-12:
                low, high = stats.ttest_1samp(d, 0).confidence_interval()
            rows.append(
                {
                    "name": trial.name, "label_name": name, "n_test": int((labels == label).sum()),
                    "mean": np.mean(d), "low": low, "high": high,
                }
            )  # fmt: skip
    return rows


def check_class_table(made: Made, shown: set[str]) -> None:
    expected = class_loop(made)
    ((header, *rows),) = tables_after(made.tree, "Class by class")
    columns = list(dict.fromkeys(e["name"] for e in expected))
    assert header == ["class", "test images", *columns]
    names = [name for name in made.data.class_names if name in shown]
    assert [row[0] for row in rows] == [" ".join(name.split()) for name in names]
    cells = {(e["label_name"], e["name"]): e for e in expected}
    for name, row in zip(names, rows, strict=True):
        own = [cells[name, column] for column in columns]
        assert row[1] == str(own[0]["n_test"])
        assert row[2:] == [
            f"{100 * e['mean']:+.1f}"
            + (f" ± {50 * (e['high'] - e['low']):.1f}" if e["high"] > e["low"] else "")
            for e in own
        ]
    excluding = sum((e["low"] > 0 or e["high"] < 0) and e["low"] < e["high"] for e in expected)
    (text,) = [e.text for e in after(made.tree, "Class by class") if e.tag == "p"]
    assert (
        f"{len(expected)} intervals" in text and f"zero by chance alone, and {excluding} do" in text
    )
    assert f"about {round(len(expected) / 20)} would" in text


def test_the_class_table_is_that_of_explicit_loops(made) -> None:
    check_class_table(made, set(NASTY))
    (text,) = [e.text for e in after(made.tree, "Class by class") if e.tag == "p"]
    assert "The table shows" not in text


def test_of_many_classes_those_with_the_largest_differences_are_shown(tmp_path) -> None:
    names = [f"class {i}" for i in range(40)]
    rng = np.random.default_rng(0)
    spec = {
        key: sorted(rng.integers(20, 60, N_SEEDS).tolist())
        for key in SPEC
        if key[:2] in (("none", 0), ("random", 6), ("harmful", 6), ("helpful", 6))
    }
    made = made_page(tmp_path, spec, names, n_train=120, per_class=2)
    largest = pd.DataFrame(class_loop(made)).assign(size=lambda t: t["mean"].abs())
    largest = largest.groupby("label_name")["size"].max()
    ((_, *rows),) = tables_after(made.tree, "Class by class")
    shown = {row[0] for row in rows}
    assert len(rows) == 30
    assert largest[list(shown)].min() >= largest[largest.index.difference(list(shown))].max()
    check_class_table(made, shown)
    assert "The table shows the 30 classes with the largest" in made.tree.text


def galleries(tree: Element) -> dict[str, tuple[str, str, list[Element]]]:
    """Heading of each arm to the text below it and its figures."""
    found, elements = {}, after(tree, "What each arm chose")
    for i, element in enumerate(elements):
        if element.tag == "h3":
            name, _, rest = element.text.partition(": ")
            found[name] = rest, elements[i + 1].text, elements[i + 2].all("figure")
    return found


def check_gallery(made: Made, figures: list[Element], rows: list[int], column: str) -> None:
    train, pixels = made.data.table("train"), made.data.pixels()[made.data.rows("train")]
    values = pd.concat([removed_by(made, trial) for trial in made.trials])
    values = values.set_index("position")[column]
    assert len(figures) == len(rows)
    for figure, row in zip(figures, rows, strict=True):
        (image,) = figure.all("img")
        np.testing.assert_array_equal(image_of(image), pixels[row])
        own = train.iloc[row]
        value = values[[row]].iloc[0]
        true = made.data.class_names[own["true_label"]]
        said = f" (flipped, is {true})" if own["is_flipped"] else ""
        caption = figure.all("figcaption")[0].text
        assert caption == " ".join(f"{own['label_name']}{said}{value:+.3g}".split())
        assert image.attributes["alt"] == own["label_name"]
        assert figure.attributes["title"] == (own["file_name"] or own["example_id"])
        assert ("flipped" in figure.attributes["class"].split()) == own["is_flipped"]


def test_galleries_show_what_each_arm_removed_in_its_own_order(made) -> None:
    found = galleries(made.tree)
    assert [*found] == ["harmful 0.1", "harmful 0.167", "helpful 0.1", "loss 0.1", "balanced 0.1",
                        "negative 0"]  # fmt: skip
    by_name = {trial.name: removed_by(made, trial) for trial in made.trials}
    orders = {
        "harmful 0.1": ("trust", False), "helpful 0.1": ("alignment", True),
        "loss 0.1": ("loss", True),
    }  # fmt: skip
    for name, (column, falls) in orders.items():
        table = by_name[name].sort_values(column, ascending=not falls)
        check_gallery(made, found[name][2], table["position"].tolist(), column)
        assert f"Sorted by {column}:" in found[name][1]
    assert not found["harmful 0.167"][2] and not found["negative 0"][2]


def test_headings_count_examples_flips_and_classes(made) -> None:
    found, train = galleries(made.tree), made.data.table("train")
    flips = int(train["is_flipped"].sum())
    for trial in made.trials:
        if trial.arm in ("none", "random"):
            continue
        heading, text, _ = found[trial.name]
        assert heading.startswith(f"{len(trial.removed[0])} examples")
        chosen = train.iloc[np.concatenate(trial.removed)]
        if len(chosen):
            precision = chosen["is_flipped"].mean()
            recall = chosen["is_flipped"].sum() / (N_SEEDS * flips)
            assert f"{100 * precision:.0f} % of them flipped" in heading
            assert f"({100 * recall:.0f} % of all flips)" in heading
        else:
            assert "flips" not in heading
        for name in NASTY:
            count = (chosen["label_name"] == name).sum() / N_SEEDS
            assert (f"{' '.join(name.split())}: {count:g}" in text) == (count > 0)


def test_an_arm_that_draws_for_every_seed_says_so(made) -> None:
    (trial,) = [t for t in made.trials if t.arm == "balanced"]
    different = len(np.unique(np.concatenate(trial.removed)))
    assert different > 6
    heading, _, figures = galleries(made.tree)["balanced 0.1"]
    assert f"{different} different examples in total" in heading and len(figures) == different
    assert "in total" not in galleries(made.tree)["harmful 0.1"][0]


def test_a_gallery_ends_at_24(tmp_path) -> None:
    spec = {
        ("none", 0, "remove"): [5, 6, 5, 6], ("random", 30, "remove"): [5, 6, 5, 5],
        ("harmful", 30, "remove"): [6, 6, 5, 6],
    }  # fmt: skip
    made = made_page(tmp_path, spec, ["a", "b"], n_train=100, per_class=5)
    _, text, figures = galleries(made.tree)["harmful 0.3"]
    table = removed_by(made, made.trials[-1]).sort_values("trust").head(24)
    check_gallery(made, figures, table["position"].tolist(), "trust")
    assert "The first 24, sorted by trust:" in text


def test_figures_are_inside_and_settings_are_told(made) -> None:
    plots = [i for i in made.tree.all("img") if i.attributes.get("class") == "plot"]
    assert [image_of(i)[0, 0].tolist() for i in plots] == [[0, 7, 9], [1, 7, 9]]
    tables = dict(row for rows in tables_after(made.tree, "Settings and versions") for row in rows)
    assert tables["torch"] == NASTY[0] and tables["proj_dim"] and tables["epochs"] == "2"
    for run_id in ("a0", "t1", "f2"):
        assert run_id in [code.text for code in made.tree.all("code")]


def test_no_text_from_data_becomes_markup(made) -> None:
    """Parsed, every name stands there as it was; unparsed, none of them does."""
    text = made.tree.text
    for name in NASTY:
        assert name not in made.html and " ".join(name.split()) in text
    assert made.tree.all("title")[0].text == f"Removal and retraining: {NASTY[1]}"
    assert "49" not in made.tree.all("title")[0].text and "{{ 7*7 }}" in text


def test_every_arm_of_the_table_is_explained_in_one_line(made) -> None:
    items = [item.text for e in after(made.tree, "The comparison") for item in e.all("li")]
    for arm in dict.fromkeys(arm for arm, *_ in SPEC):
        (words,) = [text for text in items if text.startswith(f"{arm}: ")]
        assert words.removeprefix(f"{arm}: ") == ARM_SPECS[arm].about


def test_one_share_has_no_curves(tmp_path) -> None:
    spec = {key: SPEC[key] for key in SPEC if key[1] in (0, 6)}
    made = made_page(tmp_path, spec, NASTY, frac="0.1")
    assert "Accuracy by share removed" not in [h.text for h in made.tree.all("h2")]
    assert len([i for i in made.tree.all("img") if i.attributes.get("class") == "plot"]) == 1


def test_removed_and_relabelled_stand_side_by_side(tmp_path) -> None:
    spec = {
        key: SPEC[key] for key in SPEC if key[:2] in (("none", 0), ("random", 6), ("harmful", 6))
    }
    spec |= {
        ("random", 6, "relabel"): [48, 49, 50, 49], ("harmful", 6, "relabel"): [60, 63, 62, 61],
    }  # fmt: skip
    made = made_page(tmp_path, spec, NASTY, action="both")
    ((_, *rows),) = tables_after(made.tree, "The comparison")
    assert [row[0] for row in rows] == [
        "none", "random", "harmful", "random relabelled", "harmful relabelled",
    ]  # fmt: skip
    assert rows[4][4].split()[0] == f"{verdicts(spec, 75)['harmful', 6, 'relabel'][0]:+.4f}"
    assert [*galleries(made.tree)] == ["harmful 0.1", "harmful 0.1 relabelled"]
    assert all(figures for *_, figures in galleries(made.tree).values())
    assert "which were removed or relabelled" in made.tree.text
    check_class_table(made, set(NASTY))


def test_baselines_alone_make_a_page(tmp_path) -> None:
    spec = {
        key: SPEC[key] for key in SPEC if key in (("none", 0, "remove"), ("random", 6, "remove"))
    }
    made = made_page(tmp_path, spec, NASTY)
    assert (
        "No arm was compared with random removal." in made.tree.text and galleries(made.tree) == {}
    )


def test_the_page_says_how_to_measure_the_scores(made) -> None:
    _, command = after(made.tree, "How good is the attribution?")
    assert command.text == "python -m scripts.evaluate --trak_run_id t1"


FOLDERS = ("<script>alert(1)<", "\"'$x$ {{ 7*7 }}", "[red] & ü")


FILE = '"><img src=x onerror=alert(1)>$.png'


@pytest.fixture(scope="module")
def nasty(new_place: Callable[..., Place], tmp_path_factory) -> tuple[Place, Path, Any]:
    """A place, a folder whose classes and files have such names, and an ablation of it."""
    folder, rng = tmp_path_factory.mktemp("nasty") / "images", np.random.default_rng(0)
    for i, name in enumerate(FOLDERS):
        (folder / name).mkdir(parents=True)
        for j in range(8):
            pixels = np.clip(80 * i + rng.integers(0, 90, (16, 16, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{j}{FILE}")
    place = new_place("nasty")
    given = {"dataset": folder, "epochs": 1, "arms": "harmful,negative", "label_noise": 0.2}
    return place, folder, place.done("ablation", **given)


def page_of(place: Place, run_id: str, name: str) -> Element:
    return parsed((place.artifacts(run_id) / name).read_text(encoding="utf-8"))


@pytest.mark.slow
def test_a_report_of_a_folder_with_such_names(nasty) -> None:
    place, folder, result = nasty
    tree = page_of(place, result.run_id, "report.html")
    rows = tables_after(tree, "Class by class")[0]
    assert [row[0] for row in rows[1:]] == [" ".join(name.split()) for name in sorted(FOLDERS)]
    figures = [f for *_, found in galleries(tree).values() for f in found]
    assert figures
    for figure in figures:
        file = folder / figure.attributes["title"]
        shown = image_of(figure.all("img")[0])
        np.testing.assert_array_equal(shown, np.asarray(Image.open(file).convert("RGB")))
    comparison = pd.read_csv(place.artifacts(result.run_id) / "comparison.csv")
    assert [row[0] for row in tables_after(tree, "The comparison")[0][1:]] == list(
        comparison["arm"]
    )
    codes = [code.text for code in tree.all("code")]
    trak_id = result.tags["trak_run_id"]
    finetune_id = place.client().get_run(trak_id).data.tags["finetune_run_id"]
    assert {result.run_id, trak_id, finetune_id} <= set(codes)
    plots = [i for i in tree.all("img") if i.attributes.get("class") == "plot"]
    for image, name in zip(plots, ("comparison.png",), strict=True):  # one share has no curve
        content = base64.b64decode(image.attributes["src"].split(",", 1)[1])
        assert content == (place.artifacts(result.run_id) / name).read_bytes()


@pytest.mark.slow
def test_an_explanation_of_a_folder_with_such_names(nasty, tmp_path) -> None:
    place, folder, _ = nasty
    source = next((folder / FOLDERS[0]).iterdir())
    given = {"dataset": folder, "epochs": 1, "label_noise": 0.2, "target": "0,1", "image": source}
    result = place.done("explain", **given, label=FOLDERS[1])
    tree = page_of(place, result.run_id, "explanation.html")
    table = pd.read_csv(place.artifacts(result.run_id) / "explanation.csv")
    headings = [h.text for h in tree.all("h2")]
    names = [source.name, "target 0", "target 1"]
    assert [h.startswith(" ".join(n.split())) for h, n in zip(headings, names)] == [True] * 3
    figures = iter(tree.all("figure"))
    for name, part in table.groupby("explained", sort=False):
        own = next(figures)
        assert own.all("img")[0].attributes["alt"] == name
        if name == source.name:
            pixels = np.asarray(Image.open(source).convert("RGB"))
            np.testing.assert_array_equal(image_of(own.all("img")[0]), pixels)
        for row in part.itertuples():
            figure = next(figures)
            assert figure.attributes["class"].split()[0] == row.side
            assert figure.attributes["title"] == row.file_name
            pixels = np.asarray(Image.open(folder / row.file_name).convert("RGB"))
            np.testing.assert_array_equal(image_of(figure.all("img")[0]), pixels)
    assert next(figures, None) is None
    assert all(" ".join(name.split()) in " ".join(result.out.split()) for name in names)


def test_shares_that_are_written_alike_keep_their_columns(tmp_path) -> None:
    """A row has as many cells as the header."""
    table = pd.DataFrame(
        [
            ["harmful", "remove", frac, name, 5, shift, shift - 0.1, shift + 0.2]
            for frac, shift in ((0.10001, 0.1), (0.10002, 0.3))
            for name in ("a", "b")
        ],
        columns=CLASS_COLUMNS,
    )
    found = ablation_html._classes(table)
    assert found["columns"] == ["harmful 0.1", "harmful 0.1"]
    assert [len(cells) for cells in found["rows"]] == [2, 2]
    cell = found["rows"][0][1]
    assert (cell["mean"], cell["half"]) == pytest.approx((30, 15)) and cell["excludes"]
