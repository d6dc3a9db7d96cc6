"""Channels in groups, as the codecs that work on groups cut them."""

from dgl_jax.errors import UserError


def check_dims(dims: int, channels: int) -> int:
    """How many groups of so many channels there are.

    Raises:
      UserError: the channels do not divide.
    """
    if dims < 1 or channels % dims:
        fits = [d for d in range(1, channels + 1) if channels % d == 0]
        near = sorted(sorted(fits, key=lambda d: abs(d - dims))[:3])
        raise UserError(f"config.codec.dims={dims}: does not divide {channels} channels; {', '.join(map(str, near))} would do")
    return channels // dims
