"""A tiny model card with a real tokenizer: byte-level BPE, as SmolLM2 and Llama 3 have, with SmolLM2's template."""

from functools import cache
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from workers.messages import ModelCard

SMOLLM2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n"
    "' + message['content'] + '<|im_end|>' + '\n"
    "'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n"
    "' }}{% endif %}"
)

CORPUS = [
    "The capital of France is Paris. The quick brown fox jumps over the lazy dog. Hello, world!",
    "You are a helpful AI assistant. How do I make a personal website? First, buy a domain name.",
    "请你介绍一下中国的首都。中国的首都是北京。今天天气真不错。如何制作个人网站？",
    "Emoji: 😀 🎉 👍🏽 👩‍👩‍👧 🇨🇳",
] * 20

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@cache
def tokenizer() -> Tokenizer:
    """The tiny tokenizer; most Chinese characters and every emoji take several tokens."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


def ids_of(text: str) -> list[int]:
    """The tokens of a text."""
    return tokenizer().encode(text, add_special_tokens=False).ids


IM_END = SPECIAL.index("<|im_end|>")


def write_card(folder: Path, **changes: Any) -> Path:
    """Write tokenizer and card as a model worker does; return the card's path."""
    tokenizer_path = folder / "tokenizer.json"
    tokenizer().save(str(tokenizer_path))
    values: dict[str, Any] = {
        "id": "tiny",
        "names": ["tiny-alias"],
        "tokenizer_path": str(tokenizer_path),
        "add_bos_token": False,
        "chat_template": SMOLLM2_TEMPLATE,
        "special_tokens": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
        "stop_token_ids": [IM_END],
        "eos_token_id": IM_END,
        "vocab_size": tokenizer().get_vocab_size(),
        "hidden_size": 8,
        "max_model_len": 2048,
        "created": 1_700_000_000,
        "dtype": "float32",
        "device": "cpu",
    }
    card = ModelCard(**{**values, **changes})
    path = folder / f"card-{card.id}.json"
    path.write_bytes(msgspec.json.encode(card))
    return path
