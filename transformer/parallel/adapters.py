"""LoRA adapters of PEFT (arXiv 2106.09685) on projections: their matrices are cut as the projection is.

Of a projection cut by outputs, A is whole and B is cut by outputs. Of one cut by inputs, A is cut by inputs, its few
outputs are summed over the ranks, and B is whole.
"""

import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import ArgumentError
from .plan import COLWISE, ROWWISE

WHOLE_BEFORE_SHARE, WHOLE_AFTER_SUM = "whole, before the rank's share", "whole, after a sum"
"""Words for matrices of adapters, beside those of the plan. Gradients of the first are summed over the ranks."""

MATRICES = {COLWISE: (WHOLE_BEFORE_SHARE, COLWISE), ROWWISE: (ROWWISE, WHOLE_AFTER_SUM)}
"""The words of A and of B, by the word of the projection."""


def adapted_words(modules: Mapping[str, nn.Module], words: Mapping[str, str]) -> dict[str, str]:
    """The words of these modules by path, with the layers of adapters in the place of what has one.

    Raises ArgumentError for an adapter whose parts cannot be cut.
    """
    # Where PEFT is not imported, nothing is adapted.
    lora = sys.modules.get("peft.tuners.lora.layer")
    found: dict[str, str] = {}
    for path, word in words.items():
        module = modules.get(path)
        if lora is None or not isinstance(module, lora.LoraLayer) or not isinstance(module, nn.Module):
            found[path] = word
            continue
        if isinstance(module, lora.Embedding):
            # Its matrices are applied to what the ranks have summed.
            found[f"{path}.base_layer"] = word
            continue
        adapter: Any = module
        plain = type(module) is lora.Linear and not adapter.lora_variant and not any(adapter.lora_bias.values())
        if not plain or word not in MATRICES:
            raise ArgumentError(
                f"{path}: expected no adapter, or plain LoRA on a projection of attention or of a feed-forward "
                f"network, got {type(module).__name__} there; merge it first (merge_and_unload)"
            )
        found[f"{path}.base_layer"] = word
        for matrix, its_word in zip(("lora_A", "lora_B"), MATRICES[word], strict=True):
            found.update((f"{path}.{matrix}.{name}", its_word) for name in getattr(module, matrix))
    return found
