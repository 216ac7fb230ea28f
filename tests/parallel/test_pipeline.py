"""Stages of a pipeline: the model's modules under its names, and outputs and gradients of one process."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.testing import assert_close

from tests.integration.builders import VOCAB, padding, token_ids, vectors
from tests.parallel.sharing import full
from tests.ranks import on_ranks
from transformer import DecoderOnlyTransformer, EncoderDecoderTransformer, MultiHeadAttention
from transformer.blocks import BlockStack, DecoderBlock, FeedForward, RMSNorm
from transformer.errors import ArgumentError, CacheStateError, ConfigurationError
from transformer.parallel import DecoderStage, pipeline_stages
from transformer.positions import RelativePositionBias

MODELS: dict[str, dict[str, Any]] = {
    "rotary": {"attention": "gqa", "num_groups": 2, "qk_norm": True},
    "windows": {"window_size": 4, "num_sinks": 1, "layer_pattern": "sliding full", "logit_softcap": 8.0},
    "learned": {"position": "learned", "max_length": 40, "embedding_scale": 2.0},
    "relative": {"position": "relative", "relative_per_layer": True},
    "sinusoidal": {"position": "sinusoidal", "norm": "layer", "norm_placement": "after", "attention": "mqa"},
    "alibi": {"position": "alibi"},
}
SCHEDULES = (ScheduleGPipe, Schedule1F1B)
IGNORED = -100
CPU = torch.device("cpu")


def decoder(layers: int = 5, **options: Any) -> DecoderOnlyTransformer:
    torch.manual_seed(0)
    return DecoderOnlyTransformer(VOCAB, 32, 4, 64, layers, **{"tied_embeddings": False, **options})


def stack(layers: int = 5) -> BlockStack:
    torch.manual_seed(0)
    blocks = [
        DecoderBlock(MultiHeadAttention(32, 4, True, window_size=5 - layer), FeedForward(32, 64), RMSNorm)
        for layer in range(layers)
    ]
    return BlockStack(blocks, RMSNorm(32))


def of_tokens(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def through(stages: list[nn.Module], x: Tensor, mask: Tensor | None = None) -> Tensor:
    for stage in stages:
        x = stage(x, attention_mask=mask)
    return x


# --- One process ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 3, 5])
@pytest.mark.parametrize("name", MODELS)
def test_stages_one_after_another_are_the_model(name: str, number: int) -> None:
    model = decoder(**MODELS[name])
    stages = pipeline_stages(model, number)
    ids = token_ids(4, 12)
    for mask in (None, *(padding(where, 4, 12) for where in ("left", "both", "holes"))):
        assert torch.equal(through(stages, ids, mask), model(ids, mask))


def test_stages_of_a_stack_one_after_another_are_the_stack() -> None:
    whole, x, mask = stack(), vectors(3, 9), padding("left", 3, 9)
    for number in range(1, 6):
        stages = pipeline_stages(whole, number)
        assert {type(stage) for stage in stages} == {BlockStack}
        assert torch.equal(through(stages, x, mask), whole(x, attention_mask=mask))


def test_a_mode_is_given_to_each_stage() -> None:
    model, ids = decoder(window_size=3), token_ids(2, 10)
    stages = pipeline_stages(model, 2)
    expanding = stages[1](stages[0](ids, expanding_context=True), expanding_context=True)
    assert torch.equal(expanding, model(ids, expanding_context=True))
    assert not torch.equal(expanding, model(ids))


def test_blocks_are_shared_out_evenly_and_the_last_stages_have_fewer() -> None:
    sizes = {
        number: [len(stage.decoder.blocks) for stage in pipeline_stages(decoder(5), number)] for number in (2, 3, 4)
    }
    assert sizes == {2: [3, 2], 3: [2, 2, 1], 4: [2, 1, 1, 1]}


@pytest.mark.parametrize("name", MODELS)
def test_the_stages_state_dicts_are_the_models_in_parts(name: str) -> None:
    model = decoder(**MODELS[name])
    stages = pipeline_stages(model, 3)
    names = [entry for stage in stages for entry in stage.state_dict()]
    assert sorted(names) == sorted(model.state_dict())
    for stage in stages:
        assert all(parameter is model.get_parameter(entry) for entry, parameter in stage.named_parameters())
        stage.load_state_dict({entry: model.state_dict()[entry] for entry in stage.state_dict()})


def test_blocks_of_a_stage_are_found_and_replaced_by_their_place_in_it() -> None:
    whole = stack()
    (_, second) = pipeline_stages(whole, 2)
    assert isinstance(second, BlockStack)
    assert [name for name, _ in second.blocks.named_children()] == ["3", "4"]
    assert second.blocks[0] is whole.blocks[3]
    assert second.blocks[-1] is whole.blocks[4]
    second.blocks[0] = whole.blocks[0]
    assert [name for name, _ in second.blocks.named_children()] == ["3", "4"]
    assert second.blocks[0] is whole.blocks[0]
    assert whole.blocks[3] is not whole.blocks[0]
    with pytest.raises(IndexError):
        second.blocks[2]


def test_a_stage_is_made_on_meta_and_initialised_alone() -> None:
    with torch.device("meta"):
        model = decoder()
    first, last = pipeline_stages(model, 2)
    last.to_empty(device="cpu")
    last.reset_parameters()
    assert {parameter.device.type for parameter in first.parameters()} == {"meta"}
    assert last(vectors(2, 7)).isfinite().all()
    with torch.device("meta"):
        (only,) = pipeline_stages(decoder(tied_embeddings=True), 1)
    only.to_empty(device="cpu").reset_parameters()
    assert only.head.proj.weight is only.embedding.tokens.weight
    assert 0.8 < only.embedding.tokens.weight.std() * 32**0.5 < 1.2


def test_a_stage_compiles() -> None:
    model, ids = decoder(), token_ids(2, 8)
    stages = pipeline_stages(model, 2)
    first, last = (torch.compile(stage, backend="eager", fullgraph=True) for stage in stages)
    # A received tensor is a leaf of the graph.
    received = first(ids).detach().requires_grad_()
    assert_close(last(received), model(ids), atol=1e-5, rtol=0)


def test_a_model_without_a_head_ends_in_states() -> None:
    model, ids = decoder(has_head=False), token_ids(2, 8)
    assert torch.equal(through(pipeline_stages(model, 2), ids), model(ids))


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 6, True, 2.0])
def test_more_stages_than_blocks_are_refused(number: Any) -> None:
    with pytest.raises(ArgumentError, match=r"number: expected from 1 to 5 stages"):
        pipeline_stages(decoder(5), number)


def test_other_models_are_refused() -> None:
    pair = EncoderDecoderTransformer(VOCAB, VOCAB, 32, 4, 64, 2)
    for model in (pair, nn.Linear(2, 2), torch.compile(decoder())):
        with pytest.raises(ArgumentError, match="model: expected a BlockStack or a DecoderOnlyTransformer"):
            pipeline_stages(model, 2)
    with pytest.raises(ConfigurationError, match="model: expected blocks without cross-attention"):
        pipeline_stages(pair.decoder, 2)


def test_a_parameter_of_two_stages_is_refused() -> None:
    tied = r"embedding.tokens.weight of stage 0 again as head.proj.weight of stage 1; .*tied_embeddings=False"
    with pytest.raises(ConfigurationError, match=tied):
        pipeline_stages(decoder(tied_embeddings=True), 2)
    with pytest.raises(ConfigurationError, match=r"position.* of stage 0 again .* of stage 1; .*relative_per_layer"):
        pipeline_stages(decoder(position="relative"), 2)
    bias = RelativePositionBias(4, 8, 16)
    blocks = [DecoderBlock(MultiHeadAttention(32, 4, True, position=bias), FeedForward(32, 64), RMSNorm) for _ in "ab"]
    with pytest.raises(ConfigurationError, match="no parameter in two stages"):
        pipeline_stages(BlockStack(blocks), 2)
    assert len(pipeline_stages(BlockStack(blocks), 1)) == 1


def test_caches_are_refused_before_and_after() -> None:
    model = decoder().enable_cache()
    for each in (model.eval(), model.train(), model.eval().decoder):
        with pytest.raises(CacheStateError, match="model: expected caches to be off"):
            pipeline_stages(each, 2)
    stages = pipeline_stages(model.disable_cache(), 2)
    model.enable_cache()
    with pytest.raises(CacheStateError, match="expected use_kv_cache=False in a pipeline"):
        stages[0](token_ids(2, 5))
    assert model.kv_cache.length == 0


def test_a_stage_checks_its_ids() -> None:
    first, _ = pipeline_stages(decoder(), 2)
    assert isinstance(first, DecoderStage)
    with pytest.raises(ArgumentError, match=f"x: expected token ids from 0 to {VOCAB - 1}"):
        first(torch.tensor([[VOCAB]]))


# --- Several processes ------------------------------------------------------------------------------------------------


def scheduled(kind: Any, module: nn.Module, microbatches: int, loss: Any = of_tokens, group: Any = None) -> Any:
    stage = PipelineStage(module, dist.get_rank(group), dist.get_world_size(group), CPU, group=group)
    return kind(stage, microbatches, loss_fn=loss)


def run_pipeline(
    schedule: Any, inputs: Tensor, target: Tensor, group: Any = None, **given: Any
) -> tuple[Tensor | None, list[Tensor]]:
    """What the last rank gives: the outputs of all microbatches, and their losses."""
    losses: list[Tensor] = []
    arguments = (inputs,) if dist.get_rank(group) == 0 else ()
    last = {"target": target, "losses": losses} if dist.get_rank(group) == dist.get_world_size(group) - 1 else {}
    return schedule.step(*arguments, **last, **given), losses


def in_one_process(
    model: nn.Module, inputs: Tensor, target: Tensor, microbatches: int, mask: Tensor | None, loss: Any = of_tokens
) -> tuple[Tensor, Tensor]:
    """Outputs and losses of each microbatch, after a backward of the mean loss."""
    masks = [None] * microbatches if mask is None else mask.chunk(microbatches)
    outputs = [model(x, attention_mask=m) for x, m in zip(inputs.chunk(microbatches), masks, strict=True)]
    losses = torch.stack([loss(out, t) for out, t in zip(outputs, target.chunk(microbatches), strict=True)])
    losses.mean().backward()
    return torch.cat(outputs).detach(), losses.detach()


def same_gradients(module: nn.Module, whole: nn.Module) -> None:
    expected = dict(whole.named_parameters())
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        gradient = full(parameter.grad)
        assert_close(gradient, expected[name].grad, atol=2e-6, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


def compare(kind: Any, options: dict[str, Any], microbatches: int, where: str | None) -> None:
    """One step of a schedule with the model of one process: outputs, losses, and the gradients of this rank's stage."""
    rows = 2 * microbatches
    ids = token_ids(rows, 11)
    mask = None if where is None else padding(where, rows, 11)
    labels = ids.roll(-1, 1) if mask is None else ids.roll(-1, 1).masked_fill(~mask, IGNORED)
    whole, module = decoder(**options), pipeline_stages(decoder(**options), dist.get_world_size())[dist.get_rank()]
    given = {} if mask is None else {"attention_mask": mask}
    out, losses = run_pipeline(scheduled(kind, module, microbatches), ids, labels, **given)
    expected, expected_losses = in_one_process(whole, ids, labels, microbatches, mask)
    if dist.get_rank() == dist.get_world_size() - 1:
        assert_close(out, expected, atol=1e-6, rtol=0)
        assert_close(torch.stack(losses), expected_losses, atol=1e-6, rtol=0)
    same_gradients(module, whole)


def two_stages(rank: int, folder: str) -> None:
    for options in MODELS.values():
        for kind, where in zip(SCHEDULES, (None, "both"), strict=True):
            compare(kind, options, 4, where)
    # A stack alone, with inputs that are vectors.
    x, target, mask = vectors(4, 9), vectors(4, 9, seed=1), padding("left", 4, 9)
    for kind in SCHEDULES:
        whole, module = stack(), pipeline_stages(stack(), 2)[rank]
        schedule = scheduled(kind, module, 2, F.mse_loss)
        out, losses = run_pipeline(schedule, x, target, attention_mask=mask)
        expected, _ = in_one_process(whole, x, target, 2, mask, F.mse_loss)
        if rank == 1:
            assert_close(out, expected, atol=1e-6, rtol=0)
            assert len(losses) == 2
        same_gradients(module, whole)
    # Names are the model's, so a checkpoint of the stages is one of the model.
    dcp.save({"model": pipeline_stages(decoder(), 2)[rank].state_dict()}, checkpoint_id=folder)


@pytest.mark.filterwarnings("ignore:torch.distributed is .* uninitialized:UserWarning")
def test_two_ranks_give_outputs_and_gradients_of_one_process(tmp_path: Path) -> None:
    on_ranks(2, two_stages, str(tmp_path))
    model = decoder()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=str(tmp_path))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in expected.items())


def four_stages(rank: int) -> None:
    for kind in SCHEDULES:
        compare(kind, MODELS["windows"], 8, "holes")
    # A training: the weights follow one process from step to step.
    ids = token_ids(8, 11)
    whole, module = decoder(8), pipeline_stages(decoder(8), 4)[rank]
    optimizers = [torch.optim.AdamW(each.parameters(), 1e-2) for each in (whole, module)]
    schedule = scheduled(Schedule1F1B, module, 4)
    means = []
    for _ in range(4):
        for optimizer in optimizers:
            optimizer.zero_grad()
        _, losses = run_pipeline(schedule, ids, ids.roll(-1, 1))
        _, expected = in_one_process(whole, ids, ids.roll(-1, 1), 4, None)
        if rank == 3:
            assert_close(torch.stack(losses).detach(), expected, atol=1e-4, rtol=0)
        means.append(expected.mean())
        for optimizer in optimizers:
            optimizer.step()
    assert all(after < before for before, after in pairwise(means))
    sharded_stages(rank)


def sharded_stages(rank: int) -> None:
    """Two stages, each sharded by FSDP2 over two ranks, which read different rows."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stages", "data"))
    ids = token_ids(8, 11)
    mine = ids.chunk(2)[mesh["data"].get_local_rank()]
    for kind in SCHEDULES:
        whole = decoder()
        module = pipeline_stages(decoder(), 2)[mesh["stages"].get_local_rank()]
        for block in module.decoder.blocks:
            fully_shard(block, mesh=mesh["data"])
        fully_shard(module, mesh=mesh["data"])
        group = mesh.get_group("stages")
        run_pipeline(scheduled(kind, module, 2, group=group), mine, mine.roll(-1, 1), group)
        in_one_process(whole, ids, ids.roll(-1, 1), 4, None)
        same_gradients(module, whole)


@pytest.mark.slow
def test_four_ranks_train_as_one_process() -> None:
    on_ranks(4, four_stages)
