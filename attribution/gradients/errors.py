"""The exception of this package."""


class GradientError(ValueError):
    """The model or its input would make a gradient wrong or incomplete; the message names the part."""
