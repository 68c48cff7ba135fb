"""Why did the model predict this? The training examples behind targets, mistakes, or any picture."""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("error: type python -m scripts.explain, in the project's folder")

from attribution.cli.main import main

if __name__ == "__main__":  # before the imports that take seconds: --help needs none of them
    main("explain")

from pathlib import Path

import pandas as pd

from attribution.cli import next_steps
from attribution.cli.outputs import refuse_existing, save
from attribution.cli.plan import Estimate
from attribution.config import Config
from attribution.data.dataset import ImageData
from attribution.errors import InputError
from attribution.models.ensemble import Ensemble
from attribution.reporting import figures, html, terminal
from attribution.scores import explanation
from attribution.scores.explanation import Explanation
from attribution.scores.stored_features import StoredFeatures, load_features
from attribution.stages import STAGES
from attribution.tracking.artifacts import address, artifact_names, artifact_path
from attribution.tracking.job import Job, Upstream
from attribution.tracking.names import file_name
from attribution.tracking.record import Record
from scripts.finetune import LOGITS, warn_of_other_checkpoints

SAVED = (".html", ".png", ".csv")


def check(config: Config, data: ImageData) -> None:
    """Refuse targets, labels and pictures that cannot be explained, before anything is trained."""
    explanation.check(config, data)


def estimate(config: Config, data: ImageData) -> Estimate:
    """Hardly any work."""
    return Estimate("the examples behind each prediction")


def run(job: Job) -> list[Explanation]:
    """Find the training examples that raised and lowered each margin most."""
    config, data, scored = job.config, job.data, job.result("trak")
    if "finetune" in job.upstream:
        members = job.result("finetune").members
    else:
        members = Ensemble.load(artifact_path(job.run_ids["finetune"], LOGITS), data)
    if not config.image or config.exact == "yes":
        return explanation.explain(config, data, scored.scores, members)
    warn_of_other_checkpoints(job)
    stored = scored.features or _stored_features(job.upstream["trak"])
    return explanation.explain(
        config, data, scored.scores, members, stored, job.result("finetune").folders
    )


def _stored_features(trak: Upstream) -> StoredFeatures:
    try:
        return load_features(artifact_path(trak.run_id, "features"))
    except InputError as error:
        raise InputError(
            f"trak_run_id={trak.run_id}: has no stored features, which image needs; make the "
            f"scores with keep_features=yes ({error})"
        ) from None


def record(job: Job, result: list[Explanation]) -> Record:
    """A page, a table, a note, and a figure for each prediction."""

    def write(folder: Path) -> None:
        for each in result:
            file = folder / f"explanation-{file_name(Path(each.name).stem)}.png"
            figures.save(figures.explanation(job.data, each), file)
        run_ids = {f"{stage} run": run_id for stage, run_id in job.run_ids.items()}
        page = html.explanations(job.data, result, run_ids)
        (folder / "explanation.html").write_text(page, encoding="utf-8")

    table = _table(result)
    lines = [f"- `{line}`" for line in terminal.explanation_lines(table)]
    note = "\n".join([STAGES["explain"].note, "", *lines])
    return Record(tables={"explanation": table}, write=write, note=lambda _: note)


def _table(result: list[Explanation]) -> pd.DataFrame:
    return pd.concat([each.table() for each in result], ignore_index=True)


def load(run_id: str, config: Config, data: ImageData) -> pd.DataFrame:
    """The table of an earlier run."""
    words = (
        "explained", "explained_label", "predicted", "agreement", "effect", "warnings", "file_name",
        "example_id", "label_name",
    )  # fmt: skip
    file = artifact_path(run_id, "explanation.csv")
    return pd.read_csv(file, dtype=dict.fromkeys(words, str), keep_default_na=False)


def outputs(config: Config) -> list[Path]:
    """The files that `show` writes outside MLflow, beside the figures."""
    names = ("explanation.html", "explanation.csv") if config.output else ()
    return [Path(config.output).expanduser() / name for name in names]


def show(done: Upstream, config: Config, data: ImageData) -> None:
    """Print what was found, save it if asked to, and say where the page is."""
    result = done.result
    terminal.print_explanations(result if isinstance(result, pd.DataFrame) else _table(result))
    page = address(done.run_id, "explanation.html")
    if config.output:
        folder = Path(config.output).expanduser()
        names = [name for name in artifact_names(done.run_id) if name.endswith(SAVED)]
        refuse_existing([folder / name for name in names], config)
        for name in names:
            save(artifact_path(done.run_id, name).read_bytes(), folder / name)
        page = str(folder / "explanation.html")
    print(f"explain run: {done.run_id}")
    next_steps.say_next("To see the examples behind each prediction, open:", page)
