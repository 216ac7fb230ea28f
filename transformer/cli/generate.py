"""Command `generate`: text that a model writes after a prompt."""

import argparse
from typing import TYPE_CHECKING

import torch

from ..checkpoints import load_tokenizer
from ..errors import ArgumentError
from ..models import DecoderOnlyTransformer, EncoderDecoderTransformer
from .options import add_device, add_model, add_sampling, loaded, random_generator, sampling, stops
from .output import write

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_to(commands: "Commands") -> None:
    """Adds the command."""
    about = "Print the text that a model writes after a prompt, token by token; an encoder-decoder answers the prompt."
    parser = commands.add_parser("generate", help="write after a prompt", description=about)
    add_model(parser)
    add_device(parser)
    parser.add_argument("prompt", metavar="PROMPT")
    add_sampling(parser)
    parser.add_argument("--num-beams", type=int, default=1, metavar="N", help="beam search with N candidates")
    parser.add_argument("--no-cache", action="store_true", help="read all tokens again for each new token")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Prints the new text, token by token, or at once with several beams."""
    chosen = sampling(options, {}, num_beams=options.num_beams)
    tokenizer = load_tokenizer(options.model)
    model = loaded(options)
    if not isinstance(model, DecoderOnlyTransformer | EncoderDecoderTransformer):
        raise ArgumentError(f"MODEL: expected a decoder or an encoder-decoder, got {type(model).__name__}")
    prompt = tokenizer.encode(options.prompt)
    if not prompt:
        raise ArgumentError("PROMPT: expected at least one token, got an empty text")
    tokens = torch.tensor([prompt], device=next(model.parameters()).device)
    chosen |= {
        "generator": random_generator(options, model),
        **stops(options, model, tokenizer),
        "use_cache": not options.no_cache,
    }
    if options.num_beams > 1:
        row = model.generate(tokens, **chosen)[0].tolist()
        begin = len(prompt) if isinstance(model, DecoderOnlyTransformer) else 0
        text = tokenizer.stream(chosen["stop_strings"])
        write("".join([*map(text.give, row[begin:]), text.rest()]), end="\n")
        return
    text = tokenizer.stream(chosen["stop_strings"])
    for token in model.stream(tokens, **chosen):
        write(text.give(int(token)))
    write(text.rest(), end="\n")
