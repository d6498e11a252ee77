"""The corpus: real files that decode, two that do not, and every question with its answers."""

import hashlib
import json
from pathlib import Path

import av
import numpy as np
import pypdfium2
import pytest
from PIL import Image

from qvl_batch.budget import choose_frames, pair_seconds, smart_resize
from qvl_batch.demo.checkpoint import DEMO_RECIPE
from qvl_batch.demo.corpus import DAYS, write_corpus
from qvl_batch.demo.queries import DEMO_QUERIES
from qvl_batch.demo.world import KINDS, Clip

KIND_OF_SUFFIX = {".png": "image", ".jpg": "image", ".webp": "image"} | {
    ".mp4": "video",
    ".txt": "text",
    ".pdf": "document",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def content(folder: Path) -> dict[str, tuple[str, int]]:
    """Digest and modification time of every file below the folder."""
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns,
        )
        for path in folder.rglob("*")
        if path.is_file()
    }


def decoded_frames(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return frames, float(stream.average_rate)


def test_listed_files_are_the_files_there(corpus):
    assert sorted(content(corpus.media_dir)) == [file.path for file in corpus.files]
    assert {file.path.split("/")[0] for file in corpus.files} == {f"dt={day}" for day in DAYS}
    assert all(KIND_OF_SUFFIX[Path(file.path).suffix] == file.kind for file in corpus.files)
    counts = {kind: sum(f.kind == kind for f in corpus.files) for kind in ("text", "document")}
    assert counts == {"text": 24, "document": 1}
    assert len(corpus.files) == 117
    assert corpus.num_rows == 120
    size_bytes = sum(path.stat().st_size for path in corpus.media_dir.rglob("*.*"))
    assert size_bytes < 2_000_000


def test_every_whole_file_decodes_and_is_square(corpus):
    for file in corpus.files:
        path = corpus.media_dir / file.path
        if file.kind == "image" and file.scenes:
            with Image.open(path) as picture:
                assert np.asarray(picture.convert("RGB")).std() > 3, file.path
                assert picture.width == picture.height
                assert 64 <= picture.width <= 320
                assert smart_resize(*picture.size, 4096, 4096) == (64, 64)
        elif file.kind == "text":
            assert path.read_text() == f"{file.captions[0]}\n"
        elif file.kind == "document":
            document = pypdfium2.PdfDocument(path)
            sizes = [document.get_page_size(page) for page in range(len(document))]
            document.close()
            assert sizes == [(288.0, 288.0)] * len(file.scenes)


def test_clips_give_all_eight_frames_at_the_trained_times(corpus):
    clips = [file for file in corpus.files if file.kind == "video" and file.scenes]
    assert len(clips) == 14
    for file in clips:
        frames, fps = decoded_frames(corpus.media_dir / file.path)
        chosen = choose_frames(len(frames), fps, DEMO_RECIPE["video"]["fps"], 64)
        assert chosen == tuple(range(8))
        assert pair_seconds(chosen, fps) == (0.25, 1.25, 2.25, 3.25)


def test_colours_survive_the_video_encoder(corpus):
    [moving] = [
        f for f in corpus.files if f.captions == ("a blue star moving left on a white background",)
    ]
    frames, _ = decoded_frames(corpus.media_dir / moving.path)
    columns = []
    for frame in frames:
        side = frame.shape[0]
        blue = (np.abs(frame.astype(int) - (40, 70, 220)) <= 32).all(axis=-1)
        assert blue.mean() > 0.02
        columns.append(np.argwhere(blue).mean(axis=0)[1] / side)
    assert columns[0] == pytest.approx(0.78, abs=0.03)
    assert columns[-1] == pytest.approx(0.22, abs=0.03)


def test_broken_files_look_right_and_do_not_decode(corpus):
    picture, clip = sorted(corpus.broken, key=lambda path: Path(path).suffix)
    assert (corpus.media_dir / picture).read_bytes()[:3] == b"\xff\xd8\xff"
    with pytest.raises(OSError, match="truncated"):
        np.asarray(Image.open(corpus.media_dir / picture))
    assert (corpus.media_dir / clip).read_bytes()[4:8] == b"ftyp"
    with pytest.raises(av.FFmpegError):
        decoded_frames(corpus.media_dir / clip)


@pytest.fixture(scope="module", params=[0, 1])
def seeded_corpus(request, tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"), seed=request.param)


@pytest.mark.parametrize("query", DEMO_QUERIES, ids=lambda query: query.text)
def test_every_question_has_answers_and_near_misses(query, seeded_corpus):
    answers = seeded_corpus.answers(query)
    assert 1 <= len(answers) <= 2
    scenes = {(f.path, i): scene for f in seeded_corpus.files for i, scene in enumerate(f.scenes)}
    answer = scenes[answers[0]]
    near_misses = [
        scene
        for place, scene in scenes.items()
        if place not in answers
        and type(scene) is type(answer)
        and sum(vars(scene)[name] == value for name, value in vars(answer).items())
        >= len(vars(answer)) - 2
    ]
    assert len(near_misses) >= 2


def test_truth_lies_beside_the_media_and_says_the_same(corpus):
    truth = json.loads(corpus.truth_path.read_text())
    assert corpus.media_dir not in corpus.truth_path.parents
    assert truth["broken"] == list(corpus.broken)
    assert sum(map(len, truth["captions"].values())) == corpus.num_rows
    for query in DEMO_QUERIES:
        for place in truth["answers"][query.text]:
            path, segment = place.rsplit(":", 1)
            assert query.answer in truth["captions"][path][int(segment)]


def test_captions_are_distinct_and_names_do_not_tell_them(corpus):
    captions = [caption for file in corpus.files for caption in file.captions]
    assert len(set(captions)) == len(captions)
    words = {word for caption in captions for word in caption.split()} - {"a", "page"}
    assert all(not words & set(Path(file.path).stem.split()) for file in corpus.files)
    assert {type(scene).__name__.lower() for file in corpus.files for scene in file.scenes} == {
        *KINDS
    }
    assert any(
        isinstance(s, Clip) and "turning" in s.motion for f in corpus.files for s in f.scenes
    )


def test_writing_again_changes_nothing_and_another_seed_replaces(tmp_path):
    first = write_corpus(tmp_path)
    before = content(first.media_dir)
    assert content(write_corpus(tmp_path).media_dir) == before
    stranger = first.media_dir / "dt=2026-01-01" / "mine.txt"
    stranger.write_text("kept")
    other = write_corpus(tmp_path, seed=9)
    after = content(other.media_dir)
    assert set(after) == {file.path for file in other.files} | {"dt=2026-01-01/mine.txt"}
    assert after != before


def test_scale_multiplies_the_files_but_not_the_answers(tmp_path, corpus):
    larger = write_corpus(tmp_path, scale=2)
    assert len(larger.files) == 2 * 114 + 3
    for query in DEMO_QUERIES:
        assert len(larger.answers(query)) == len(corpus.answers(query))
    with pytest.raises(ValueError, match="scale"):
        write_corpus(tmp_path, scale=0)
