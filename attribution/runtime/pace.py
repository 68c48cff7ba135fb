"""How long a command still takes: by its plan, corrected by the rate at which tasks really end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# A stage that was planned shorter is mostly start-up, and says little of others.
SHORT_SECONDS = 30.0
# The bar of each stage whose tasks take most of its time.
STAGES = {
    "finetune: checkpoints": "finetune",
    "trak: examples featurised": "trak",
    "ablation: retrainings": "ablation",
    "bank: retrainings": "evaluate",
}


@dataclass(frozen=True)
class Pace:
    """The plan of a command.

    Attributes:
        seconds: by stage, in order of computation.
    """

    seconds: Mapping[str, float] = field(default_factory=dict)

    def left(self, bar: str, made: float, left: float, elapsed: float) -> tuple[float, float]:
        """Seconds until a progress bar is full, and until the command ends.

        Tasks go on as fast as they did. Later stages take as much longer, or shorter, than planned as
        this one does.

        Args:
            bar: its name.
            made: tasks finished in `elapsed` seconds, above 0.
            left: tasks to do.
        """
        own, stages = elapsed / made * left, list(self.seconds)
        stage = STAGES.get(bar, "")
        if stage not in stages:
            return own, own
        later = sum(self.seconds[name] for name in stages[stages.index(stage) + 1 :])
        planned = self.seconds[stage]
        slowness = (elapsed + own) / planned if planned > SHORT_SECONDS else 1.0
        return own, own + slowness * later


def duration(seconds: float) -> str:
    """'40 s', '3 min' or '2 h 10 min', rounded as an estimate should be."""
    if seconds < 90:
        return f"{max(10, 10 * round(seconds / 10))} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, tens = divmod(round(minutes / 10), 6)
    return f"{hours} h {10 * tens} min"
