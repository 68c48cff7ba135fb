"""How fast a command runs, compared with its plan."""

from __future__ import annotations

from dataclasses import dataclass, field

TOLERANCE = 1.5  # times as slow, or as fast, as planned: a line says so
FIRST_SECONDS, FIRST_SHARE = 30.0, 0.1  # of the tasks, before a stage is compared
LONGEST_START = 3.0  # times the planned one
# The bar of each stage whose tasks the plan counts.
STAGES = {
    "finetune: checkpoints": "finetune",
    "trak: examples featurised": "trak",
    "ablation: retrainings": "ablation",
    "bank: retrainings": "evaluate",
}


@dataclass
class Pace:
    """The plan of a command, corrected by what happens.

    Attributes:
        seconds: by stage, in order of computation.
        tasks: how many each stage has.
        workers: of each stage.
        start_up: seconds of a stage before its first task begins.
        slowness: of what runs now, relative to the first plan.
        origins: seconds and tasks from which each bar is measured.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    tasks: dict[str, float] = field(default_factory=dict)
    workers: dict[str, int] = field(default_factory=dict)
    start_up: float = 0.0
    slowness: float = 1.0
    origins: dict[str, tuple[float, float]] = field(default_factory=dict)

    def correct(self, bar: str, made: float, unit: float, left: float, elapsed: float) -> str:
        """Compare a stage with its plan. Where they differ, correct the plan and say so in a line.

        Args:
            bar: name of the progress bar.
            made: tasks finished in `elapsed` seconds, not counting those under way.
            unit: size of one that is under way, of which each worker has one; below 1, the part of a
                task after which it says how far it is.
            left: tasks to do.

        Returns:
            The line, or an empty text.
        """
        stage = STAGES.get(bar, "")
        if stage not in self.seconds:
            return ""
        total, others = made + left, (self.workers[stage] - 1) * unit
        planned = (self.seconds[stage] - self.start_up) / max(self.tasks[stage], total)
        # A busy machine starts workers slowly; parts of tasks show when they began.
        has_just_begun = unit < 1 or elapsed < LONGEST_START * self.start_up
        origin = (elapsed, made) if has_just_begun else (self.start_up, 0.0)
        first, before = self.origins.setdefault(bar, origin)
        elapsed, made = elapsed - first, made - before
        if elapsed < FIRST_SECONDS or made < FIRST_SHARE * total:
            return ""
        # All other workers may be about to finish now, or may have been at the origin.
        is_slow = elapsed > TOLERANCE * planned * (made + min(others, left))
        is_fast = TOLERANCE * elapsed < planned * (made - (others if before else 0))
        if not (is_slow or is_fast):
            return ""
        factor = elapsed / made / planned
        stages = list(self.seconds)
        ahead = stages[stages.index(stage) :]
        for name in ahead:
            self.seconds[name] = self.start_up + factor * (self.seconds[name] - self.start_up)
        more = left * factor * planned + sum(self.seconds[name] for name in ahead[1:])
        self.slowness *= factor
        slow = self.slowness
        how = f"{slow:.1f} times as long as" if slow > 1 else f"only {slow:.0%} of what was"
        return f"{stage}: takes {how} planned: about {duration(more)} more"


def duration(seconds: float) -> str:
    """'40 s', '3 min' or '2 h 10 min', rounded as an estimate should be."""
    if seconds < 90:
        return f"{max(10, 10 * round(seconds / 10))} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {10 * round(minutes % 60 / 10):.0f} min"
