"""The vocabulary of `scenes` in CLIPTokenizer's files, and its captions' token ids without the tokenizer."""

import json
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from megjax.data.grammar import ABSENT, MAX_WORDS, WORDS, Scene, word_slots
from megjax.errors import MegError

START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 32  # tokens of a text, START and END included


def _byte_symbols() -> list[str]:
    """The printable character that stands for each byte, GPT-2's and CLIP's convention, in CLIP's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(others)]


@cache
def vocabulary() -> tuple[dict[str, int], tuple[tuple[str, str], ...]]:
    """Token ids and byte-pair merges: every byte, alone and at a word's end, the pieces of WORDS, START, END.

    No text is out of this vocabulary. END has the highest id, as in CLIP, whose pooled output is taken there.
    """
    symbols = _byte_symbols()
    merges: dict[tuple[str, str], None] = {}
    for word in sorted(WORDS, key=len):
        pieces = [*word[:-1], word[-1] + "</w>"]
        # Merge from the left, as BPE would if it learned only this word; merges of earlier words come first.
        for pair in merges:
            pieces = _merge(pieces, pair)
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            merges[pair] = None
            pieces = _merge(pieces, pair)
    tokens = [*symbols, *(s + "</w>" for s in symbols), *("".join(pair) for pair in merges), START, END]
    return {token: i for i, token in enumerate(tokens)}, tuple(merges)


def _merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def tokenizer_files() -> dict[str, str]:
    """Names and contents of the files that `transformers.CLIPTokenizer.from_pretrained` reads."""
    vocab, merges = vocabulary()
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    config = {
        **special,
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": LENGTH,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
    }
    return {
        "vocab.json": json.dumps(vocab, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges), ""]),
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
    }


def write_tokenizer(folder: str | Path) -> None:
    """Write `tokenizer_files` into a folder, which is made if need be."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in tokenizer_files().items():
        part = folder / f"{name}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(folder / name)


@partial(jax.jit, static_argnames="length")
def token_ids(scene: Scene, length: int = LENGTH) -> Int[Array, "B L"]:
    """The captions' token ids, as CLIPTokenizer gives them, padded with END to `length`.

    Args:
        scene: B scenes.
        length: number of tokens, at least 18: the longest caption, START and END.

    Raises:
        MegError: length below 18.
    """
    if length < MAX_WORDS + 2:
        raise MegError(f"token length {length}: the longest caption needs {MAX_WORDS + 2}")
    vocab, _ = vocabulary()
    id_of_word = jnp.asarray(np.array([vocab[word + "</w>"] for word in WORDS], np.int32))
    slots_BxS = word_slots(scene)
    end = vocab[END]
    # A stable sort moves the skipped slots behind the words without touching the words' order.
    order_BxS = jnp.argsort(slots_BxS == ABSENT, axis=1, stable=True)
    words_BxS = jnp.take_along_axis(slots_BxS, order_BxS, axis=1)
    ids_BxS = jnp.where(words_BxS == ABSENT, end, id_of_word[words_BxS])
    ids_BxL = jax.lax.pad(ids_BxS, jnp.int32(end), [(0, 0, 0), (1, length, 0)])[:, :length]
    return ids_BxL.at[:, 0].set(vocab[START])
