"""What an ablation leaves in MLflow: tables and report in its own run, a nested run for each arm."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from attribution.data.dataset import ImageData
from attribution.experiments.arms import kept_table, removal_metrics, removed_table, trial_name
from attribution.experiments.comparison import Comparison
from attribution.experiments.names import ARM_SPECS
from attribution.experiments.outcome import Outcome
from attribution.experiments.statistics import detection_metrics
from attribution.experiments.verdicts import BETTER, CONTROLS, headline_of
from attribution.reporting import ablation_html, answer, figures, mlflow_notes
from attribution.runtime import machine
from attribution.tracking.artifacts import server_page
from attribution.tracking.job import Job
from attribution.tracking.links import arms_link, artifact_link, compare_link, run_link
from attribution.tracking.record import Record
from attribution.tracking.run_lifecycle import experiment_of
from attribution.tracking.stage_runs import NOTE

# The figures of an arm that stand first: of the accuracy those without random, of the headline all.
HEADLINE = (
    "_mean", "_ci_low", "_ci_high",
    "_vs_random", "_vs_random_ci_low", "_vs_random_ci_high", "_vs_random_p_holm",
)  # fmt: skip
MOST_ARMS = 40  # in the link of a note: MLflow cuts off what is longer than 8,000 characters


def make(job: Job, result: Comparison) -> Record:
    """Everything that the comparison leaves in its run."""
    name, view = mlflow_notes.arms_view(job.run_id, headline_of(result.table))
    evidence = result.evidence
    doubts = {"trust": evidence["stored_trust"].to_numpy(), "loss": -evidence["loss"].to_numpy()}
    flips = detection_metrics(evidence["is_flipped"].to_numpy(), doubts)
    top = answer.best(result.table)
    best = "" if top is None else trial_name(top["arm"], top["action"], top["frac"])
    return Record(
        tags={"best_arm": best or "no arm"},
        metrics=_overall(result) | flips,
        tables={
            "comparison": result.table,
            "contrasts": result.contrasts,
            "per_class": result.per_class,
        },
        write=partial(_write, job, result),
        children=[
            _arm(job.data, result, outcome, words)
            for outcome, words in zip(result.outcomes, result.table["verdict"], strict=True)
        ],
        note=partial(_note, job, result),
        experiment_tags={name: view},
    )


def _write(job: Job, result: Comparison, folder: Path) -> None:
    """The figures and the report."""
    figures.save(figures.comparison(result.table), folder / "comparison.png")
    figures.save(figures.removal_curves(result.table), folder / "curves.png")
    ids = {"ablation": job.run_id, **job.run_ids}
    runs = {
        f"{stage} run": (run_id, server_page(run_link(experiment_of(run_id), run_id)))
        for stage, run_id in ids.items()
    }
    page = ablation_html.page(job.config, job.data, result, folder, runs, machine.hardware())
    (folder / "report.html").write_text(page, encoding="utf-8")


def _arm(data: ImageData, result: Comparison, outcome: Outcome, words: str) -> Record:
    """The nested run of one trial: its metrics by seed, their summary, and what it removed.

    Args:
        words: the verdict.
    """
    trial = outcome.trial
    spec = ARM_SPECS[trial.arm]

    def write(folder: Path) -> None:
        removed = removed_table(trial, result.evidence)
        # Of `none` too: MLflow's comparison page breaks if one of its runs has no artifact.
        removed.to_parquet(folder / "removed.parquet", index=False)
        if trial.arm != "none" and not spec.is_drawn and trial.action == "remove":
            kept_table(trial, result.evidence).to_csv(folder / "kept.csv", index=False)
        gallery = figures.removed_gallery(data, removed, trial.name, spec.order)
        figures.save(gallery, folder / "removed.png")

    note = f"{spec.about}\n\nVerdict: {words}. {outcome.warning or ''} {mlflow_notes.ARM}"
    return Record(
        name=trial.name,
        tags={"stage": "ablation_arm", "arm": trial.arm, "verdict": words, NOTE: note},
        params={
            "arm": trial.arm,
            "frac": f"{trial.frac:.6g}",
            "action": trial.action,
            "n_removed": trial.size,
        },
        series=[
            (f"seed/{name}", value, seed)
            for name, values in outcome.per_seed.items()
            for seed, value in enumerate(values)
        ],
        metrics=headline(outcome.summary, outcome.metric) | removal_metrics(trial, result.evidence),
        write=write,
    )


def headline(summary: dict[str, float], metric: str = "accuracy") -> dict[str, float]:
    """A trial's summary as metrics: a few that everybody compares, rounded; the rest below `more/`.

    MLflow's tables and its comparison show every digit, and fold names with a slash away.
    """
    first = {f"accuracy{end}" for end in HEADLINE[:3]} | {f"{metric}{end}" for end in HEADLINE}
    found = {}
    for name, value in summary.items():
        if name in first:
            digits = ".2g" if name.endswith("_p_holm") else ".4f"
            found[name.removesuffix("_mean")] = float(f"{value:{digits}}")
        else:
            found[f"more/{name}"] = value
    return found


def _overall(result: Comparison) -> dict[str, float]:
    """Metrics of the comparison as a whole: its baseline, its arms, and the best one's gain."""
    table, metric = result.table, headline_of(result.table)
    none, judged = table[table["arm"] == "none"].iloc[0], answer.judged(table)
    found = {
        "accuracy_none": none["accuracy_mean"],
        f"{metric}_none": none[f"{metric}_mean"],
        "n_arms": len(judged),
        "n_better_than_random": (judged["verdict"] == BETTER).sum(),
    }
    top = answer.best(table)
    if top is not None:
        best = "best" if metric == "accuracy" else f"best_{metric}"
        found |= {f"{best}_vs_{name}": top[f"{metric}_vs_{name}"] for name in CONTROLS}
    for row in result.contrasts.to_dict("records"):
        name = f"contrast/{row['contrast']}"
        found[name] = row["difference"]
        found |= {f"{name}_{end}": row[end] for end in ("ci_low", "ci_high", "p_holm")}
    return {name: round(float(value), 4) for name, value in found.items()}


def _note(job: Job, result: Comparison, children: list[str]) -> str:
    """The note on the run's page: where to look, the answer, and the figure."""
    here, mean = job.experiment_id, result.table[f"{headline_of(result.table)}_mean"]
    best_first = (-mean).argsort(kind="stable")[:MOST_ARMS]
    links = {
        "Report": run_link(here, job.run_id, "report.html"),
        "arms, best first": arms_link(here, job.run_id),
        "arms side by side": compare_link(here, [children[i] for i in best_first]),
        "scores": run_link(here, job.run_ids["trak"]),
    }
    first = " · ".join(f"[{text}]({to})" for text, to in links.items())
    figure = f"![Test result of each arm]({artifact_link(job.run_id, 'comparison.png')})"
    # The links come first: MLflow folds the rest of a long note away.
    return "\n\n".join([first, answer.short(result.table), figure])
