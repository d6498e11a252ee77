"""Scenes: a closed vocabulary, captions as trained, pictures that look the same at every side."""

import random
import re

import numpy as np
import pytest

from qvl_batch.demo import world
from qvl_batch.demo.world import Clip, Count, Page, Pair, Single, random_scene

SHAPE = rf"({'|'.join(world.SHAPES)})"
COLOUR = rf"({'|'.join(world.COLOURS)})"
GROUND = rf" on a ({'|'.join(world.BACKGROUNDS)}) background"
WORD = rf"({'|'.join(world.WORDS)})"
MOTION = rf"({'|'.join((*world.MOTIONS, *world.TURNS))})"
# The sentences that the checkpoint was trained on, one for each kind.
GRAMMAR = {
    "single": rf"a (small|large) (plain|striped|dotted) {COLOUR} {SHAPE} in the "
    rf"({'|'.join(world.POSITIONS)}){GROUND}",
    "count": rf"(two|three|four|five) {COLOUR} ({SHAPE}s|crosses){GROUND}",
    "pair": rf"an? {COLOUR} {SHAPE} (left of|above) an? {COLOUR} {SHAPE}{GROUND}",
    "page": rf"a page titled {WORD} with the word {WORD} with an? {COLOUR} header",
    "clip": rf"an? {COLOUR} {SHAPE} {MOTION}{GROUND}",
}
RED, BLUE, WHITE = (220, 30, 30), (40, 70, 220), (250, 250, 250)


def pixels(picture):
    return np.asarray(picture).astype(int)


def near(picture, rgb, tolerance=24):
    """Mask of the pixels of about that colour: tints move a channel by up to 14 levels."""
    return (np.abs(pixels(picture) - rgb) <= tolerance).all(axis=-1)


@pytest.mark.parametrize("kind", world.KINDS)
def test_random_captions_follow_the_trained_grammar(kind):
    rng = random.Random(1)
    captions = {random_scene(kind, rng).caption() for _ in range(300)}
    assert len(captions) > 200
    for caption in captions:
        assert re.fullmatch(GRAMMAR[kind], caption), caption
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|crosss", caption), caption


def test_equal_seeds_give_equal_scenes_and_pixels():
    def drawn(seed):
        rng = random.Random(seed)
        scenes = [random_scene(kind, rng) for kind in ("single", "count", "pair", "page")]
        return scenes, [scene.render(96, rng).tobytes() for scene in scenes]

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)


@pytest.mark.parametrize("side_px", [64, 130, 512])
def test_a_scene_fills_the_same_share_at_every_side(side_px):
    picture = Single(colour="red", shape="square").render(side_px, random.Random(0))
    assert picture.mode == "RGB"
    assert picture.size == (side_px, side_px)
    reference = Single(colour="red", shape="square").render(256, random.Random(0))
    assert near(picture, RED).mean() == pytest.approx(near(reference, RED).mean(), abs=0.015)
    assert near(picture, RED).mean() > 0.1


@pytest.mark.parametrize("count", world.COUNTS)
def test_more_shapes_cover_more_of_the_picture(count):
    scene = Count(count=count, colour="blue", shape="circle")
    covered = near(scene.render(128, random.Random(5)), BLUE).mean()
    # A circle of radius 0.125 covers 4.9 % of the picture, give or take 10 % of the radius.
    assert covered == pytest.approx(count * 0.049, rel=0.25)


@pytest.mark.parametrize(("relation", "axis"), [("left of", 1), ("above", 0)])
def test_the_first_of_a_pair_lies_left_or_above(relation, axis):
    scene = Pair(
        colour="red", shape="star", relation=relation, other_colour="blue", other_shape="star"
    )
    picture = scene.render(128, random.Random(2))
    red, blue = (np.argwhere(near(picture, rgb)).mean(axis=0) for rgb in (RED, BLUE))
    assert red[axis] + 40 < blue[axis]


@pytest.mark.parametrize(
    ("motion", "axis", "sign"),
    [("moving left", 1, -1), ("moving right", 1, 1), ("moving up", 0, -1), ("moving down", 0, 1)],
)
def test_a_clip_moves_as_its_caption_says(motion, axis, sign):
    frames = Clip(colour="red", shape="circle", motion=motion).frames(64, 8, random.Random(0))
    centres = [np.argwhere(near(frame, RED)).mean(axis=0)[axis] for frame in frames]
    assert len(frames) == 8
    assert (np.diff(centres) * sign > 3).all()


def test_a_clip_grows_shrinks_and_turns():
    def covered(motion, rgb):
        frames = Clip(colour="red", shape="heart", motion=motion).frames(64, 8, random.Random(0))
        return np.array([near(frame, rgb).mean() for frame in frames])

    assert (np.diff(covered("growing", RED)) > 0).all()
    assert (np.diff(covered("shrinking", RED)) < 0).all()
    turned = covered("turning blue", BLUE)
    assert (turned[:4] == 0).all()
    assert (turned[4:] > 0.02).all()


def test_textures_and_pages_are_drawn():
    plain, striped, dotted = (
        near(Single(colour="red", shape="square", texture=t).render(128, random.Random(0)), RED)
        for t in world.TEXTURES
    )
    assert plain.mean() > 1.15 * max(striped.mean(), dotted.mean())
    tiger, zebra = (
        Page(title=title, word="river", colour="red").render(128, random.Random(0))
        for title in ("tiger", "zebra")
    )
    differs = (pixels(tiger) != pixels(zebra)).any(axis=(1, 2))
    # Only the title differs, and it stands in the header: the upper 30 %.
    assert differs.any()
    assert not differs[int(0.34 * 128) :].any()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Single(colour="brown", shape="circle"),
        lambda: Single(colour="red", shape="hexagon"),
        lambda: Count(count=6, colour="red", shape="circle"),
        lambda: Page(title="tiger", word="tiger", colour="red"),
        lambda: Page(title="lion", word="tiger", colour="red"),
        lambda: Clip(colour="red", shape="circle", motion="turning red"),
        lambda: Clip(colour="red", shape="circle", motion="left"),
        lambda: Pair(
            colour="red", shape="star", relation="above", other_colour="red", other_shape="star"
        ),
        lambda: random_scene("video", random.Random(0)),
    ],
)
def test_what_the_world_does_not_know_is_refused(make):
    with pytest.raises(ValueError, match=r"the world knows|both|cannot turn"):
        make()
