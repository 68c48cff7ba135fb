"""Training-data attribution for image classifiers: which examples help, which hurt, and is it so?

`attribution.load_scores("runs:/RUN_ID/scores")` reads what the trak entry point wrote.
`attribution.score(models, train, targets)` scores models of your own.
"""

from importlib import import_module
from typing import Any

# Imported when they are used, so that importing the package stays instant.
_MODULES = {
    "InputError": "errors",
    "Scores": "scores.artifact",
    "load_scores": "scores.artifact",
    "score": "scores.own_models",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'attribution' has no attribute {name!r}")
    return getattr(import_module(f"attribution.{_MODULES[name]}"), name)
