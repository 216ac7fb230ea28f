"""Model class for vLLM: its Transformers backend, with the windows, scales and refusals of our compositions.

Needs vLLM, so that nothing imports this module but vLLM itself, by the name that `vllm_plugin.py` registers.
"""

from collections.abc import Callable
from typing import Any

from vllm.model_executor.models.transformers import TransformersForCausalLM as Backend
from vllm.model_executor.models.utils import extract_layer_index

from ..errors import ConfigurationError
from .attention import ModularAttention
from .vllm_plugin import check_layers


# vLLM compares the name of the class with that of its backend, and leaves out some of its passes under another one.
class TransformersForCausalLM(Backend):  # type: ignore[misc]
    """vLLM's backend for models of transformers, with what a configuration for it cannot say.

    Each layer has its own window, where the backend knows one size for all. Raises ConfigurationError as `check_layers`
    does.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        whole = vllm_config.model_config.hf_config.composition().expanded()
        check_layers(whole, vllm_config.parallel_config.tensor_parallel_size)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._check_windows()
        options = whole.config
        if self.pp_group.is_last_rank and options.logit_softcap is not None:
            # vLLM scales capped logits, and we cap scaled ones: the same function with this cap.
            self.logits_processor.soft_cap = options.logit_softcap / options.logit_scale

    def _get_attn_cls(self) -> Callable[..., Any]:
        kind = super()._get_attn_cls()
        windows = self.config.layer_windows

        def with_window(**options: Any) -> Any:
            options["per_layer_sliding_window"] = windows[extract_layer_index(options["prefix"])]
            return kind(**options)

        return with_window

    def _check_windows(self) -> None:
        """Raises ConfigurationError where this release of vLLM did not take the windows."""
        windows = self.config.layer_windows
        for module in self.model.modules():
            if isinstance(module, ModularAttention):
                expected, got = windows[module.layer_idx], getattr(module.attn, "sliding_window", None)
                if got != expected:
                    raise ConfigurationError(
                        f"window_size: expected {expected} in layer {module.layer_idx}, but this release of vLLM uses "
                        f"{got} there; use a release that docs/engines.md names"
                    )
