"""Codecs of cached keys and values: how the numbers of one vector are stored, in fewer bytes than they came in."""

from .codec import Codec
from .coding import CODECS, CacheDtype, CacheDtypes, CodecNames, Coding, codec_names
from .floats import FloatCodec
from .int4 import Int4Codec
from .scaled import ScaledCodec

__all__ = [
    "CODECS",
    "CacheDtype",
    "CacheDtypes",
    "Codec",
    "CodecNames",
    "Coding",
    "FloatCodec",
    "Int4Codec",
    "ScaledCodec",
    "codec_names",
]
