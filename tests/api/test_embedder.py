"""`Embedder` in one process, without Ray, on real files and pictures in memory."""

import contextlib

import av
import numpy as np
import pytest
from PIL import Image

from qvl_batch import Embedder
from qvl_batch.api.golden import read_golden
from qvl_batch.api.inputs import parse_item
from qvl_batch.api.parity import CASES
from qvl_batch.api.reader import ItemReader
from qvl_batch.demo.checkpoint import embedding_dir
from qvl_batch.errors import (
    ConfigError,
    CorruptMediaError,
    EmbedFailedError,
    InputError,
    KindMismatchError,
    LimitExceededError,
    MissingMediaError,
    ModelError,
)
from qvl_batch.model.prompt import PromptTokenizer
from qvl_batch.recipe import VideoBudget
from qvl_batch.storage import Storage
from tests.api.conftest import BUDGETS, GOLDEN

# Same pixels through another door: nothing but the rounding of another packing may differ.
SAME = 1e-6


@pytest.fixture(scope="module")
def official():
    """An embedder of the golden folder's checkpoint with the official budgets."""
    folder = GOLDEN / "checkpoint" / "embedding"
    with Embedder(folder, dtype="float32", device="cpu", frame_list="official") as one:
        yield one


@pytest.fixture(scope="module")
def golden():
    return {case.name: case for case in read_golden(GOLDEN)[1]}


def same(ours, theirs):
    np.testing.assert_allclose(ours, theirs, atol=SAME, rtol=0)


def differs(ours, theirs):
    assert np.abs(ours - theirs).max() > 1e-3


def resolved(value):
    """A golden input with its paths below the golden folder and its long texts written out."""
    if isinstance(value, list):
        return [resolved(one) for one in value]
    if isinstance(value, dict):
        words = (value["repeat"].format(i=i) for i in range(value["count"]))
        return value["joined_by"].join(words)
    if isinstance(value, str) and value.startswith("media/"):
        return str(GOLDEN / value)
    return value


def test_vectors_are_float32_of_norm_1(embedder, media):
    vectors = embedder.embed(["a red circle", {"image": str(media / "sq_256.png")}])
    assert (vectors.dtype, vectors.shape) == (np.float32, (2, embedder.dim))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert embedder.embed([]).shape == (0, 128)


@pytest.mark.parametrize(
    "name",
    ["text_plain", "img_sq_256.png", "vid_v10_3f_320x240.mp4", "img_exif6_400x240.jpg"],
)
def test_official_dictionaries_give_the_official_vectors(official, golden, name):
    case = golden[name]
    items = [{k: resolved(v) for k, v in item.items()} for item in case.entry["input"]]
    vectors = official.embed(items)
    assert np.abs(vectors - case.arrays["embedding"]).max() <= 1e-5


def test_nothing_is_null_and_an_empty_text_is_an_empty_turn(official, golden):
    null, empty, spelt = official.embed([{}, "", "NULL"])
    same(null, spelt)
    differs(null, empty)
    by_input = {
        str(case.entry.get("input")): case.arrays.get("embedding") for case in golden.values()
    }
    stored = {text: vectors for text, vectors in by_input.items() if vectors is not None}
    checked = 0
    for text, ours in (("[{'text': ''}]", empty), ("[{}]", null)):
        if text in stored:
            assert np.abs(ours - stored[text][0]).max() <= 1e-5
            checked += 1
    assert checked


def test_a_str_is_a_text_and_a_path_is_a_file(embedder, media):
    path = media / "sq_256.png"
    as_text, as_path, as_image = embedder.embed([str(path), path, {"image": str(path)}])
    differs(as_text, as_path)
    same(as_path, as_image)


def test_every_form_of_an_image_gives_one_vector(embedder, media):
    path = media / "sq_256.png"
    pixels = np.asarray(Image.open(path).convert("RGB"))
    forms = [
        path,
        path.read_bytes(),
        Image.open(path),
        pixels,
        {"image": path},
        {"image": [path.read_bytes()]},
        {"image": Image.open(path)},
        {"image": pixels},
        {"image": f"file://{path}"},
    ]
    vectors = embedder.embed(forms)
    same(vectors, np.tile(vectors[0], (len(forms), 1)))


@pytest.mark.parametrize("name", ["rgba_200x150.png", "l_400x240.png", "i16_160x120.png"])
def test_pillow_images_of_every_mode_are_read_as_files_are(embedder, media, name):
    from_file, held = embedder.embed([media / name, Image.open(media / name)])
    same(from_file, held)


def test_every_form_of_a_video_gives_one_vector(embedder, media):
    path = media / "v10_2f_320x240.mp4"
    forms = [path, path.read_bytes(), {"video": str(path)}, {"video": [path.read_bytes()]}]
    vectors = embedder.embed(forms)
    same(vectors, np.tile(vectors[0], (len(forms), 1)))


def test_frames_in_any_form_and_their_times(embedder, media):
    paths = [media / "frames" / f"f{i:03}.png" for i in range(4)]
    arrays = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    forms = [
        {"video": paths},
        {"video": [str(path) for path in paths]},
        {"video": [Image.open(path) for path in paths]},
        {"video": np.stack(arrays)},
        {"video": [arrays]},
        {"video": [[path.read_bytes() for path in paths]]},
        np.stack(arrays),
    ]
    vectors = embedder.embed(forms)
    same(vectors, np.tile(vectors[0], (len(forms), 1)))
    # The demo's budget takes 2 frames a second; another rate is other times.
    slower, stated, fewer = embedder.embed(
        [
            {"video": paths, "fps": 0.5},
            {"video": paths, "fps": 2},
            {"video": paths, "max_frames": 2},
        ]
    )
    same(stated, vectors[0])
    differs(slower, vectors[0])
    differs(fewer, vectors[0])


def test_a_video_file_equals_its_own_frames_as_a_list(embedder, media):
    """A clip of which every frame is taken is the list of its frames at its own rate."""
    path = media / "v10_2f_320x240.mp4"
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        fps = float(container.streams.video[0].average_rate)
    file, listed = embedder.embed([path, {"video": frames, "fps": fps}])
    same(file, listed)


def test_frame_lists_in_the_official_way(official, golden):
    checked = 0
    for name, case in golden.items():
        if name.startswith("frames_") and not case.official_failure():
            items = [{k: resolved(v) for k, v in item.items()} for item in case.entry["input"]]
            vectors = official.embed(items)
            assert np.abs(vectors - case.arrays["embedding"]).max() <= 1e-5, name
            checked += 1
    assert checked >= 3


def test_several_media_in_one_item_stand_in_the_official_order(embedder, media):
    picture, clip = media / "sq_256.png", media / "v10_2f_320x240.mp4"
    whole = {"image": [picture, media / "small_20x30.png"], "video": clip, "text": ["one", "two"]}
    mixed, joined, swapped = embedder.embed(
        [whole, whole | {"text": "onetwo"}, whole | {"image": whole["image"][::-1]}]
    )
    same(mixed, joined)
    differs(mixed, swapped)


def test_a_page_of_a_document(embedder):
    page, first = embedder.embed(
        [{"document": CASES / "page.pdf"}, {"document": str(CASES / "page.pdf"), "page": 0}]
    )
    same(page, first)
    with pytest.raises(LimitExceededError, match=r"item 0 \(.*there is no page 1: it has 1"):
        embedder.embed([{"document": CASES / "page.pdf", "page": 1}])


def test_instructions(embedder):
    plain, own, query = (
        embedder.embed(["a dog"])[0],
        embedder.embed([{"text": "a dog", "instruction": "Find the animal"}])[0],
        embedder.embed_query("a dog"),
    )
    differs(plain, own)
    differs(plain, query)
    same(embedder.embed_query("a dog", instruction="Find the animal"), own)
    same(embedder.embed([{"text": "a dog", "instruction": embedder.query_instruction}])[0], query)


def test_fewer_dimensions_are_the_first_ones_renormalised(embedder):
    short = Embedder(embedding_dir(), dim=32, max_tokens=4096).embed(["a dog"])[0]
    head = embedder.embed(["a dog"])[0][:32]
    same(short, head / np.linalg.norm(head))


def test_a_bad_item_raises_with_its_index(embedder, media):
    with pytest.raises(CorruptMediaError, match=r"^item 1 \(.*corrupt\.jpg\): OSError") as caught:
        embedder.embed(["a dog", media / "corrupt.jpg"])
    assert caught.value.reason.startswith("OSError")


def test_bad_items_are_returned_and_harm_nobody(embedder, media):
    items = [
        "a dog",
        media / "corrupt.jpg",
        {"image": "nowhere.png"},
        {"image": media / "v10_2f_320x240.mp4"},
        np.zeros((9, 9, 2), np.uint8),
        np.zeros((9, 9, 3), np.float32),
        "half a \ud800 pair",
        {"image": "https://example.com/a.png"},
        "a cat",
    ]
    vectors, errors = embedder.embed(items, errors="return")
    assert list(errors) == [1, 2, 3, 4, 5, 6, 7]
    kinds = [type(error) for error in errors.values()]
    assert kinds[:3] == [CorruptMediaError, MissingMediaError, KindMismatchError]
    assert isinstance(errors[6], EmbedFailedError)
    assert all(str(error).startswith(f"item {index}") for index, error in errors.items())
    assert np.isnan(vectors[1:8]).all()
    same(vectors[[0, 8]], embedder.embed(["a dog", "a cat"]))


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["a", {"imge": "x.png"}], r"item 1: Unknown key 'imge'.*Known: document, fps, image"),
        ([3], "item 0: a int is no item"),
        ([None], "item 0: a NoneType"),
        ([{"text": 3}], "text is a int"),
        ([{"image": 3}], "image is a int"),
        ([{"video": np.zeros((4, 4), np.uint8)}], r"video is an array of uint8 \(4, 4\)"),
        ([{"video": [["a.png", 3]]}], "Frame 1 of video 0 is a int"),
        ([{"video": [[]]}], "video 0 has no frame"),
        ([{"text": "a", "fps": 0}], "fps is 0"),
        ([{"text": "a", "max_frames": 1}], "max_frames is 1"),
        ([{"document": "a.pdf", "page": -1}], "page is -1"),
        ([{"text": "a", "instruction": 1}], "instruction is a int"),
        ("a dog", "A list of items is needed, not a str"),
        ({"text": "a"}, "A list of items is needed, not a dict"),
    ],
)
@pytest.mark.parametrize("errors", ["raise", "return"])
def test_what_is_no_item_is_refused_before_any_work(embedder, items, message, errors):
    with pytest.raises(InputError, match=message):
        embedder.embed(items, errors=errors)


def test_wrong_arguments_are_refused(embedder, tmp_path):
    with pytest.raises(InputError, match="errors is 'ignore'"):
        embedder.embed(["a"], errors="ignore")
    with pytest.raises(InputError, match=r"video is .*Give a VideoBudget or any of fps"):
        Embedder(embedding_dir(), video={"frames": 3})
    with pytest.raises(InputError, match="frame_list is 'oficial'"):
        Embedder("nowhere", frame_list="oficial")
    with pytest.raises(ConfigError, match=r"image\.min_px"):
        Embedder(embedding_dir(), image={"min_px": 1})
    with pytest.raises(ModelError, match=r"no config\.json"):
        Embedder(tmp_path)


def test_a_video_beyond_the_context_gets_the_documented_total(media):
    item = parse_item(media / "v1fps_70s_1280x720.mp4")
    # 32 frames at the budget of files need 11,520 tokens, at 7,864,320 px in all 7,680.
    shapes = {}
    for max_tokens in (16_384, 8192, 5000):
        tokenizer = PromptTokenizer(embedding_dir(), max_tokens=max_tokens)
        reader = ItemReader(tokenizer, storage=Storage(), video=VideoBudget(max_frames=32))
        with contextlib.closing(reader):
            if max_tokens == 5000:
                words = r"1 video\(s\) of 32 frames and 0 image\(s\) need 7\d{3} tokens, .* is 5000"
                with pytest.raises(LimitExceededError, match=words):
                    reader.read(item)
                continue
            (vision,) = reader.read(item).videos
        shapes[max_tokens] = (vision.grid, reader.used_documented_total)
    assert shapes[16_384] == ((16, 40, 72), False)
    assert shapes[8192][1]
    groups, rows, columns = shapes[8192][0]
    # A pair of frames counts once, as in the official budget.
    assert 7_000_000 < groups * rows * columns * 16**2 <= 7_864_320


def test_media_of_one_item_share_the_context(media):
    picture = media / "exact_1280x1440.png"
    with Embedder(embedding_dir(), max_tokens=4000) as one:
        fits, too_many = [{"image": [picture] * 2}], [{"image": [picture] * 3, "text": "three"}]
        assert one.embed(fits).shape == (1, 128)
        with pytest.raises(
            LimitExceededError,
            match=r"item 0 .*0 video\(s\) of 0 frames and 3 image\(s\) need 54\d\d tokens, the "
            "context is 4000",
        ):
            one.embed(too_many)


def test_objects_in_a_store(embedder, media, bucket):
    bucket.fs().put_file(str(media / "sq_256.png"), f"{bucket.name}/a.png")
    with Embedder(embedding_dir(), storage=bucket.storage, max_tokens=4096, **BUDGETS) as one:
        remote = one.embed([{"image": bucket.uri("a.png")}])
    same(remote, embedder.embed([media / "sq_256.png"]))
