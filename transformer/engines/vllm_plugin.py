"""vLLM plugin: the entry point that makes compositions of this library known to vLLM, and what vLLM cannot run."""

from ..errors import ConfigurationError
from ..models.composition import Composition

ARCHITECTURE = "ModularForCausalLM"
"""The name in `architectures` of config.json. Importing this package has registered its classes with transformers."""


def register() -> None:
    """Gives vLLM the class for `ModularForCausalLM`, by name; vLLM imports it when a model asks for it.

    vLLM calls this by the entry point `vllm.general_plugins` in each of its processes. It may be called twice. Without
    vLLM it does nothing.
    """
    try:
        from vllm import ModelRegistry
    except ModuleNotFoundError:
        return
    ModelRegistry.register_model(ARCHITECTURE, "transformer.engines.vllm_model:TransformersForCausalLM")


def check_layers(composition: Composition, ranks: int = 1) -> None:
    """Raises ConfigurationError, naming option and layer, for layers that vLLM cannot run on so many ranks.

    vLLM has the number and the size of heads and the soft cap of scores once per model. It gives each rank as many
    key/value heads, or each of them to as many ranks. `composition` is expanded: it has the options of each layer.
    """
    kinds = [
        {
            "num_heads": options.num_heads,
            "num_kv_heads": options.kv_heads,
            "head_dim": options.head_dim or options.d_model // options.num_heads,
            "softcap": options.softcap,
        }
        for options in (layer.options for layer in composition.layers)
    ]
    for index, kind in enumerate(kinds):
        for name, expected in kinds[0].items():
            if kind[name] != expected:
                raise ConfigurationError(
                    f"{name}: expected {expected} in all layers, as in layer 0, because vLLM has one {name} per model, "
                    f"got {kind[name]} in layer {index}; run this model in transformers or with its own generate"
                )
    for index, layer in enumerate(composition.layers):
        heads, width = layer.options.kv_heads, layer.options.d_ff
        if heads % ranks and ranks % heads:
            raise ConfigurationError(
                f"num_kv_heads: expected a multiple or a divisor of tensor_parallel_size={ranks}, got {heads} in layer "
                f"{index}; convert the model with to_gqa, or use another number of ranks"
            )
        if width % ranks:
            raise ConfigurationError(
                f"d_ff: expected a multiple of tensor_parallel_size={ranks}, got {width} in layer {index}; use another "
                "number of ranks"
            )
