"""Pictures and clips to measure a ranking on, with their captions as queries and graded labels.

The scenes are combinations that the shipped checkpoint never saw in training. They come in
families of four: a scene and three near misses, each of which differs from it in one attribute (or,
of a pair, in the places of its two shapes), so that every query has hard negatives.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvl_batch.demo.corpus import (
    CLIP_FRAMES,
    CLIP_SIDES_PX,
    DAYS,
    PICTURE_SIDES_PX,
    clip_bytes,
    noon,
    picture_bytes,
    remove_previous,
)
from qvl_batch.demo.world import (
    BACKGROUNDS,
    COLOURS,
    COUNTS,
    KINDS,
    MOTIONS,
    POSITIONS,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    TURNS,
    WORDS,
    Clip,
    Pair,
    Scene,
    random_scene,
)

FAMILY = 4
# Label of the scene itself, of one that differs in one attribute, and in two.
GRADES = (3, 2, 1)
EXACT = GRADES[0]

_SORTS = {kind: "clip" if kind == "clip" else "picture" for kind in KINDS}
# What the training of the checkpoint split by: the place of each attribute of a scene in its code.
_PLACES: dict[str, tuple[int, tuple[Any, ...]]] = {
    "shape": (1, SHAPES),
    "colour": (2, COLOURS),
    "size": (3, SIZES),
    "count": (4, COUNTS),
    "position": (5, POSITIONS),
    "background": (6, BACKGROUNDS),
    "texture": (7, TEXTURES),
    "other_shape": (8, SHAPES),
    "other_colour": (9, COLOURS),
    "relation": (10, RELATIONS),
    "title": (11, WORDS),
    "word": (12, WORDS),
    "motion": (13, MOTIONS),
}


@dataclass(frozen=True, kw_only=True)
class EvaluationItem:
    """A file below the media folder, the scene it shows, and the number of its family."""

    path: str
    family: int
    scene: Scene

    @property
    def query_id(self) -> str:
        """The query that asks for this very scene: ``picture-0001``, ``clip-0001``."""
        return f"{_sort(self.scene)}-{Path(self.path).stem}"


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """Where the set lies and what is in it."""

    folder: Path
    items: tuple[EvaluationItem, ...]

    @property
    def media_dir(self) -> Path:
        return self.folder / "media"

    @property
    def queries_path(self) -> Path:
        """JSON lines of ``query_id``, ``text`` and ``scene``: single, count, pair, page or clip."""
        return self.folder / "queries.jsonl"

    @property
    def labels_path(self) -> Path:
        """JSON lines of ``query_id``, ``uri`` (relative to the file) and ``relevance``."""
        return self.folder / "relevance.jsonl"

    def queries(self) -> Iterator[dict[str, str]]:
        for item in self.items:
            yield {
                "query_id": item.query_id,
                "text": item.scene.caption(),
                "scene": kind_of(item.scene),
            }

    def labels(self) -> Iterator[dict[str, Any]]:
        """Yield the labels above 0: an item not named is not relevant."""
        for asked in self.items:
            for shown in self.items:
                relevance = grade(asked.scene, shown.scene)
                if relevance:
                    yield {
                        "query_id": asked.query_id,
                        "uri": f"media/{shown.path}",
                        "relevance": relevance,
                    }


def kind_of(scene: Scene) -> str:
    """Return which of the world's ``KINDS`` a scene is."""
    return type(scene).__name__.lower()


def _sort(scene: Scene) -> str:
    return _SORTS[kind_of(scene)]


def held_out(scene: Scene) -> bool:
    """Whether the shipped checkpoint did not see this combination in training: one in eight."""
    code = [-1] * 14
    code[0] = KINDS.index(kind_of(scene))
    for field in dataclasses.fields(scene):
        place, values = _PLACES[field.name]
        value = getattr(scene, field.name)
        if value in TURNS:
            # A turn is the seventh motion, and its new colour the second colour of the scene.
            code[place] = len(MOTIONS)
            code[_PLACES["other_colour"][0]] = TURNS.index(value)
        else:
            code[place] = values.index(value)
    digest = hashlib.blake2b(bytes(number + 1 for number in code), digest_size=4).digest()
    return digest[0] % 8 == 0


def grade(asked: Scene, shown: Scene) -> int:
    """Return how well a scene answers the caption of another.

    3 for the scene itself, 2 where one attribute differs (colour, size, count, motion, title, …),
    1 where two differ, else 0; scenes of different kinds have nothing in common.
    """
    if type(asked) is not type(shown):
        return 0
    differing = sum(
        getattr(asked, field.name) != getattr(shown, field.name)
        for field in dataclasses.fields(asked)
    )
    return GRADES[differing] if differing < len(GRADES) else 0


def near_miss(scene: Scene, rng: random.Random) -> Scene:
    """Return a scene that differs in one attribute; of a pair, one in four with places changed."""
    if isinstance(scene, Pair) and rng.random() < 0.25:
        return dataclasses.replace(
            scene,
            colour=scene.other_colour,
            shape=scene.other_shape,
            other_colour=scene.colour,
            other_shape=scene.shape,
        )
    while True:
        name = rng.choice(dataclasses.fields(scene)).name
        values = _PLACES[name][1]
        if isinstance(scene, Clip) and name == "motion":
            values = (*MOTIONS, rng.choice(TURNS))
        try:
            changed = dataclasses.replace(scene, **{name: rng.choice(values)})
        except ValueError:
            # Two equal shapes, two equal words, or a turn to the colour that is there.
            continue
        if changed != scene:
            return changed


def _family(kind: str, rng: random.Random, seen: set[Scene]) -> list[Scene]:
    """Return a held-out scene and three near misses of it, held out too; all of them new."""
    while True:
        first = random_scene(kind, rng)
        if first in seen or not held_out(first):
            continue
        family = [first]
        # One in eight near misses is held out; a few scenes have not enough of them.
        for _ in range(200):
            miss = near_miss(first, rng)
            if miss not in family and miss not in seen and held_out(miss):
                family.append(miss)
            if len(family) == FAMILY:
                seen.update(family)
                return family


def write_evaluation(
    folder: str | os.PathLike[str],
    *,
    picture_families: int = 60,
    clip_families: int = 15,
    seed: int = 0,
) -> EvaluationSet:
    """Write pictures and clips in families of four, their captions as queries, and the labels.

    Files are ``folder/media/pictures/NUMBER.png`` and ``folder/media/clips/NUMBER.mp4``; pictures
    are single shapes, counts, pairs and pages in turn. Every scene of the set is another one, and
    every one is asked for. Equal arguments give equal bytes with equal encoders. An earlier set in
    the folder is replaced.

    Raises:
        ValueError: If there is no family.
        OSError: If the folder cannot be written.
    """
    if min(picture_families, clip_families) < 0 or not picture_families + clip_families:
        raise ValueError(f"{picture_families} picture and {clip_families} clip families")
    folder = Path(folder)
    rng = random.Random(seed)
    stills = [kind for kind in KINDS if _SORTS[kind] == "picture"]
    kinds = [stills[number % len(stills)] for number in range(picture_families)]
    seen: set[Scene] = set()
    placed = [
        (number, scene)
        for number, kind in enumerate([*kinds, *("clip",) * clip_families])
        for scene in _family(kind, rng, seen)
    ]
    # Else the names would tell who is of one family.
    rng.shuffle(placed)
    remove_previous(folder / "_truth.json", folder / "media")
    numbers = {"picture": 0, "clip": 0}
    items = []
    for family, scene in placed:
        sort = _sort(scene)
        numbers[sort] += 1
        suffix = "mp4" if sort == "clip" else "png"
        path = f"{sort}s/{numbers[sort]:04d}.{suffix}"
        _write(folder / "media" / path, scene, rng)
        items.append(EvaluationItem(path=path, family=family, scene=scene))
    items.sort(key=lambda item: item.path)
    written = EvaluationSet(folder=folder, items=tuple(items))
    captions = {item.path: [item.scene.caption()] for item in items}
    (folder / "_truth.json").write_text(json.dumps({"captions": captions, "broken": []}, indent=1))
    for path, records in (
        (written.queries_path, written.queries()),
        (written.labels_path, written.labels()),
    ):
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return written


def _write(target: Path, scene: Scene, rng: random.Random) -> None:
    if isinstance(scene, Clip):
        content = clip_bytes(scene.frames(rng.choice(CLIP_SIDES_PX), CLIP_FRAMES, rng))
    else:
        content = picture_bytes(scene.render(rng.choice(PICTURE_SIDES_PX), rng), "png")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    noon_s = int(noon(DAYS[0]).timestamp())
    os.utime(target, (noon_s, noon_s))
