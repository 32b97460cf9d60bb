"""Tokenizers: CLIP's real vocabulary, padding of the second tokenizer, and prompts that do not fit."""

import gzip
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megjax import text
from megjax.errors import MegError, WeightsError

START, END = "<|startoftext|>", "<|endoftext|>"


def write_tokenizer(folder, words, merges, *, pad=END, length=77):
    folder.mkdir(parents=True, exist_ok=True)
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, **special}
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))


@pytest.fixture(scope="module")
def clip_file():
    """The vocabulary that the package open_clip_torch carries; the package itself is not imported."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        pytest.skip("needs the extra `parity`, for the vocabulary in open_clip_torch")
    return Path(spec.origin).with_name("bpe_simple_vocab_16e6.txt.gz")


@pytest.fixture(scope="module")
def clip(clip_file, tmp_path_factory):
    """SDXL's two tokenizers, in CLIPTokenizer's files."""
    lines = gzip.decompress(clip_file.read_bytes()).decode().split("\n")
    merges = lines[1 : 49152 - 256 - 2 + 1]
    # Bytes that print stand for themselves, the others for characters from U+0100 on, after them.
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    characters = [*map(chr, printable), *(chr(256 + i) for i in range(256 - len(printable)))]
    words = [
        *characters,
        *(c + "</w>" for c in characters),
        *("".join(m.split()) for m in merges),
        START,
        END,
    ]
    folder = tmp_path_factory.mktemp("sdxl")
    write_tokenizer(folder / "tokenizer", words, merges)
    write_tokenizer(folder / "tokenizer_2", words, merges, pad="!")
    return text.load_tokenizers(folder)


@pytest.fixture
def small(tmp_path):
    """A vocabulary of a few letters and one word, eight tokens long."""
    words = ["a</w>", "r", "e", "d</w>", "re", "red</w>", START, END]
    write_tokenizer(tmp_path / "tokenizer", words, ["r e", "re d</w>"], length=8)
    return tmp_path


def test_clip_ids(clip):
    assert [len(tokenizer) for tokenizer in clip] == [49408, 49408]
    ids = text.tokenize(clip, ["a photo of a cat"])
    assert ids.shape == (2, 1, 77)
    assert ids.dtype == np.int32
    prompt = [49406, 320, 1125, 539, 320, 2368, 49407]
    np.testing.assert_array_equal(ids[0, 0], prompt + [49407] * 70)
    np.testing.assert_array_equal(ids[1, 0], prompt + [0] * 70)


@pytest.mark.parity
def test_clip_ids_are_open_clips(clip, clip_file):
    for package in ("torch", "ftfy", "regex"):
        pytest.importorskip(package)
    # By its file: the package's own __init__ needs torchvision.
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", clip_file.with_name("tokenizer.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    prompts = [
        "a photo of a cat",
        "A Red   circle, LEFT of a blue square.",
        "it's 3 o'clock; they'll've gone -- 2024/10/31",
        "naïve café über straße 日本語 русский 🎉🚀",
        "zzyzx qwfpgj antidisestablishmentarianism",
        "tabs\tand\nlines   ",
    ]
    theirs = module.SimpleTokenizer()(prompts).numpy()
    ours = text.tokenize(clip[1:], prompts)[0]  # both pad with 0
    np.testing.assert_array_equal(ours, theirs)


def test_a_prompt_that_is_too_long(clip):
    assert text.tokenize(clip, ["cat " * 75])[0, 0, -1] == 49407
    with pytest.raises(MegError, match=r"prompt 'cat cat.*\.\.\.' has 76 tokens; shorten it to 75 at most"):
        text.tokenize(clip, ["a cat", "cat " * 76])


@pytest.mark.parametrize("prompt", ["", "   ", "\n\t"])
def test_an_empty_prompt(clip, prompt):
    with pytest.raises(MegError, match="is empty; describe the picture in 1 to 75 tokens"):
        text.tokenize(clip, ["a cat", prompt])
    ids = text.tokenize(clip, [prompt], allow_empty=True)
    np.testing.assert_array_equal(ids[:, 0, :3], [[49406, 49407, 49407], [49406, 49407, 0]])


def test_bytes_of_another_encoding_are_no_prompt(small):
    with pytest.raises(MegError, match=r"prompt 'a red \\udce9': is not Unicode text"):
        text.tokenize(text.load_tokenizers(small), ["a red \udce9"])


def test_no_prompts(small):
    with pytest.raises(MegError, match="none given"):
        text.tokenize(text.load_tokenizers(small), [])


def test_one_tokenizer_with_a_small_vocabulary(small):
    tokenizers = text.load_tokenizers(small)
    ids = text.tokenize(tokenizers, ["a Red", "red red a"])
    np.testing.assert_array_equal(ids, [[[6, 0, 5, 7, 7, 7, 7, 7], [6, 5, 5, 0, 7, 7, 7, 7]]])
    np.testing.assert_array_equal(text.tokenize(tokenizers, "a Red"), ids[:, :1])


def test_words_that_a_small_vocabulary_lacks(small):
    with pytest.raises(MegError, match="prompt 'a red box, a fox': not in the vocabulary: 'box,', 'fox'"):
        text.tokenize(text.load_tokenizers(small), ["a red", "a red box, a fox"])


def test_broken_folders(small, tmp_path):
    with pytest.raises(
        WeightsError, match=r"vocab\.json: no such file; a CLIP tokenizer has vocab\.json and"
    ):
        text.load_tokenizers(tmp_path / "nothing")
    write_tokenizer(small / "tokenizer_2", ["a", "b</w>", "ab</w>", START, END], ["a b</w>"], length=9)
    with pytest.raises(WeightsError, match=r"must give all tokenizers one model_max_length, not \[8, 9\]"):
        text.load_tokenizers(small)
    (small / "tokenizer" / "merges.txt").unlink()
    with pytest.raises(WeightsError, match=r"merges\.txt: no such file"):
        text.load_tokenizers(small)
    write_tokenizer(small / "tokenizer", ["a</w>", START, END], ["x y"])
    with pytest.raises(WeightsError, match="tokenizer: not a CLIP tokenizer"):
        text.load_tokenizers(small)


def test_a_length_must_be_given(small):
    config = small / "tokenizer" / "tokenizer_config.json"
    config.write_text(
        json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k[:5] != "model"})
    )
    with pytest.raises(WeightsError, match="must give all tokenizers one model_max_length"):
        text.load_tokenizers(small)


def test_pytorch_is_not_imported(small):
    code = (
        "import sys; from megjax import text\n"
        f"text.tokenize(text.load_tokenizers({str(small)!r}), ['a red'])\n"
        "assert 'transformers' in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
