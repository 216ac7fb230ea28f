"""Linear layers of which a rank has some of the outputs, or of the inputs, under the names of Megatron's (arXiv
1909.08053). Parameters are DTensors; tensors of a call are plain."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from ..errors import ArgumentError
from ..generation.shared_by_ranks import SharedByRanks
from .parts import LocalWeights, Reader, local
from .ranks import Ranks


class LocalLinear(LocalWeights, nn.Linear):
    """A linear layer that computes with this rank's parameters. Its sizes and parameters are those of the whole."""

    ranks: Ranks
    read: Reader


class ReplicatedLinear(LocalLinear):
    """A linear layer that is whole on each rank."""

    token_wise = True

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., in] to [..., out]."""
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        return F.linear(x, self.read(weight), self.read(bias))  # type: ignore[arg-type]


class ColumnParallelLinear(LocalLinear):
    """A linear layer of which this rank has some of the outputs: rows of the weight [out, in] and of the bias.

    `x` has gradients of this rank's outputs alone; the module around it sums them over the ranks, once for all layers
    that read the same.
    """

    token_wise = True

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., in], equal on all ranks, to this rank's [..., out / ranks]."""
        parameters = self._parameters
        return F.linear(x, local(parameters["weight"]), local(parameters["bias"]))  # type: ignore[arg-type]


class RowParallelLinear(LocalLinear):
    """A linear layer of which this rank has some of the inputs: columns of the weight [out, in].

    The outputs are summed over the ranks; the bias is whole on each rank and is added once.
    """

    token_wise = True

    def forward(self, x: Tensor) -> Tensor:
        """This rank's `x` [..., in / ranks] to [..., out], equal on all ranks."""
        parameters = self._parameters
        out = self.ranks.summed(F.linear(x, local(parameters["weight"])))  # type: ignore[arg-type]
        bias = local(parameters["bias"])
        return out if bias is None else out + bias


class VocabLinear(LocalLinear, SharedByRanks):
    """A language head's linear layer of which this rank has some of the tokens: rows of the weight [V, in]."""

    def own_logits(self, x: Tensor) -> Tensor:
        """`x` [..., in], equal on all ranks, to the logits of this rank's tokens."""
        parameters = self._parameters
        return F.linear(self.ranks.copied(x), local(parameters["weight"]), local(parameters["bias"]))  # type: ignore[arg-type]

    def check_equal(self, given: Mapping[str, str]) -> None:
        """Raises RanksError where ranks were given different things."""
        self.ranks.check_equal(given)


class VocabParallelLinear(VocabLinear):
    """One that gives each rank the logits of the whole vocabulary."""

    token_wise = True

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., in], equal on all ranks, to logits [..., V]."""
        return self.ranks.joined(self.own_logits(x), self.out_features)

    def check_gives_logits(self) -> None:
        """Raises nothing: it gives them."""


class VocabCutLinear(VocabLinear):
    """One whose logits are a DTensor, cut over the vocabulary. It is given rows, since a DTensor is not rearranged."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., in], equal on all ranks, to logits [..., V], of which this rank has its tokens'."""
        logits = self.own_logits(x)
        shape = torch.Size((*logits.shape[:-1], self.out_features))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(logits, self.ranks.mesh, [Shard(-1)], run_check=False, shape=shape, stride=stride)

    def check_gives_logits(self) -> None:
        """Raises ArgumentError."""
        raise ArgumentError(
            "generate, stream, score, perplexity: expected a model that gives the logits of the whole vocabulary on "
            "each rank, got one of parallelize(..., gather_logits=False); parallelize the model with gather_logits=True"
        )
