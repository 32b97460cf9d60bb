"""The loader: folders, streams and scenes; what is broken; the order, parts and positions of batches."""

import functools
import io
import json
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain

import numpy as np
import pytest
from PIL import Image

from megjax.data import loader
from megjax.data.loader import Broken, DataConfig, Example, data_key, open_pictures, shuffled_batches
from megjax.data.pictures import to_uint8, upright_rgb
from megjax.errors import MegError


def png(colour, size=(40, 20)):
    contents = io.BytesIO()
    Image.new("RGB", size, colour).save(contents, format="PNG")
    return contents.getvalue()


@pytest.fixture
def folder(tmp_path):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    entries = [{"file_name": f"{i}.png", "text": f"colour {i} "} for i in range(3)]
    for entry, colour in zip(entries, colours, strict=True):
        (tmp_path / entry["file_name"]).write_bytes(png(colour))
    (tmp_path / "cut.png").write_bytes(png((9, 9, 9))[:60])
    entries += [
        {"file_name": "cut.png", "text": "cut short"},
        {"file_name": "0.png", "text": "  "},
        {"file_name": "absent.png", "text": "absent"},
        {"text": "no file"},
        {"file_name": 3, "text": "no name"},
    ]
    lines = [json.dumps(entry) for entry in entries] + ["{no json"]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_a_folder_is_read_in_order_with_what_is_broken_named(folder):
    pictures = open_pictures(DataConfig(source=str(folder)), 8)
    assert pictures.count == 9
    found = pictures.read(0, 9)
    whole, broken = found[:3], found[3:]
    assert [example.caption for example in whole] == ["colour 0", "colour 1", "colour 2"]
    for channel, example in enumerate(whole):
        assert example.image_SxSx3.shape == (8, 8, 3)
        assert np.argmax(example.image_SxSx3[0, 0]) == channel
    assert all(isinstance(example, Broken) for example in broken)
    for example, (name, reason) in zip(
        broken,
        [
            ("cut.png", ""),
            ("0.png", "empty caption"),
            ("absent.png", "FileNotFoundError"),
            ("entry 7", "no JSON"),
            ("entry 8", "no JSON"),
            ("entry 9", "no JSON"),
        ],
        strict=True,
    ):
        assert name in example.name
        assert reason in example.reason
    assert pictures.read(1, 2)[0].caption == "colour 1"
    assert open_pictures(DataConfig(source=str(folder), pictures=2), 8).count == 2


def test_any_caption_and_a_byte_order_mark_are_read(tmp_path):
    (tmp_path / "a.png").write_bytes(png((9, 9, 9)))
    texts = ["one\u2028two", "next\u0085line"]
    lines = [json.dumps({"file_name": "a.png", "text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "metadata.jsonl").write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    pictures = open_pictures(DataConfig(source=str(tmp_path)), 8)
    assert [example.caption for example in pictures.read(0, pictures.count)] == texts


@pytest.mark.parametrize("file", ["PNG", "TIFF"])
def test_greys_of_16_bits_are_scaled(file):
    grey = np.array([[0, 257], [1000, 65535]], np.uint16)
    contents = io.BytesIO()
    Image.fromarray(grey).save(contents, format=file)
    found = loader.decode_picture(contents.getvalue(), 2)
    np.testing.assert_array_equal(found, np.repeat([[[0], [1]], [[4], [255]]], 3, axis=2))
    wide = Image.fromarray(grey.astype(np.int32))
    assert wide.mode == "I"
    np.testing.assert_array_equal(np.asarray(upright_rgb(wide)), found)


def test_the_middle_square_is_upright():
    picture = Image.new("RGB", (60, 20), (0, 0, 0))
    picture.paste((255, 255, 255), (20, 0, 40, 20))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    picture.putpixel((20, 0), (255, 0, 0))
    contents = io.BytesIO()
    picture.save(contents, format="PNG", exif=exif)
    square = loader.decode_picture(contents.getvalue(), 20)
    assert square.shape == (20, 20, 3)
    assert square.mean() > 250
    np.testing.assert_array_equal(square[19, 19], [255, 0, 0])


def test_scenes_are_the_same_in_any_reading_order():
    pictures = open_pictures(DataConfig(pictures=200, seed=3), 16)
    some, again = pictures.read(60, 70), pictures.read(64, 66)
    assert all(isinstance(example, Example) for example in some)
    for a, b in zip(some[4:6], again, strict=True):
        np.testing.assert_array_equal(a.image_SxSx3, b.image_SxSx3)
        assert a.caption == b.caption
    other = open_pictures(DataConfig(pictures=200, seed=4), 16).read(60, 61)[0]
    assert not np.array_equal(other.image_SxSx3, some[0].image_SxSx3)


def test_a_stream_is_read_forwards_with_small_pictures_passed_over(monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = [
        {
            "image": {"bytes": png((i, 0, 0)), "path": None},
            "text": f"row {i}",
            "width": 100 * (i % 3),
            "height": 300,
        }
        for i in range(12)
    ]
    opened = []

    class Stream:
        features = None

        def __iter__(self):
            opened.append(1)
            return iter(rows)

    monkeypatch.setattr(datasets, "load_dataset", lambda name, split, streaming: Stream())
    pictures = open_pictures(DataConfig(source="hf:some/set", pictures=8, min_side=100), 8)
    first, second = pictures.read(0, 3), pictures.read(3, 5)
    assert [example.caption for example in first + second] == ["row 1", "row 2", "row 4", "row 5", "row 7"]
    assert len(opened) == 1
    assert [example.caption for example in pictures.read(1, 3)] == ["row 2", "row 4"]  # goes back: anew
    assert len(opened) == 2
    with pytest.raises(MegError, match=r"ends after 8 pictures"):
        pictures.read(3, 20)
    rows[5]["width"] = None
    del rows[7:]
    rows.append(None)  # what a broken connection raises, hours later
    with pytest.raises(MegError, match=r"hf:some/set: cannot be read on from picture 0 .*is kept"):
        pictures.read(0, 8)


def test_addresses_are_fetched_and_dead_ones_named(tmp_path):
    (tmp_path / "a.png").write_bytes(png((0, 9, 0)))
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path)
    config = DataConfig(source="hf:x/y", picture="url", caption="caption")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        row = {"url": f"http://127.0.0.1:{server.server_port}/a.png", "caption": "green"}
        assert loader._of_row(row, "x/y, row 0", config, 8).caption == "green"
        blank = {**row, "url": f" <{row['url']}>"}
        assert loader._of_row(blank, "x/y, row 0", config, 8).caption == "green"
        dead = loader._of_row({**row, "url": row["url"].replace("a.png", "b.png")}, "x/y, row 1", config, 8)
        server.shutdown()
    assert "b.png" in dead.name
    assert "HTTPError: HTTP Error 404" in dead.reason
    assert "URLError" in loader._of_row(row, "x/y, row 2", config, 8).reason  # nobody listens any more
    own = loader._of_row({**row, "url": (tmp_path / "a.png").as_uri()}, "x/y, row 3", config, 8)
    assert "only http and https" in own.reason  # a data set must not read this machine's files
    assert "neither pictures nor addresses" in loader._of_row({**row, "url": 3}, "x", config, 8).reason


def test_an_answer_without_end_is_broken_off(monkeypatch):
    class Endless(io.BytesIO):
        def read1(self, size=-1):
            return bytes(size)

    monkeypatch.setattr(loader.urllib.request, "urlopen", lambda request, timeout: Endless())
    monkeypatch.setattr(loader, "FETCH_BYTES", 2**20)
    row, config = {"image": "http://camera/", "text": "a street"}, DataConfig(source="hf:x/y")
    assert "more than 1 MiB" in loader._of_row(row, "x/y, row 0", config, 8).reason


def test_what_lies_outside_is_clipped_not_wrapped():
    np.testing.assert_array_equal(to_uint8(np.float32([-0.1, 0.5, 1.2])), [0, 128, 255])


def test_half_an_emoji_is_a_broken_caption():
    row = {"image": {"bytes": png((0, 0, 0))}, "text": json.loads('"a cat \\ud83d"')}
    assert loader._of_row(row, "x", DataConfig(), 8).reason == "a caption that is not Unicode text"


def test_what_cannot_be_opened_is_said(tmp_path):
    with pytest.raises(MegError, match=r"metadata\.jsonl: cannot be read"):
        open_pictures(DataConfig(source=str(tmp_path)), 8)
    (tmp_path / "metadata.jsonl").write_text("\n")
    with pytest.raises(MegError, match="names no pictures"):
        open_pictures(DataConfig(source=str(tmp_path)), 8)
    with pytest.raises(MegError, match="say how many"):
        open_pictures(DataConfig(), 8)
    with pytest.raises(MegError, match="pictures -2: at least 0"):
        open_pictures(DataConfig(source=str(tmp_path), pictures=-2), 8)
    for encoding in ("latin-1", "utf-16"):
        (tmp_path / "metadata.jsonl").write_text('{"text": "ä"}\n', encoding=encoding)
        with pytest.raises(MegError, match=r"metadata\.jsonl: not UTF-8 \(byte \d+\); save it as UTF-8"):
            open_pictures(DataConfig(source=str(tmp_path)), 8)


def test_a_changed_list_of_pictures_is_another_key(folder):
    config = DataConfig(source=str(folder))
    before = data_key(config)
    assert data_key(DataConfig(source=str(folder), max_broken=0.2)) == before
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}\n')
    assert data_key(config) != before


class Numbers:
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"n": np.int64(index)}


def taken(iterator, count):
    return [next(iterator)["n"].tolist() for _ in range(count)]


def test_batches_are_shuffled_by_seed_each_epoch_once_and_alike():
    batches = taken(shuffled_batches(Numbers(20), 4, 7), 10)
    first, second = list(chain(*batches[:5])), list(chain(*batches[5:]))
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second
    assert first != list(range(20))
    assert taken(shuffled_batches(Numbers(20), 4, 7), 10) == batches
    assert taken(shuffled_batches(Numbers(20), 1, 7), 40) == [[n] for batch in batches for n in batch]
    assert taken(shuffled_batches(Numbers(20), 4, 8), 10) != batches


@pytest.mark.parametrize("number", [2, 4])
def test_parts_of_a_batch_are_in_order_and_go_on_from_each_others_position(number):
    whole = taken(shuffled_batches(Numbers(21), 8, 7), 9)
    parts = [shuffled_batches(Numbers(21), 8, 7, (i, number)) for i in range(number)]
    taken_5 = [taken(part, 5) for part in parts]
    assert [list(chain(*rows)) for rows in zip(*taken_5, strict=True)] == whole[:5]
    # One process takes over at the position of any of them.
    alone = shuffled_batches(Numbers(21), 8, 7)
    position = parts[-1].get_state()
    alone.set_state(json.loads(json.dumps(position)))
    assert taken(alone, 4) == whole[5:]


def test_batches_that_cannot_be_are_refused():
    with pytest.raises(MegError, match="at most the 3 examples"):
        shuffled_batches(Numbers(3), 4, 0)
    with pytest.raises(MegError, match="divide by its 3 parts"):
        shuffled_batches(Numbers(9), 4, 0, (0, 3))
