"""What a command will compute, what it reuses, and about how long that takes on this machine."""

from __future__ import annotations

from dataclasses import dataclass

from attribution.cli.disk import Need, gibibytes, total_need
from attribution.config import Config
from attribution.data.dataset import ImageData
from attribution.experiments.arms import FRAC_FREE
from attribution.experiments.methods import FEATURISING
from attribution.models.classifier import forward_flops
from attribution.models.train import seconds_per_example, stacking_pays
from attribution.runtime.device import resolve_device
from attribution.runtime.parallel import ask, resolve_jobs
from attribution.tracking.fingerprint import UPSTREAM
from attribution.tracking.stage_runs import find_finished

# Relative to a training step of one model, its kernels called one by one, as measured on two AVX-512
# cores and on an H200, which is waiting for calls then (docs/performance.md):
FEATURE_COST = {"cpu": 1.6, "cuda": 0.25}  # of an example, sketched and scored
TRAINING_GAIN = {"cpu": 1.0, "cuda": 1.5}
STACK_GAIN = {"cpu": 1.34, "cuda": 11.0}  # of small models that are trained as one
START_UP = 12.0  # seconds of a stage: worker processes import torch, artifacts are written
OVERHEAD = 1.3  # of a step: its data, the optimizer, and workers that share caches and memory


@dataclass(frozen=True)
class Step:
    """One stage of the plan; `seconds` is None where nothing is known of the machines it runs on."""

    stage: str
    what: str
    seconds: float | None


@dataclass(frozen=True)
class Chain:
    """The stages that a command will compute, first to last, after the one that it reuses, if any."""

    stages: list[str]
    reused: Step | None


@dataclass(frozen=True)
class Plan:
    """What will be computed, first to last, after what is reused, if anything is."""

    steps: list[Step]
    need: Need


def find_chain(stage: str, config: Config, data: ImageData) -> Chain:
    """What this command will compute; what is finished ends the chain."""
    stages, reused = [stage], None
    while (upstream := UPSTREAM.get(stages[0])) and not reused:
        run_id = getattr(config, f"{upstream}_run_id") or find_finished(upstream, config, data)
        if run_id:
            reused = Step(upstream, f"reuses run {run_id}", 0.0)
        else:
            stages.insert(0, upstream)
    return Chain(stages, reused)


def make_plan(chain: Chain, config: Config, data: ImageData) -> Plan:
    """How long the stages of a chain will take, and what room they need."""
    rate = 0.0 if chain.stages == ["explain"] else _rate(config, data)
    steps = [_step(name, config, data, rate) for name in chain.stages]
    need = total_need(chain.stages, config, data)
    return Plan([chain.reused, *steps] if chain.reused else steps, need)


def _step(stage: str, config: Config, data: ImageData, rate: float | None) -> Step:
    n, targets = len(data.rows("train")), len(data.rows("validation"))
    share = max(1, round(config.subset_fraction * n))
    device = resolve_device(config.device).type
    gain = STACK_GAIN[device] if stacking_pays(config) else TRAINING_GAIN[device]
    most = "at most " * bool(config.patience)
    work: float
    if stage == "finetune":
        what = f"{config.num_models} checkpoints, {most}{config.epochs} epochs of {share:,} images"
        work = config.num_models * config.epochs * share / TRAINING_GAIN[device]
    elif stage == "trak":
        images = config.num_models * (n + targets)
        what, work = f"{images:,} gradients and their scores", images * FEATURE_COST[device]
    elif stage == "explain":
        what, work = "the examples behind each prediction", 0.0
    else:
        count, size = _retrainings(stage, config, n)
        what = f"up to {count} models, {most}{config.epochs} epochs of {size:,} images"
        work = count * config.epochs * size / gain
        if stage == "evaluate" and FEATURISING.intersection(config.method_names):
            work += config.num_models * (n + targets) * FEATURE_COST[device]
    return Step(stage, what, None if rate is None else work * rate + START_UP * (work > 0))


def _retrainings(stage: str, config: Config, n: int) -> tuple[int, int]:
    """How many models are retrained, and on about how many examples each."""
    if stage == "evaluate":
        brittle = 1 + 3 * config.brittleness_targets if config.brittleness_targets else 0
        bank = 0 if config.bank else config.num_subsets * config.num_repeats
        size = (bank * config.alpha + brittle) / max(1, bank + brittle)
        return bank + brittle, round(size * n)
    free = [arm for arm in config.arm_names if arm in FRAC_FREE and arm != "none"]
    arms = [arm for arm in config.arm_names if arm not in (*FRAC_FREE, "random")]
    trials = (len(arms) + 1) * len(config.fracs) + 2 * len(free)  # each free one has its own random
    actions = 2 if config.action == "both" else 1
    return config.num_seeds * (1 + trials * actions), n


def _rate(config: Config, data: ImageData) -> float | None:
    """Seconds of one example's training step, all workers together; None where it is not known."""
    if config.backend == "ray":  # other machines' business
        return None
    seconds = ask(_seconds, config, data.class_names)
    jobs = resolve_jobs(config.jobs, resolve_device(config.device).type, 1 << 30)
    return OVERHEAD * seconds / jobs if seconds else None


def _seconds(config: Config, class_names: tuple[str, ...]) -> float | None:
    flops = forward_flops(config.model, config.image_size)
    if not flops:  # refused in a moment
        return None
    return seconds_per_example(config, class_names, flops)


def describe(plan: Plan, jobs: int) -> list[str]:
    """The plan as lines for a terminal."""
    steps = plan.steps
    width = max(len(step.stage) for step in steps)
    lines = []
    for step in steps:
        seconds = f"   about {duration(step.seconds)}" if step.seconds else ""
        lines.append(f"  {step.stage:<{width}}  {step.what}{seconds}")
    known = [step.seconds for step in steps if step.seconds is not None]
    if len(known) == len(steps) and len([s for s in known if s]) > 1:
        total = f"in all about {duration(sum(known))}, {jobs} tasks at a time"
        lines.append(f"  {total}, less what an earlier command finished")
    most, kept = plan.need.work + plan.need.artifacts, plan.need.artifacts
    lines.append(
        f"  disk: about {gibibytes(most)} while it runs, {gibibytes(kept)} of them for good"
    )
    return ["plan:", *lines]


def duration(seconds: float) -> str:
    """'40 s', '3 min', '2 h 10 min', rounded as befits an estimate."""
    if seconds < 90:
        return f"{max(10, 10 * round(seconds / 10))} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {10 * round(minutes % 60 / 10):.0f} min"
