"""What a codec without a codebook answers where one is asked for."""

from typing import Any

import jax
from jaxtyping import Array, Float, Int


class Stateless:
    """Learns nothing and publishes nothing."""

    def init(self, activations: jax.ShapeDtypeStruct) -> tuple[()]:
        """Nothing."""
        return ()

    def publish(self, state: Any, key: Array, activations: Float[Array, "B ..."], updates: Int[Array, ""]) -> tuple[()]:
        """Nothing."""
        return ()

    def update(self, state: Any, key: Array, activations: Float[Array, "B ..."]) -> tuple[tuple[()], dict[str, Array]]:
        """Nothing."""
        return (), {}

    def codebook(self, state: Any) -> tuple[()]:
        """None."""
        return ()

    def period(self, activations: Any) -> int:
        """Never."""
        return 0
