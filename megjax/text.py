"""Prompts to token ids, by CLIP's byte-pair encoding; no PyTorch needed."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from megjax.errors import MegError, WeightsError

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


def load_tokenizers(folder: str | Path) -> tuple[CLIPTokenizer, ...]:
    """Read the tokenizers of a folder in diffusers layout: `tokenizer`, and `tokenizer_2` if it is there.

    Raises `WeightsError` if a vocabulary is missing or broken, or if the two differ in length.
    """
    # On import transformers advises to install PyTorch, which tokenizers don't need.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import CLIPTokenizer  # not above: it takes a second

    folders = [Path(folder, "tokenizer")]
    if (second := Path(folder, "tokenizer_2")).is_dir():
        folders.append(second)
    tokenizers = []
    for part in folders:
        # Without its files transformers makes an empty vocabulary and says nothing.
        if missing := [name for name in ("vocab.json", "merges.txt") if not (part / name).is_file()]:
            raise WeightsError(
                f"{part / missing[0]}: no such file; a CLIP tokenizer has vocab.json and merges.txt"
            )
        try:
            tokenizers.append(CLIPTokenizer.from_pretrained(part, local_files_only=True))
        except Exception as error:  # the Rust tokenizers raise bare Exception
            raise WeightsError(
                f"{part}: not a CLIP tokenizer ({str(error).partition(chr(10))[0]})"
            ) from error
    lengths = [tokenizer.model_max_length for tokenizer in tokenizers]
    if len(set(lengths)) != 1 or lengths[0] > 100_000:
        raise WeightsError(
            f"{folder}: tokenizer_config.json must give all tokenizers one model_max_length, not {lengths}"
        )
    return tuple(tokenizers)


def is_text(text: str) -> bool:
    """Whether a string can be encoded: bytes of another encoding, or half an emoji in JSON, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def tokenize(
    tokenizers: Sequence[CLIPTokenizer],
    prompts: Sequence[str],
    name: str = "prompt",
    *,
    allow_empty: bool = False,
) -> Int[np.ndarray, "encoders batch length"]:
    """Return each text encoder's token ids: start, prompt, end, then that tokenizer's padding.

    Args:
        tokenizers: from `load_tokenizers`.
        prompts: one a picture.
        name: of the argument that gave them, for errors.
        allow_empty: for the unconditional prompt of classifier-free guidance.

    Raises `MegError` for a prompt that is empty, longer than the model reads or no Unicode text, and for
    words that a small vocabulary does not have; nothing is cut off silently.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise MegError("prompts: none given; one a picture is needed")
    for prompt in prompts:
        if not is_text(prompt):
            raise MegError(
                f"{name} {prompt[:60]!r}: is not Unicode text; a terminal or file of UTF-8 gives it"
            )
    ids = []
    for tokenizer in tokenizers:
        limit = tokenizer.model_max_length
        rows = tokenizer(prompts, padding=False, truncation=False, verbose=False)["input_ids"]
        for prompt, row in zip(prompts, rows, strict=True):
            shown = repr(prompt if len(prompt) <= 60 else f"{prompt[:60]}...")
            if len(row) == 2 and not allow_empty:
                raise MegError(f"{name} {shown} is empty; describe the picture in 1 to {limit - 2} tokens")
            if tokenizer.unk_token_id in row[1:-1]:
                raise MegError(f"{name} {shown}: not in the vocabulary: {_unknown(tokenizer, prompt)}")
            if len(row) > limit:
                raise MegError(f"{name} {shown} has {len(row) - 2} tokens; shorten it to {limit - 2} at most")
        ids.append([row + [tokenizer.pad_token_id] * (limit - len(row)) for row in rows])
    return np.asarray(ids, np.int32)


def _unknown(tokenizer: CLIPTokenizer, prompt: str) -> str:
    """The words that hold a token which the vocabulary lacks."""
    encoded = tokenizer(prompt, return_offsets_mapping=True)
    pairs = list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))[1:-1]
    starts = [start for token, (start, _) in pairs if token == tokenizer.unk_token_id]
    words = [m for m in re.finditer(r"\S+", prompt) if any(m.start() <= start < m.end() for start in starts)]
    return ", ".join(dict.fromkeys(repr(word[0]) for word in words))
