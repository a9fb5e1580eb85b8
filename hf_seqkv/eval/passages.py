"""Real texts for the demo: a long prompt, and a passage to measure perplexity on."""

from __future__ import annotations

import importlib.resources

import torch

from ..errors import ConfigError

INSTRUCTION = "Read these entries from a dictionary of hackers' jargon."
QUESTION = "Summarize what these entries are about, and give three examples from them."


def read(name: str) -> str:
    """A text of the package, `hf_seqkv/eval/texts/{name}.txt`."""
    return (importlib.resources.files("hf_seqkv") / "eval" / "texts" / f"{name}.txt").read_text(encoding="utf-8")


def _tokens(tokenizer, text: str) -> list[int]:
    # `verbose` is off because the whole text is longer than some contexts, of which only a part is used
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def _first(tokenizer, name: str, count: int) -> list[int]:
    """The first `count` tokens of a text."""
    tokens = _tokens(tokenizer, read(name))
    if not 0 < count <= len(tokens):
        raise ConfigError(f"{count} tokens of {name}.txt were asked for, which has {len(tokens)}; ask for fewer")
    return tokens[:count]


def prompt(tokenizer, length: int) -> torch.Tensor:
    """A question about a long text, as a chat where the tokenizer has a template.

    Args:
        length: Tokens in all; the text is cut to fit.

    Returns:
        `[1, length]` token ids.

    Raises:
        ConfigError: The text is shorter, or `length` does not hold the question.
    """
    mark = "<<text>>"
    message = f"{INSTRUCTION}\n\n{mark}\n\n{QUESTION}"
    if tokenizer.chat_template is not None:
        chat = [{"role": "user", "content": message}]
        message = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    before, after = (_tokens(tokenizer, part) for part in message.split(mark))
    room = length - len(before) - len(after)
    if room <= 0:
        raise ConfigError(f"a context of {length} tokens does not hold the question of {length - room}; ask for more")
    return torch.tensor([[*before, *_first(tokenizer, "jargon_file", room), *after]])


def held_out(tokenizer, length: int) -> torch.Tensor:
    """The first `length` tokens of another text, `[1, length]`.

    Raises:
        ConfigError: The text is shorter.
    """
    return torch.tensor([_first(tokenizer, "king_james", length)])
