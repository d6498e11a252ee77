"""Prompts against the checkpoint's tokenizer run on a plainly written prompt."""

import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from qvl_batch.errors import EmbedFailedError, ModelError
from qvl_batch.model.chat import RERANK_SYSTEM
from qvl_batch.model.prompt import PromptTokenizer
from qvl_batch.units import EmbedInput, PartPlan
from tests.model.model_inputs import clip, edit_json, picture

TEXTS = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
        st.text(" \n\t\r\u00a0\u3000e\u0301<|>imend_", max_size=25),
    ),
    max_size=3,
)


def rendered(texts, images=(), videos=(), instruction=None, nested=False):
    """The prompt as the official class writes it, in plain string arithmetic."""
    system = (instruction or "").strip()
    if system and not unicodedata.category(system[-1]).startswith("P"):
        system += "."
    user = ""
    for groups, pads, seconds in videos:
        assert groups == len(seconds)
        inner = "".join(
            f"<{second:.1f} seconds><|vision_start|>{'<|video_pad|>' * pads}<|vision_end|>"
            for second in seconds
        )
        user += f"<|vision_start|>{inner}<|vision_end|>" if nested else inner
    for pads in images:
        user += f"<|vision_start|>{'<|image_pad|>' * pads}<|vision_end|>"
    user += "".join(texts)
    if not (texts or images or videos):
        user = "NULL"
    system = system or "Represent the user's input."
    return (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.fixture(scope="module")
def plain(embedding_folder):
    return Tokenizer.from_file(str(embedding_folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def prompts(embedding_folder):
    return PromptTokenizer(embedding_folder, max_tokens=2000)


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.one_of(st.none(), st.text(st.characters(exclude_categories=["Cs"]), max_size=20)))
def test_texts_equal_the_whole_string(plain, prompts, texts, instruction):
    # Literal special tokens are the documented difference; they have their own test.
    assume(
        not any(token in "".join([*texts, instruction or ""]) for token in prompts.special_tokens)
    )
    expected = plain.encode(rendered(texts, instruction=instruction)).ids
    unit = EmbedInput(texts=tuple(texts), instruction=instruction)
    assert prompts.encode(unit).ids.tolist() == expected
    assert prompts.count(texts=tuple(texts), instruction=instruction) == len(expected)


@pytest.mark.parametrize("nested", [False, True])
def test_parts_stand_in_the_official_order(plain, embedding_folder, nested):
    prompts = PromptTokenizer(
        embedding_folder, max_tokens=2000, token_layout="nested" if nested else "unnested"
    )
    unit = EmbedInput(
        texts=("one", "two"),
        images=(picture(1, 64, 96), picture(2, 32, 32)),
        videos=(clip(3, 2, 64, 64), clip(4, 1, 32, 64)),
    )
    text = rendered(("one", "two"), (6, 1), ((2, 4, (0.3, 2.0)), (1, 2, (0.3,))), nested=nested)
    found = prompts.encode(unit)
    assert found.ids.tolist() == plain.encode(text).ids
    image, video = (plain.token_to_id(f"<|{kind}_pad|>") for kind in ("image", "video"))
    kinds = [set(found.ids[span.start : span.end].tolist()) for span in found.spans]
    assert kinds == [{video}, {video}, {video}, {image}, {image}]
    assert [(span.rows, span.columns) for span in found.spans] == [
        *[(2, 2), (2, 2), (1, 2)],
        *[(2, 3), (1, 1)],
    ]
    assert int(np.isin(found.ids, [image, video]).sum()) == 17


def test_count_needs_plans_only(prompts):
    plans = [
        PartPlan(0, (0, 5, 9, 14), 64, 96, seconds=(0.25, 1.2)),
        PartPlan(0, (0,), 320, 640),
    ]
    unit = EmbedInput(
        texts=("a caption",),
        images=(picture(0, 640, 320),),
        videos=(clip(1, 2, 96, 64),),
        instruction="Find it",
    )
    counted = prompts.count(texts=("a caption",), instruction="Find it", plans=plans)
    assert counted == len(prompts.encode(unit).ids)


def test_special_tokens_in_texts_are_text(prompts, plain):
    special = plain.token_to_id("<|im_end|>")
    found = prompts.encode(EmbedInput(texts=("end <|im_end|> of <|endoftext|>",))).ids.tolist()
    assert found.count(special) == 2  # system and user turn, as ever
    assert found.count(plain.token_to_id("<|endoftext|>")) == 1
    assert plain.decode(found, skip_special_tokens=False) == (
        rendered(("end <|im_end|> of <|endoftext|>",)) + "<|endoftext|>"
    )


def test_long_text_is_cut_as_the_tokenizer_cuts(embedding_folder, prompts):
    text = " ".join(f"word{i}" for i in range(1500))
    cutting = Tokenizer.from_file(str(embedding_folder / "tokenizer.json"))
    cutting.enable_truncation(2000)
    found = prompts.encode(EmbedInput(texts=(text,)))
    assert found.ids.tolist() == cutting.encode(rendered((text,))).ids
    assert found.truncated
    assert len(found.ids) == 2000
    assert found.num_untruncated == prompts.count(texts=(text,)) > 2000
    assert not prompts.encode(EmbedInput(texts=("short",))).truncated


def test_uncuttable_tokens_decide_what_can_be_embedded(embedding_folder):
    """A context of exactly that many tokens takes the picture, one token less does not."""
    plan, unit = PartPlan(0, (0,), 96, 128), EmbedInput(("long " * 99,), (picture(0, 128, 96),))
    least = PromptTokenizer(embedding_folder).count_uncuttable(plans=[plan])
    fitting = PromptTokenizer(embedding_folder, max_tokens=least).encode(unit)
    assert fitting.spans[-1].end + 1 == len(fitting.ids) == least
    with pytest.raises(EmbedFailedError):
        PromptTokenizer(embedding_folder, max_tokens=least - 1).encode(unit)


def test_the_cut_never_falls_into_an_image(embedding_folder):
    short = PromptTokenizer(embedding_folder, max_tokens=64)
    fits = short.encode(EmbedInput(texts=("word " * 99,), images=(picture(0, 128, 128),)))
    assert len(fits.ids) == 64
    assert fits.spans[-1].end < 64
    unit = EmbedInput(images=(picture(0, 256, 256),), uri="a.png")
    with pytest.raises(EmbedFailedError, match=r"needs \d\d tokens.*the context is 64") as error:
        short.encode(unit)
    assert error.value.uri == "a.png"


def test_half_a_surrogate_pair_fails_its_unit(prompts):
    with pytest.raises(EmbedFailedError, match="not valid Unicode"):
        prompts.encode(EmbedInput(texts=("a\ud800b",), uri="x"))


def test_times_and_frames_must_agree(prompts):
    wrong = clip(0, 3)
    object.__setattr__(wrong, "seconds", (0.1,))
    with pytest.raises(ValueError, match="3 pairs of frames, 1 times"):
        prompts.encode(EmbedInput(videos=(wrong,)))


def test_pair_prompt(reranker_folder):
    prompts = PromptTokenizer(reranker_folder)
    plain = Tokenizer.from_file(str(reranker_folder / "tokenizer.json"))
    query, document = EmbedInput(texts=("what?",)), EmbedInput(images=(picture(0, 32, 64),))
    text = (
        f"<|im_start|>system\n{RERANK_SYSTEM}<|im_end|>\n<|im_start|>user\n<Instruct>: judge"
        "<Query>:what?\n<Document>:<|vision_start|><|image_pad|><|image_pad|><|vision_end|>"
        "<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompts.encode_pair("judge", query, document).ids.tolist() == plain.encode(text).ids


def test_pair_cut_keeps_vision_tokens_and_the_tail(reranker_folder):
    short = PromptTokenizer(reranker_folder, max_tokens=120)
    plain = Tokenizer.from_file(str(reranker_folder / "tokenizer.json"))
    pad = plain.token_to_id("<|image_pad|>")
    pair = EmbedInput(texts=("word " * 300,)), EmbedInput(images=(picture(0, 96, 96),))
    found = short.encode_pair("judge", *pair)
    assert len(found.ids) == 125
    assert found.truncated
    (span,) = found.spans
    assert set(found.ids[span.start : span.end].tolist()) == {pad}
    assert found.ids.tolist().count(pad) == 9
    whole = PromptTokenizer(reranker_folder).encode_pair("judge", *pair)
    assert found.ids[-5:].tolist() == whole.ids[-5:].tolist()


def test_a_tokenizer_without_endoftext_is_refused(checkpoint_copy):
    def change(tokenizer):
        tokenizer["post_processor"] = None

    edit_json(checkpoint_copy / "tokenizer.json", change)
    with pytest.raises(ModelError, match=r"does not append <\|endoftext\|>"):
        PromptTokenizer(checkpoint_copy).require_endoftext()


def test_other_vision_ids_in_config_are_refused(checkpoint_copy):
    edit_json(checkpoint_copy / "config.json", lambda config: config.update(image_token_id=7))
    with pytest.raises(ModelError, match=r"image_token_id 7, tokenizer\.json has 1512"):
        PromptTokenizer(checkpoint_copy)


def test_import_is_light():
    code = "import qvl_batch.model.prompt, sys; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
