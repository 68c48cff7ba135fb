"""What a person sees: a real browser on `mlflow ui` over a small ablation.

Screenshots of every page go to the folder that TRAK_ABLATION_SCREENSHOTS names, or to pytest's own.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from places import Place, child_environment

from attribution.reporting import mlflow_notes
from attribution.tracking import links
from attribution.tracking.stage_runs import NOTE

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

ARMS = {"none": "0", "random 0.1": "0.1", "harmful 0.1": "0.1"}  # run name to frac
# What the console may say, and why it is not ours.
IGNORED = {
    "/mlflow/users/current": "MLflow asks who is logged in; a server without log-in answers 404",
    "ResizeObserver loop": "Chromium's notice that MLflow's own layout took two frames to settle",
}
SECONDS = 30


@dataclass(frozen=True)
class Ui:
    """A running `mlflow ui` and the ids of what it shows."""

    address: str
    place: Place
    run_id: str  # of the ablation

    @property
    def experiment_id(self) -> str:
        return self.run.info.experiment_id

    @property
    def run(self) -> Any:
        return self.place.client().get_run(self.run_id)

    @property
    def table(self) -> pd.DataFrame:
        return pd.read_csv(self.place.artifacts(self.run_id) / "comparison.csv")

    def arms(self) -> list[str]:
        """Ids of the nested runs, in the order of their making."""
        return [run.info.run_id for run in self.place.children(self.run_id)]


@pytest.fixture(scope="module")
def ui(finished, new_place, browser) -> Iterator[Ui]:
    place = new_place("ui", like=finished[0])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = ["--backend-store-uri", place.environment["MLFLOW_TRACKING_URI"]]
    command = [sys.executable, "-m", "mlflow", "ui", "--port", str(port), "--workers", "1", *store]
    log = place.root / "server.log"
    with log.open("w") as file:
        server = subprocess.Popen(
            command,
            cwd=place.root,
            env=child_environment(place),
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(address, server, log)
        yield Ui(address, place, finished[1].run_id)
    finally:
        server.terminate()  # it takes its workers along
        server.wait(timeout=SECONDS)


def wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    """Until the server answers; with its output where it does not."""
    end = time.monotonic() + 6 * SECONDS  # its imports take long where others work too
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=SECONDS).close()
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    pytest.fail(f"mlflow ui does not answer:\n{log.read_text()}")


@pytest.fixture(scope="module")
def visitor(ui: Ui, browser: Any) -> Iterator[tuple[Any, list[str]]]:
    """A browser that loads MLflow's code once, and what went wrong in it or left this machine."""
    context = browser.new_context(base_url=ui.address, viewport={"width": 1440, "height": 1000})
    context.set_default_timeout(1000 * SECONDS)
    context.add_init_script("location.protocol == 'http:' && localStorage.clear()")
    expect.set_options(timeout=1000 * SECONDS)
    wrong: list[str] = []
    own = (ui.address, "blob:", "data:")
    context.on("request", lambda sent: sent.url.startswith(own) or wrong.append(sent.url))
    context.on("page", lambda page: watch(page, wrong))
    yield context, wrong
    context.close()


@pytest.fixture
def page(visitor: tuple[Any, list[str]]) -> Iterator[Any]:
    """A newcomer's page: nothing remembered, nothing outside this machine, no error at the end."""
    context, wrong = visitor
    wrong.clear()
    yield context.new_page()
    for page in context.pages:
        page.close()
    assert not wrong


def watch(page: Any, errors: list[str]) -> None:
    """Collect what the page's console calls an error, and every uncaught exception."""

    def heard(message: Any) -> None:
        text = f"{message.text} {message.location.get('url', '')}"
        if message.type == "error" and not any(name in text for name in IGNORED):
            errors.append(text)

    page.on("console", heard)
    page.on("pageerror", lambda error: errors.append(str(error)))


@pytest.fixture
def shoot(page: Any, tmp_path: Path) -> Any:
    folder = Path(os.environ.get("TRAK_ABLATION_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return lambda name, of=page: of.screenshot(path=folder / f"{name}.png")


def row(page: Any, name: str | re.Pattern) -> Any:
    """The row of the runs' table that has a run of this name."""
    return page.get_by_role("row").filter(has=page.get_by_role("link", name=name))


def unfold(page: Any, ui: Ui) -> None:
    """Show the arms below the ablation."""
    row(page, ui.run.info.run_name).get_by_role("button").first.click()


# -- the table of runs -----------------------------------------------------------------------------


def test_the_experiment_shows_every_stage_as_a_run_and_arms_below_theirs(ui, page, shoot) -> None:
    page.goto(f"/#/experiments/{ui.experiment_id}?{links.TRAINING}")
    for stage in ("finetune", "trak", "ablation"):
        expect(row(page, re.compile(rf"^{stage} images .*\w{{6}}$"))).to_have_count(1)
    shoot("runs")
    unfold(page, ui)
    for name in ARMS:
        expect(row(page, re.compile(f"^{name}$"))).to_have_count(1)
    shoot("runs-with-arms")


def test_the_view_of_arms_has_the_best_first_with_verdicts_and_charts(ui, page, shoot) -> None:
    page.goto(f"/{links.arms_link(ui.experiment_id, ui.run_id)}")
    expect(page.get_by_text(f"{len(ARMS)} matching runs")).to_be_visible()
    best_first = ui.table.sort_values("accuracy_mean", ascending=False, kind="stable")
    names = page.get_by_role("link", name=re.compile(f"^({'|'.join(ARMS)})$"))
    alike = best_first.groupby("accuracy_mean")["arm"].agg("|".join)  # in whatever order
    expect(names).to_have_text([re.compile(alike[mean]) for mean in best_first["accuracy_mean"]])
    for column in ("accuracy", "verdict", "accuracy_vs_random"):
        expect(page.get_by_role("columnheader", name=column, exact=True).first).to_be_visible()
    expect(page.get_by_role("gridcell", name="baseline", exact=True)).to_have_count(2)
    for mean in best_first["accuracy_mean"]:  # rounded, and not that of the last seed
        shown = page.get_by_role("gridcell", name=str(round(mean, 4)), exact=True)
        expect(shown.first).to_be_visible()
    shoot("arms")
    page.goto(f"/{links.arms_link(ui.experiment_id, ui.run_id)}&compareRunsMode=CHART")
    for name in mlflow_notes.CHARTS:
        heading = name.format("accuracy")
        expect(page.get_by_role("heading", name=heading, exact=True)).to_be_visible()
    bar = page.locator("svg text", has_text=f"{best_first['accuracy_mean'].iloc[0]:.2f}")
    expect(bar.first).to_be_visible()  # the charts are drawn
    shoot("arms-charts")


# -- the run's own page ----------------------------------------------------------------------------


def test_the_note_of_an_ablation_leads_to_its_arms_and_report(ui, page, shoot) -> None:
    page.goto(f"/{links.run_link(ui.experiment_id, ui.run_id)}")
    shoot("ablation")
    with page.context.expect_page() as opened:
        page.get_by_role("link", name="arms side by side").click()
    check_comparison(ui, opened.value)
    shoot("compare-removed", opened.value)
    with page.context.expect_page() as opened:
        page.get_by_role("link", name="Report").click()
    check_report(ui, opened.value)
    shoot("report", opened.value)


def check_comparison(ui: Ui, page: Any) -> None:
    """Arm, frac, accuracy and removed images of every run are there."""
    expect(page.get_by_text(f"Comparing {len(ARMS)} Runs")).to_be_visible()
    for parameter, values in (("arm", ui.table["arm"]), ("frac", ARMS.values())):
        line = page.get_by_role("row", name=re.compile(rf"^{parameter}\b")).first
        for value in values:
            expect(line).to_contain_text(value)
    expect(page.get_by_role("link", name="accuracy", exact=True)).to_be_attached()
    for mean in ui.table["accuracy_mean"]:  # and not that of the last seed
        shown = str(int(1000 * round(mean, 4) + 0.5) / 1000)  # as JavaScript rounds
        expect(page.get_by_text(shown, exact=True).first).to_be_attached()
    page.get_by_text("removed.png").dispatch_event("click")  # the list scrolls on its own
    pictures = page.get_by_role("img", name="removed.png")
    expect(pictures).to_have_count(len(ARMS))  # `none` has one too, or the whole section fails
    pictures.first.scroll_into_view_if_needed()


def check_report(ui: Ui, page: Any) -> None:
    """The page of the ablation's report shows it whole."""
    report = page.frame_locator("iframe")
    expect(report.get_by_role("heading").first).to_be_visible()
    for arm in ui.table["arm"]:
        expect(report.get_by_text(re.compile(rf"\b{arm}\b")).first).to_be_attached()
    for image in report.get_by_role("img").all():
        assert image.evaluate("i => i.tagName != 'IMG' || i.decode().then(() => i.naturalWidth)")
    # The pane loads it from a blob in a sandbox, where a link inside the page leads nowhere.
    assert report.locator("a[href^='#']").count() == 0


def test_the_description_of_an_ablation_shows_its_figure(ui, page, shoot) -> None:
    page.goto(f"/{links.run_link(ui.experiment_id, ui.run_id)}")
    page.get_by_text("Show more").first.click()
    figure = page.locator("img[src^='get-artifact']")
    assert figure.evaluate("image => image.decode().then(() => image.naturalWidth)") > 400
    shoot("ablation-figure")


def test_figure_and_table_are_shown_among_the_artifacts(ui, page, shoot) -> None:
    page.goto(f"/{links.run_link(ui.experiment_id, ui.run_id)}")
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_text("comparison.png", exact=True).click()
    figure = page.get_by_role("img", name="comparison.png")
    expect(figure).to_be_visible()
    assert figure.evaluate("image => image.decode().then(() => image.naturalWidth)") > 400
    shoot("comparison-figure")
    page.get_by_text("comparison.json", exact=True).click()
    for text in ("arm", "frac", "n_removed", *ui.table["arm"]):
        expect(page.get_by_text(text, exact=True)).to_be_visible()
    shoot("comparison-table")


def test_every_stage_and_arm_has_a_note(ui: Ui) -> None:
    described = [run for run in ui.place.runs() if run.data.tags.get(NOTE)]
    assert len(described) == len(ui.place.runs()) == 3 + len(ARMS)
