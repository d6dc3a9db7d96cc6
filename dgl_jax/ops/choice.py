"""Names of the formulations that callers choose between."""

OPS = ("auto", "xla", "joint")


def only_xla(ops: str) -> bool:
    """Returns True if an operation must use XLA alone, without a custom gradient.

    Raises:
      ValueError: `ops` is not one of `OPS`.
    """
    if ops not in OPS:
        raise ValueError(f"ops={ops!r}: must be one of {', '.join(OPS)}")
    return ops == "xla"
