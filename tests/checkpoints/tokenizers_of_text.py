"""Tiny tokenizers of the two common kinds, saved in the format of checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "naïve café, 東京, 🙂🙃 and 👩‍👩‍👧",
    "one two two three three three",
] * 4

TEMPLATE = """\
{%- if messages[0]['role'] == 'bad' %}
    {{- raise_exception('no such role: ' + messages[0]['role']) }}
{%- endif %}
{{ bos_token }}
{% for message in messages %}
    {% if message['role'] == 'user' and not message['content'] %}
        {% continue %}
    {% endif %}
<|{{ message['role'] }}|>
{{ message['content'] | trim }} {{ {'ü': '<'} | tojson }}
    {% if message['role'] == 'assistant' %}{% generation %}{{ eos_token }}{% endgeneration %}{% endif %}

{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{% endif %}
"""


def byte_level(vocabulary: int = 300) -> Tokenizer:
    """As of GPT-2 and Llama 3: a character may need several tokens. `<s>` begins a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def metaspace() -> Tokenizer:
    """As of Llama 2: words begin with a mark for their space, and unknown characters fall back to bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    fallback = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(fallback)
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, **config: object) -> Path:
    """Into a folder, with a tokenizer_config.json."""
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps(described | config), encoding="utf-8")
    return folder
