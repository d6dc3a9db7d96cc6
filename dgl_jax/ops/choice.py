"""The formulations that a caller can choose between."""

OPS = ("auto", "xla")


def only_xla(ops: str) -> bool:
    """Returns whether an operation must be XLA's own, without a custom gradient.

    Raises:
      ValueError: `ops` is not one of `OPS`.
    """
    if ops not in OPS:
        raise ValueError(f"ops={ops!r}: there are {', '.join(OPS)}")
    return ops == "xla"
