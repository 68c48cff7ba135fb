"""Exact per-sample gradients of a classifier, and a random sketch of them; imports nothing of the project.

per_sample.capture gives the gradients, sketch.Sketch their projection. Both raise GradientError.
"""

from attribution.gradients.errors import GradientError

__all__ = ["GradientError"]
