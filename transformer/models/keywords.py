"""Deprecated TypedDicts of the options of models, derived from the configurations, which have the types now."""

from dataclasses import fields
from typing import Any, TypedDict

from .config import DecoderOnlyConfig, EncoderConfig, EncoderDecoderConfig
from .options import LayerOptions


def _keywords(name: str, options: type[LayerOptions]) -> Any:
    typed_dict: Any = TypedDict  # Type checkers know only those whose keys are written out.
    return typed_dict(name, {each.name: each.type for each in fields(options) if each.kw_only}, total=False)


OLD_KEYWORDS: dict[str, tuple[str, Any]] = {
    name: (options.__name__, _keywords(name, options))
    for name, options in {
        "LayerKeywords": LayerOptions,
        "DecoderOnlyKeywords": DecoderOnlyConfig,
        "EncoderKeywords": EncoderConfig,
        "EncoderDecoderKeywords": EncoderDecoderConfig,
    }.items()
}
"""Each old name, with the name of the configuration that has its options, and the TypedDict."""
