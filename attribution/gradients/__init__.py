"""Exact per-sample gradients of a classifier, and a random sketch of them; imports nothing of the project.

per_sample.capture gives the gradients, sketch.Sketch their projection. Both raise GradientError.
"""


class GradientError(ValueError):
    """The model or its input would make a gradient wrong or incomplete; the message names the part."""
