"""Training-data attribution for image classifiers: which examples help, which hurt, and is it so?

`attribution.load_scores("runs:/RUN_ID/scores")` reads what the trak entry point wrote.
"""

from typing import Any

__all__ = ["InputError", "Scores", "load_scores"]


def __getattr__(name: str) -> Any:
    # Lazy, so that importing the package stays instant.
    if name in ("Scores", "load_scores"):
        from attribution.scores import artifact

        return getattr(artifact, name)
    if name == "InputError":
        from attribution.errors import InputError

        return InputError
    raise AttributeError(f"module 'attribution' has no attribute {name!r}")
