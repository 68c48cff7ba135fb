"""Why did the model predict this? The training examples behind targets, mistakes, or any picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from attribution.cli import outputs
from attribution.cli.command import main
from attribution.errors import InputError
from attribution.runtime.progress import say
from attribution.tracking import stage_runs
from scripts import finetune, trak

if TYPE_CHECKING:
    from attribution.config import Config
    from attribution.data.dataset import ImageData
    from attribution.scores.explanation import Explanation

DEFAULT_ERRORS = 6


def make(config: Config, data: ImageData) -> None:
    """Find or compute scores, and log a gallery for everything that is to be explained."""
    import mlflow
    import pandas as pd

    from attribution.reporting import figures
    from attribution.reporting import html as pages
    from attribution.scores import explanation

    explanation.check(config, data)  # refused before any training
    trak_id = stage_runs.obtain("trak", config, data, trak.make)
    finetune_id = stage_runs.run_tags(trak_id)["finetune_run_id"]
    if config.image:  # which needs the checkpoints themselves
        finetune_id = finetune.obtain_of(trak_id, config, data)
    mlflow.set_tag("finetune_run_id", finetune_id)
    found = explain(config, data, trak_id, finetune_id)
    with stage_runs.artifact_folder() as folder:
        for each in found:
            name = stage_runs.file_name(Path(each.name).stem)
            figures.explanation(data, each, folder / f"explanation-{name}.png")
        run_ids = {"trak run": trak_id, "finetune run": finetune_id}
        page = pages.explanations(data, found, run_ids)
        (folder / "explanation.html").write_text(page, encoding="utf-8")
    table = pd.concat([each.table() for each in found], ignore_index=True)
    stage_runs.log_table(table, "explanation")


def explain(config: Config, data: ImageData, trak_id: str, finetune_id: str) -> list[Explanation]:
    """The picture, the targets, and the most confident mistakes that were asked for."""
    from attribution.models.ensemble import Ensemble
    from attribution.scores import explanation
    from attribution.scores.artifact import load_scores
    from attribution.scores.stored_features import load_features

    scores = load_scores(stage_runs.artifact_path(trak_id, "scores"))
    found, targets = [], list(dict.fromkeys(config.target_numbers))
    if config.image:
        try:
            folder = stage_runs.artifact_path(trak_id, "features")
        except InputError:
            raise InputError(
                f"trak_run_id={trak_id}: has no stored features, which image needs; make the scores "
                "with keep_features=yes"
            ) from None
        checkpoints = finetune.checkpoint_folders(finetune_id, config.num_models)
        stored = load_features(folder)
        found.append(explanation.explain_picture(config, data, scores, stored, checkpoints))
    members = Ensemble.load(stage_runs.artifact_path(finetune_id, "training/logits.npz"))
    probabilities = members.validation_probabilities()
    errors = config.errors or DEFAULT_ERRORS * (not (found or targets))
    labels = data.labels("validation")
    mistakes = explanation.confident_mistakes(probabilities, labels, errors)
    targets += [target for target in mistakes if target not in targets]
    if not (found or targets):
        raise InputError(f"errors={errors}: the ensemble makes no mistake on targets; use target=0")
    return found + explanation.explain_targets(
        data, scores, probabilities, targets, config.num_examples
    )


def show(run_id: str, config: Config) -> None:
    """Print what was found, save it where asked, and say where the page is."""
    import pandas as pd

    from attribution.reporting import terminal

    file = stage_runs.artifact_path(run_id, "explanation.csv")
    words = ("explained", "explained_label", "predicted", "file_name", "example_id", "label_name")
    table = pd.read_csv(file, dtype=dict.fromkeys(words, str), keep_default_na=False)
    terminal.print_explanations(table)
    page = stage_runs.artifact_path(run_id, "explanation.html")
    if config.output:
        saved = outputs.save_artifacts(run_id, config, (".html", ".png", ".csv"))
        page = saved / page.name
    print(f"explain run: {run_id}")
    say(f"next: open {page}")


def files(config: Config) -> list[Path]:
    """What `show` saves."""
    names = ("explanation.html", "explanation.csv") if config.output else ()
    return [Path(config.output).expanduser() / name for name in names]


if __name__ == "__main__":
    main("explain", make, show, files)
