"""HTML pages in a real browser: names in data run nothing, and the page of suspects works."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from places import Place, write_images
from toy import toy_config, toy_data

from attribution.data.dataset import ImageData
from attribution.data.decisions import LEFT_OUT, kept_splits, relabelled
from attribution.reporting import html

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]
# Without escaping, each name would set `window.owned` or request a file.
CLASSES = (
    "<script>window.owned = 1</script>",
    "'\"><img src=x onerror='window.owned = 2'>",
    "</td></title></style><svg onload=window.owned=3>",
)
FILE = "\"><img src=x onerror='window.owned = 4'>\n.png"


@pytest.fixture(scope="module")
def pages(new_place: Callable[..., Place], tmp_path_factory) -> list[Path]:
    """report.html and explanation.html of data whose classes and files have such names."""
    import datasets

    root = tmp_path_factory.mktemp("names")
    files = sorted(write_images(root / "images", per_class=8).glob("*/*.png"))
    images = [{"bytes": f.read_bytes(), "path": f"{i}{FILE}"} for i, f in enumerate(files)]
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=list(CLASSES))
    )
    columns = {"image": images, "label": [i // 8 for i in range(24)]}
    (root / "hub").mkdir()
    table = datasets.Dataset.from_dict(columns, features=features)
    table.to_parquet(root / "hub" / "train.parquet")
    place = new_place("pages")
    given = {"dataset": root / "hub", "epochs": 1, "label_noise": 0.2}
    report = place.done("ablation", **given, arms="harmful,loss").run_id
    explained = place.done("explain", **given, target="0,1,2").run_id
    return [
        place.artifacts(report) / "report.html",
        place.artifacts(explained) / "explanation.html",
    ]


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[[Path], tuple[Any, list[str]]]]:
    """Opens a page; what it asks for beside itself, and what its console says, is noted."""
    context = browser.new_context()

    def open_page(file: Path) -> tuple[Any, list[str]]:
        page, heard = context.new_page(), []
        own = file.as_uri()
        page.on("request", lambda r: r.url.startswith((own, "data:")) or heard.append(r.url))
        page.on("console", lambda message: heard.append(message.text))
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("dialog", lambda dialog: (heard.append(dialog.message), dialog.dismiss()))
        page.goto(own)
        page.wait_for_load_state("networkidle")
        return page, heard

    yield open_page
    context.close()


@pytest.mark.parametrize("number", [0, 1], ids=["report", "explanation"])
def test_names_in_data_run_nothing_in_a_browser(pages, opened, number: int) -> None:
    page, heard = opened(pages[number])
    assert page.evaluate("window.owned") is None
    assert not heard
    assert page.locator("script, iframe, img[src=x], svg[onload]").count() == 0
    text = page.locator("body").inner_text()
    assert all(name in text for name in CLASSES)
    titles = page.locator("figure[title]").evaluate_all("all => all.map(each => each.title)")
    assert titles and all(title.endswith(FILE) for title in titles)
    broken = "all => all.filter(each => !each.naturalWidth).length"
    assert page.locator("img").count() > 2
    assert page.locator("img").evaluate_all(broken) == 0


@pytest.mark.parametrize("number", [0, 1], ids=["report", "explanation"])
def test_were_a_name_not_escaped_the_page_would_still_run_nothing(
    pages, opened, tmp_path: Path, number: int
) -> None:
    """The second lock; and the test above can fail."""
    text = pages[number].read_text(encoding="utf-8")
    policy = text[text.index("<meta http-equiv") :].split("\n")[0]
    for lock, expected in ((policy, None), ("", 1)):
        file = tmp_path / "page.html"
        file.write_text(text.replace(policy, lock).replace("<body>", f"<body>{CLASSES[0]}"))
        page, _ = opened(file)
        assert page.evaluate("window.owned") == expected


# -- suspects.html ---------------------------------------------------------------------------------


@pytest.fixture
def checked(browser: Any, tmp_path: Path) -> Iterator[tuple[Any, ImageData, list[str]]]:
    """The page of four suspects with nasty names, its data, and what the browser complained of."""
    data = toy_data(tmp_path / "data", n_train=24, n_other=6)
    names = CLASSES[:2]
    examples = data.examples.assign(
        label_name=[names[i] for i in data.examples["label"]],
        file_name=[f"a,b/{i}{FILE}" for i in range(len(data.examples))],
    )
    data = dataclasses.replace(data, class_names=names, examples=examples)
    train = data.table("train").head(4)
    table = train.assign(
        rank=range(1, 5),
        label=train["label_name"],
        suggested_label=[names[1], "", names[0], ""],
        reasons=[
            "high loss",
            "contradicts other images, high loss",
            "contradicts other images",
            "high loss",
        ],
    )
    file = tmp_path / "suspects.html"
    file.write_text(html.suspects(data, table, "x & y", "python -m scripts.finetune"), "utf-8")
    context, heard = browser.new_context(viewport={"width": 1100, "height": 900}), []
    page = context.new_page()
    page.on("console", lambda message: heard.append(message.text))
    page.on("pageerror", lambda error: heard.append(str(error)))
    page.on(
        "request", lambda r: r.url.startswith(("file:", "data:", "blob:")) or heard.append(r.url)
    )
    page.goto(file.as_uri())
    yield page, data, heard
    context.close()


def downloaded(page: Any, button: str) -> pd.DataFrame:
    with page.expect_download() as found:
        page.get_by_role("button", name=button).click()
    return pd.read_csv(found.value.path(), dtype=str, keep_default_na=False)


def test_a_choice_of_suspects_is_downloaded_as_the_files_that_a_command_takes(
    checked, tmp_path: Path
) -> None:
    page, data, heard = checked
    cards, train = page.locator(".suspect"), data.table("train")
    assert "0" in page.locator("#count").inner_text() and cards.count() == 4
    cards.nth(1).get_by_text("remove", exact=True).click()
    cards.nth(0).get_by_text("relabel", exact=True).click()  # as suggested
    cards.nth(3).locator("select").select_option(index=0)  # which chooses relabel too
    assert page.locator("#count").inner_text().endswith("To remove: 1. To relabel: 2. To keep: 1.")
    keep = downloaded(page, "Download keep.csv")
    kept = data.examples[data.examples["example_id"] != train["example_id"][1]]
    for column in ("example_id", "split"):
        assert list(keep[column]) == list(kept[column])
    (tmp_path / "keep.csv").write_text(keep.to_csv(index=False))
    config = toy_config(keep=str(tmp_path / "keep.csv"))
    splits = kept_splits(data.examples, list(data.class_names), config)
    assert list(data.examples["example_id"][splits == LEFT_OUT]) == [train["example_id"][1]]
    labels = downloaded(page, "Download labels.csv")
    assert labels.to_dict("list") == {
        "example_id": [train["example_id"][0], train["example_id"][3]],
        "label": [data.class_names[1], data.class_names[0]],
        "file_name": [train["file_name"][0], train["file_name"][3]],
    }
    (tmp_path / "labels.csv").write_text(labels.to_csv(index=False))
    config = toy_config(labels=str(tmp_path / "labels.csv"))
    corrected = relabelled(data.examples, list(data.class_names), config)
    own = corrected.set_index("example_id")["label_name"]
    assert list(own[labels["example_id"]]) == list(labels["label"])
    assert not heard and page.evaluate("window.owned") is None


def test_suspects_are_filtered_sorted_and_enlarged(checked) -> None:
    page, data, heard = checked
    page.locator("#reason").select_option("contradicts other images")
    assert page.locator(".suspect:visible").count() == 2
    page.locator("#class").select_option(data.class_names[0])
    shown = page.locator(".suspect:visible").evaluate_all("all => all.map(c => c.dataset.label)")
    assert set(shown) <= {data.class_names[0]}
    page.locator("#class").select_option("")
    page.locator("#reason").select_option("")
    page.locator("#sort").select_option("class")
    labels = page.locator(".suspect").evaluate_all("all => all.map(c => c.dataset.label)")
    in_order = page.evaluate("labels => labels.sort((a, b) => a.localeCompare(b))", labels)
    assert len(set(labels)) == 2 and labels == in_order
    page.locator(".suspect:visible .zoom").first.click()
    assert page.locator("#large").is_visible()
    page.locator("#large").click()
    assert not page.locator("#large").is_visible() and not heard


@pytest.mark.parametrize("width", [390, 1100])
def test_nothing_of_the_suspects_is_cut_off(checked, width: int) -> None:
    page, *_ = checked
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
