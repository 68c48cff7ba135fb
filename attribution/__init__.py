"""Training-data attribution for image classifiers: which examples help, which hurt, and is it so?

`attribution.load_scores("runs:/RUN_ID/scores")` reads what the trak entry point wrote.
`attribution.score(models, train, targets)` scores models of your own.
"""

from typing import Any

__all__ = ["InputError", "Scores", "load_scores", "score"]


def __getattr__(name: str) -> Any:
    # Lazy, so that importing the package stays instant.
    if name in ("Scores", "load_scores"):
        from attribution.scores import artifact

        return getattr(artifact, name)
    if name == "score":
        from attribution.scores import own_models

        return own_models.score
    if name == "InputError":
        from attribution.errors import InputError

        return InputError
    raise AttributeError(f"module 'attribution' has no attribute {name!r}")
