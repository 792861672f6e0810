"""What is said where a parameter cannot be covered exactly."""

ADVICE = "use per_example.each (vmap of grad) instead"

FIRST_ORDER = f"per-example reports cannot be differentiated again, and a loss may not contain a gradient: {ADVICE}"


class PerExampleError(ValueError):
    """What has no exact per-example gradient here; it names the parameter."""
