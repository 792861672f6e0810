"""Errors for parameters that have no exact per-example gradient, and for results that are not there."""

ADVICE = "use per_example.each (vmap of grad) instead"

FIRST_ORDER = f"per-example reports cannot be differentiated again, and a loss may not contain a gradient: {ADVICE}"


class PerExampleError(ValueError):
    """A parameter has no exact per-example gradient here, or an argument is wrong; the message names it."""


class MissingError(PerExampleError, AttributeError):
    """An attribute that is not there, so that hasattr answers too."""
