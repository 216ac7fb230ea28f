"""Plan of tensor parallelism: the layers of a model that are cut into rows or columns, one share a rank.

Megatron's cut (arXiv 1909.08053): a rank has a share of the heads and of the hidden units, and the output of each
attention module and feed-forward network is summed over the ranks once.
"""

from collections.abc import Iterator
from typing import cast

from torch import nn

from ..attention import Attention
from ..blocks import FeedForward, GatedFeedForward
from ..errors import ArgumentError
from ..models import DecoderOnlyTransformer, LanguageHead, TokenEmbedding

COLWISE = "colwise"
"""A rank has some of the outputs: rows of the weight [out, in] and of the bias. The input is whole."""
ROWWISE = "rowwise"
"""A rank has some of the inputs: columns of the weight. The outputs are summed over the ranks, the bias added once."""
COLWISE_GATHER_OUTPUT = "colwise_gather_output"
"""As `colwise`, and the outputs of all ranks are joined."""
GRAD_ALLREDUCE = "replicated_with_grad_allreduce"
"""Whole on each rank, but applied to the rank's share, so that gradients are summed over the ranks."""
EMBEDDING_ROWWISE = "embedding_rowwise"
"""A rank has some of the tokens: rows of the table. What ranks look up is summed over them."""


def tensor_plan(model: nn.Module) -> dict[str, str]:
    """Words for the modules of `model` that tensor parallelism changes; other modules are whole on each rank.

    The words are those of transformers, which vLLM reads too: "colwise", "rowwise", "colwise_gather_output",
    "embedding_rowwise" and "replicated_with_grad_allreduce". A key is the path of a module in `model`, such as
    "head.proj". A `*` stands for the number of a layer, such as "decoder.blocks.*.attention.q_proj", where all layers
    say the same.

    Modules are found by class: attention modules, `FeedForward`, `GatedFeedForward`, token embeddings and language
    heads, alone or anywhere in a model, an encoder-decoder or a composition of other modules; also a
    `DecoderOnlyTransformer`'s head that is an `nn.Linear` and the table of its embedding, and a table that is the
    weight of a head. The biases per head of ALiBi and of relative positions are no layers and have no word, nor have
    norms of queries and keys over all heads together: `parallelize`, which executes the plan, cuts them with the heads.

    Raises ArgumentError where `model` has no such module.
    """
    words = words_of(model)
    said: dict[str, set[str | None]] = {}
    for path, _ in model.named_modules(remove_duplicate=False):
        said.setdefault(_pattern(path), set()).add(words.get(path))
    plan: dict[str, str] = {}
    for path, word in words.items():
        pattern = _pattern(path)
        plan[pattern if len(said[pattern]) == 1 else path] = word
    return plan


def words_of(model: nn.Module) -> dict[str, str]:
    """The word of each module that is cut, by its path; a module that stands in two places has two paths.

    Raises ArgumentError where there is none.
    """
    words = _words(model) if isinstance(cast("object", model), nn.Module) else {}
    if not words:
        raise ArgumentError(
            "model: expected a module with attention, feed-forward networks, a token embedding or a language head of "
            f"this library in it, got {type(model).__name__}; for another model use its own plan"
        )
    return words


def _words(model: nn.Module) -> dict[str, str]:
    modules = dict(model.named_modules(remove_duplicate=False))
    words: dict[str, str] = {}
    for path, module in modules.items():
        words.update((f"{path}.{name}" if path else name, word) for name, word in _words_of_children(module))
    heads = [modules.get(path) for path, word in words.items() if word == COLWISE_GATHER_OUTPUT]
    tied = {id(head._parameters.get("weight")) for head in heads if head is not None} - {id(None)}
    for path, module in modules.items():
        if isinstance(module, nn.Embedding) and id(module._parameters.get("weight")) in tied:
            words[path] = EMBEDDING_ROWWISE
    return words


def _words_of_children(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Names and words of the modules inside one module that it knows."""
    if isinstance(module, Attention):
        yield from (("q_proj", COLWISE), ("k_proj", COLWISE), ("v_proj", COLWISE), ("out_proj", ROWWISE))
        for name in ("q_norm", "k_norm"):
            if module._modules.get(name) is not None and module.qk_norm_per_head:
                yield name, GRAD_ALLREDUCE
    elif isinstance(module, FeedForward | GatedFeedForward):
        if isinstance(module, GatedFeedForward):
            yield "gate_proj", COLWISE
        yield from (("up_proj", COLWISE), ("down_proj", ROWWISE))
    elif isinstance(module, TokenEmbedding):
        yield "tokens", EMBEDDING_ROWWISE
    elif isinstance(module, LanguageHead):
        yield "proj", COLWISE_GATHER_OUTPUT
    elif isinstance(module, DecoderOnlyTransformer):
        # By parts: typed as a token embedding and a language head.
        if isinstance(module._modules["head"], nn.Linear):
            yield "head", COLWISE_GATHER_OUTPUT
        tables = [name for name, each in module.embedding.named_modules() if isinstance(each, nn.Embedding)]
        if len(tables) == 1:
            yield f"embedding.{tables[0]}".rstrip("."), EMBEDDING_ROWWISE


def _pattern(path: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in path.split("."))
