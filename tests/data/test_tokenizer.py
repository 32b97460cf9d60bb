from collections.abc import Callable
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from megjax.data.grammar import MAX_WORDS, WORDS, Scene, captions
from megjax.data.tokenizer import END, LENGTH, START, token_ids, vocabulary, write_tokenizer
from megjax.errors import MegError

Draw = Callable[..., Scene]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return CLIPTokenizer.from_pretrained(folder)


def test_specials(tokenizer: CLIPTokenizer):
    vocab, _ = vocabulary()
    assert sorted(vocab.values()) == list(range(len(vocab)))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (vocab[START], vocab[END])
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == max(vocab.values())
    assert tokenizer.model_max_length == LENGTH
    assert len(tokenizer) == len(vocab)


def test_every_word_is_one_token(tokenizer: CLIPTokenizer):
    assert {word: len(tokenizer.tokenize(word)) for word in WORDS} == dict.fromkeys(WORDS, 1)
    assert len({tokenizer.convert_tokens_to_ids(tokenizer.tokenize(word)[0]) for word in WORDS}) == len(WORDS)


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("length", [MAX_WORDS + 2, LENGTH])
def test_ids_are_the_tokenizers(tokenizer: CLIPTokenizer, draw: Draw, split: str, length: int):
    scene = draw(0, split)
    texts = captions(scene)
    assert max(len(text.split()) for text in texts) == MAX_WORDS
    want = tokenizer(texts, padding="max_length", max_length=length, truncation=True)["input_ids"]
    np.testing.assert_array_equal(np.asarray(token_ids(scene, length)), np.array(want))


def test_ids_are_traced_once(draw: Draw):
    ids = jax.jit(chex.assert_max_traces(lambda scene: token_ids(scene), n=1))
    assert ids(draw(0, batch=3)).shape == (3, LENGTH)
    assert ids(draw(1, batch=3)).shape == (3, LENGTH)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<|>"), max_size=40))
def test_no_text_is_out_of_vocabulary(tokenizer: CLIPTokenizer, text: str):
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id  # also what an unknown token would give
    assert tokenizer.eos_token_id not in ids[1:-1]


def test_only_whole_files_are_left(tmp_path: Path):
    write_tokenizer(tmp_path / "a" / "b")
    names = {"vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"}
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == names


def test_short_length_is_named(draw: Draw):
    with pytest.raises(MegError, match="token length 17"):
        token_ids(draw(0, batch=1), 17)
