"""Compositions of this library inside other engines: transformers, vLLM, and exported programs.

Needs the extra `engines`. Importing it registers the classes with transformers' Auto classes.
"""

from ..extras import missing

try:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
except ModuleNotFoundError as error:
    raise missing("engines", "transformer.engines", error) from error

from .attention_function import register_attention
from .cache import TransformersCache
from .causal_lm import ModularForCausalLM
from .config import ModularConfig, NativeConfig
from .decode_step import DecodeStep, EncodeStep, decode_step, encode_step
from .modeling import ModularModel
from .sharing import as_pretrained, from_pretrained_weights

__all__ = [
    "DecodeStep",
    "EncodeStep",
    "ModularConfig",
    "ModularForCausalLM",
    "ModularModel",
    "TransformersCache",
    "as_pretrained",
    "decode_step",
    "encode_step",
    "from_pretrained_weights",
    "register_attention",
]

for _config in (ModularConfig, NativeConfig):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
AutoModel.register(ModularConfig, ModularModel, exist_ok=True)
AutoModelForCausalLM.register(ModularConfig, ModularForCausalLM, exist_ok=True)
