"""The start-up check: its stored values against plain transformers, and stacks that are broken."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLModel

from qvl_batch.api.parity import (
    CASES,
    CHECKPOINT,
    DOCUMENT,
    IMAGE,
    MAX_TOKENS,
    VIDEO,
    certify,
    check_items,
    check_stack,
    read_stored,
)
from qvl_batch.api.reader import ItemReader
from qvl_batch.demo.checkpoint import embedding_dir
from qvl_batch.errors import ModelError
from qvl_batch.model.patches import patch_rows
from qvl_batch.model.prompt import PromptTokenizer
from qvl_batch.storage import Storage


@pytest.fixture
def spoilt_cases(tmp_path):
    return shutil.copytree(CASES, tmp_path / "cases")


@pytest.fixture
def spoilt_checkpoint(tmp_path):
    return shutil.copytree(CHECKPOINT, tmp_path / "checkpoint")


def test_stored_vectors_are_those_of_plain_transformers():
    """Conv3d, SDPA, its own positions and DeepStack on our ids and pixels, one by one."""
    model = Qwen3VLModel.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    tokenizer = PromptTokenizer(CHECKPOINT, max_tokens=MAX_TOKENS)
    reader = ItemReader(tokenizer, storage=Storage(), image=IMAGE, video=VIDEO, document=DOCUMENT)
    stored = read_stored()
    for name, item in check_items().items():
        unit = reader.read(item)
        ids = torch.from_numpy(tokenizer.encode(unit).ids)[None]
        options = {}
        for suffix, key, visions in (
            ("", "image", unit.images),
            ("_videos", "video", unit.videos),
        ):
            if visions:
                rows = [patch_rows(v.pixels, ids.device, torch.float32) for v in visions]
                options[f"pixel_values{suffix}"] = torch.cat(rows)
                options[f"{key}_grid_thw"] = torch.tensor([v.grid for v in visions])
        types = (ids == tokenizer.special["<|image_pad|>"]).int()
        types = types + 2 * (ids == tokenizer.special["<|video_pad|>"]).int()
        with torch.inference_mode():
            out = model(input_ids=ids, mm_token_type_ids=types, use_cache=False, **options)
        state = out.last_hidden_state[0, -1]
        np.testing.assert_allclose(
            (state / state.norm()).numpy(), stored[name].vector, atol=2e-6, err_msg=name
        )
    reader.close()


def test_the_images_pixels_are_pillows():
    picture = Image.open(CASES / "picture.png").convert("RGB")
    resized = np.asarray(picture.resize((128, 96), Image.Resampling.BICUBIC))[None]
    digest = hashlib.sha256(f"uint8 {resized.shape}\0".encode() + resized.tobytes())
    assert digest.hexdigest() == read_stored()["image"].pixels


def test_this_installation_holds_and_its_certificate_is_its_json():
    certificate = check_stack()
    assert certificate.holds
    assert [case.case for case in certificate.cases] == ["text", "image", "page", "video"]
    assert {case.status for case in certificate.cases} == {"equal"}
    stated = json.loads(certificate.to_json())
    assert len(stated["checkpoints"]["embedding"]) == 64
    assert certificate.sha256 == hashlib.sha256(certificate.to_json().encode()).hexdigest()
    assert certify().sha256 == certificate.sha256
    assert embedding_dir() == CHECKPOINT


def test_another_tokenizer_is_named(spoilt_checkpoint):
    path = spoilt_checkpoint / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\w|\W"}
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match=r"ids, vector of the text;.*model\.check: false"):
        check_stack(spoilt_checkpoint)


def test_other_weights_are_named_by_their_vectors(spoilt_checkpoint):
    path = spoilt_checkpoint / "model.safetensors"
    weights = load_file(path)
    (key,) = (key for key in weights if key.endswith("visual.pos_embed.weight"))
    weights[key] = weights[key] * 1.05
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ModelError, match="vector of the image; vector of the page; vector of the"):
        check_stack(spoilt_checkpoint)


def test_other_pixels_are_named(spoilt_cases):
    picture = np.array(Image.open(spoilt_cases / "picture.png"))
    picture[70:80, 100:110] ^= 8
    Image.fromarray(picture).save(spoilt_cases / "picture.png")
    result = {case.case: case for case in certify(folder=spoilt_cases).cases}
    assert (result["image"].pixels, result["image"].ids) == ("different", "equal")
    assert {result[name].status for name in ("text", "page", "video")} == {"equal"}
    with pytest.raises(ModelError, match=r"it should: pixels(, vector)? of the image \(with"):
        check_stack(folder=spoilt_cases)


def test_a_decoder_that_does_not_work_is_named(spoilt_cases):
    (spoilt_cases / "clip.mp4").write_bytes((spoilt_cases / "clip.mp4").read_bytes()[:200])
    with pytest.raises(ModelError, match="the video can not be decoded: "):
        check_stack(folder=spoilt_cases)
