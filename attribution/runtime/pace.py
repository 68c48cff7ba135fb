"""How fast a command runs, compared with its plan, which is made for an idle machine."""

from __future__ import annotations

from dataclasses import dataclass, field

TOLERANCE = 1.5  # times as slow, or as fast, as planned: a line says so
FIRST_SECONDS = 30.0  # of a progress bar, before it is compared
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
    """

    seconds: dict[str, float] = field(default_factory=dict)
    tasks: dict[str, float] = field(default_factory=dict)
    workers: dict[str, int] = field(default_factory=dict)
    start_up: float = 0.0

    def correct(self, bar: str, made: float, unit: float, left: float, elapsed: float) -> str:
        """Compare a stage with its plan. Where they differ, correct the plan and say so in a line.

        Args:
            bar: name of the progress bar.
            made: tasks finished in `elapsed` seconds, not counting those under way.
            unit: size of one that is under way, of which each worker has one.
            left: tasks to do.

        Returns:
            The line, or an empty text.
        """
        stage = STAGES.get(bar, "")
        if stage not in self.seconds or elapsed < FIRST_SECONDS or not made:
            return ""
        planned = (self.seconds[stage] - self.start_up) / max(self.tasks[stage], made + left)
        most = elapsed / made
        # Perhaps there was a start, and all other workers are about to finish too.
        under_way = min((self.workers[stage] - 1) * unit, left)
        least = (elapsed - self.start_up) / (made + under_way)
        if least <= TOLERANCE * planned and most * TOLERANCE >= planned:
            return ""
        factor = (least + most) / 2 / planned
        stages = list(self.seconds)
        ahead = stages[stages.index(stage) :]
        for name in ahead:
            self.seconds[name] = self.start_up + factor * (self.seconds[name] - self.start_up)
        more = left * factor * planned + sum(self.seconds[name] for name in ahead[1:])
        how = f"{factor:.1f} times as long as" if factor > 1 else f"only {factor:.0%} of what was"
        return f"{stage}: takes {how} planned: about {duration(more)} more"


def duration(seconds: float) -> str:
    """'40 s', '3 min' or '2 h 10 min', rounded as an estimate should be."""
    if seconds < 90:
        return f"{max(10, 10 * round(seconds / 10))} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {10 * round(minutes % 60 / 10):.0f} min"
