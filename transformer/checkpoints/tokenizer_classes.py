"""Special tokens of a tokenizer's class: transformers' defaults for names that no file of a checkpoint has.

The first GPT-2 and BERT name no token in their files. A tokenizer of any other class has only the names of its files.
"""

from collections.abc import Collection, Mapping
from typing import Any

END = "<|endoftext|>"
GPT2 = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END)
GPT_NEOX = GPT2 | {"pad_token": "<|padding|>"}
QWEN2 = dict.fromkeys(("eos_token", "pad_token", "unk_token"), END)
T5 = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
GEMMA = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk", "mask")}
BERT = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
ROBERTA = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "sep_token": "</s>",
    "pad_token": "<pad>",
    "cls_token": "<s>",
    "mask_token": "<mask>",
}

OF_CLASS: Mapping[str, Mapping[str, str]] = {
    "GPT2Tokenizer": GPT2,
    "CodeGenTokenizer": GPT2,
    "GPTNeoXTokenizer": GPT_NEOX,
    "Qwen2Tokenizer": QWEN2,
    "T5Tokenizer": T5,
    "GemmaTokenizer": GEMMA,
    "BartTokenizer": ROBERTA,
    "BertTokenizer": BERT,
    "DistilBertTokenizer": BERT,
    "RobertaTokenizer": ROBERTA,
    "XLMRobertaTokenizer": ROBERTA,
}
OF_MODEL: Mapping[str, Mapping[str, str]] = {
    "gpt2": GPT2,
    "opt": GPT2,
    "phi": GPT2,
    "starcoder2": GPT2,
    "gpt_neox": GPT_NEOX,
    "qwen2": QWEN2,
    "qwen3": QWEN2,
    "qwen3_moe": QWEN2,
    "t5": T5,
    "mt5": T5,
    "gemma": GEMMA,
    "gemma2": GEMMA,
    "bart": ROBERTA,
    "bert": BERT,
    "distilbert": BERT,
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
}


def class_tokens(
    tokenizer_config: Mapping[str, Any], config: Mapping[str, Any], present: Collection[str]
) -> dict[str, str]:
    """Tokens by name, as text, of the class in tokenizer_config.json, else of the model in config.json.

    Only tokens of tokenizer.json, `present`: transformers would add another one, with an id of its own.
    """
    kind, model = tokenizer_config.get("tokenizer_class"), config.get("model_type")
    # Of these transformers has its own class, whatever the file says.
    if kind is None or model in ("qwen2", "stablelm"):
        tokens = OF_MODEL.get(model, {}) if isinstance(model, str) else {}
    else:
        tokens = OF_CLASS.get(str(kind).removesuffix("Fast"), {})
    return {name: text for name, text in tokens.items() if text in present}
