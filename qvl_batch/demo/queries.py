"""The demo's questions, and the scenes that are in every corpus for their sake."""

from __future__ import annotations

from dataclasses import dataclass

from qvl_batch.demo.world import Clip, Count, Page, Pair, Scene


@dataclass(frozen=True)
class DemoQuery:
    """A question to the corpus; a scene whose caption holds the phrase ``answer`` answers it."""

    text: str
    answer: str

    def is_answered_by(self, scene: Scene) -> bool:
        return self.answer in scene.caption()


# Answered in turn by pictures, pages, clips, a picture, a clip, a page of the PDF and a note.
DEMO_QUERIES = (
    DemoQuery("two red circles", "two red circles"),
    DemoQuery("a page that says tiger", "tiger"),
    DemoQuery("a blue star moving left", "a blue star moving left"),
    DemoQuery("a green square above a yellow heart", "a green square above a yellow heart"),
    DemoQuery("an orange ring turning cyan", "an orange ring turning cyan"),
    DemoQuery("a page titled flute about lemon", "titled flute with the word lemon"),
    DemoQuery("five pink crosses", "five pink crosses"),
)


def _pair(first: str, relation: str, second: str, background: str) -> Pair:
    colour, shape = first.split()
    other_colour, other_shape = second.split()
    return Pair(
        colour=colour,
        shape=shape,
        relation=relation,
        other_colour=other_colour,
        other_shape=other_shape,
        background=background,
    )


# Answers first, then scenes that differ from them in one thing: colour, count, shape, relation,
# word or motion.
PLANTED_PICTURES: tuple[Scene, ...] = (
    Count(count=2, colour="red", shape="circle", background="white"),
    Count(count=2, colour="red", shape="circle", background="black"),
    Count(count=3, colour="red", shape="circle", background="white"),
    Count(count=2, colour="blue", shape="circle", background="white"),
    Count(count=2, colour="orange", shape="circle", background="black"),
    Count(count=2, colour="red", shape="square", background="white"),
    Count(count=2, colour="red", shape="ring", background="gray"),
    _pair("green square", "above", "yellow heart", "beige"),
    _pair("yellow heart", "above", "green square", "beige"),
    _pair("green square", "left of", "yellow heart", "beige"),
    _pair("green square", "above", "yellow star", "white"),
    _pair("blue square", "above", "yellow heart", "beige"),
    Count(count=4, colour="pink", shape="cross", background="gray"),
    Count(count=5, colour="pink", shape="star", background="beige"),
)
PLANTED_PAGES: tuple[Scene, ...] = (
    Page(title="tiger", word="river", colour="orange"),
    Page(title="tiger", word="ocean", colour="green"),
    Page(title="zebra", word="river", colour="orange"),
    Page(title="eagle", word="queen", colour="orange"),
    Page(title="ocean", word="uncle", colour="green"),
)
PLANTED_CLIPS: tuple[Scene, ...] = (
    Clip(colour="blue", shape="star", motion="moving left", background="white"),
    Clip(colour="blue", shape="star", motion="moving left", background="gray"),
    Clip(colour="blue", shape="star", motion="moving right", background="white"),
    Clip(colour="blue", shape="star", motion="moving up", background="gray"),
    Clip(colour="red", shape="star", motion="moving left", background="white"),
    Clip(colour="blue", shape="heart", motion="moving left", background="white"),
    Clip(colour="orange", shape="ring", motion="turning cyan", background="black"),
    Clip(colour="orange", shape="ring", motion="turning pink", background="black"),
    Clip(colour="cyan", shape="ring", motion="turning orange", background="black"),
    Clip(colour="orange", shape="circle", motion="turning cyan", background="beige"),
)
PLANTED_NOTES: tuple[Scene, ...] = (
    Count(count=5, colour="pink", shape="cross", background="beige"),
    Count(count=5, colour="purple", shape="cross", background="beige"),
    Count(count=5, colour="pink", shape="heart", background="white"),
)
PDF_PAGES: tuple[Page, ...] = (
    Page(title="grape", word="lemon", colour="purple"),
    Page(title="flute", word="lemon", colour="purple"),
    Page(title="lemon", word="flute", colour="purple"),
    Page(title="flute", word="wheat", colour="purple"),
    Page(title="piano", word="night", colour="blue"),
    Page(title="hotel", word="bread", colour="red"),
)
