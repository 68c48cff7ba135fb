"""HTML pages in a real browser: names in data run nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from places import Place, write_images

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
    html = pages[number].read_text(encoding="utf-8")
    policy = html[html.index("<meta http-equiv") :].split("\n")[0]
    for lock, expected in ((policy, None), ("", 1)):
        file = tmp_path / "page.html"
        file.write_text(html.replace(policy, lock).replace("<body>", f"<body>{CLASSES[0]}"))
        page, _ = opened(file)
        assert page.evaluate("window.owned") == expected
