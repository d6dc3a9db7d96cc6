"""Codecs: how a message's payload is encoded on the wire and in replay rings."""

from dgl_jax.codecs.base import (
    Codec,
    CodecKind,
    GroupOptions,
    Stateless,
    check_dims,
    encode_and_learn,
    encode_message,
    make_codec,
    relative_error,
)
from dgl_jax.codecs.bf16 import Bf16
from dgl_jax.codecs.identity import Identity
from dgl_jax.codecs.int8 import Int8
from dgl_jax.codecs.residual import Vq, VqOptions
from dgl_jax.config.registry import CODECS

register_codec = CODECS.register

__all__ = [
    "CODECS",
    "Bf16",
    "Codec",
    "CodecKind",
    "GroupOptions",
    "Identity",
    "Int8",
    "Stateless",
    "Vq",
    "VqOptions",
    "check_dims",
    "encode_and_learn",
    "encode_message",
    "make_codec",
    "register_codec",
    "relative_error",
]
