"""The doctor on the shipped golden folder, and on folders made from parts of it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qvl_batch.api.doctor import certify_golden, doctor, format_table, run_doctor
from qvl_batch.api.frame_lists import frame_list_indices
from qvl_batch.api.golden import has_palette_transparency, read_golden
from qvl_batch.errors import InputError
from qvl_batch.model.prompt import PromptTokenizer
from qvl_batch.units import EmbedInput, Vision

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
MODEL = GOLDEN / "checkpoint" / "embedding"
RERANKER = GOLDEN / "checkpoint" / "reranker"
DOCUMENTED = {"text_special", "text_image_pad_literal"}
OFFICIAL_FAILED = {
    *("frames_mixed_size", "batch_bad_image", "img_emptystr", "img_corrupt.jpg"),
    *("img_notimage.png", "img_ratio_201x1.png", "vid_corrupt.mp4", "vid_v10_1f_320x240.mp4"),
    *("rr_bad_image", "rr_empty_query"),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def results():
    return {result.case: result for result in run_doctor(MODEL, GOLDEN, RERANKER)}


def test_every_case_is_there_and_as_it_should_be(results):
    _, cases = read_golden(GOLDEN)
    assert list(results) == [case.name for case in cases]
    statuses = {name: result.status for name, result in results.items()}
    expected = dict.fromkeys(results, "equal")
    expected |= dict.fromkeys(DOCUMENTED, "documented difference")
    expected |= dict.fromkeys(OFFICIAL_FAILED, "official failed")
    assert statuses == expected


def test_equal_means_bit_equal_ids_grids_and_pixels(results):
    for name, result in results.items():
        if result.status != "equal":
            continue
        assert result.ids == "equal"
        if name.startswith(("img_", "vid_", "frames_", "video_", "image_")) and "empty" not in name:
            assert (result.grid, result.pixels) == ("equal", "equal"), name
        assert result.max_abs_diff <= 1e-5
        if not name.startswith("rr_"):
            assert result.cosine >= 0.99999


def test_reasons_of_what_the_official_code_lost(results):
    assert "lone NULL prompt; ours: CorruptMediaError" in results["img_corrupt.jpg"].reason
    assert "at least 2" in results["vid_v10_1f_320x240.mp4"].reason
    batch = results["batch_bad_image"].reason
    assert "3 units in, 1 vector(s) out" in batch
    assert "ours [0]: a vector" in batch
    assert "ours [1]: KindMismatchError" in batch
    assert "ours [2]: a vector" in batch
    assert "ours: score 0." in results["rr_empty_query"].reason
    assert "<|image_pad|> in the text" in results["text_image_pad_literal"].reason


def test_the_table_shows_every_case(results):
    table = format_table(list(results.values()))
    assert table.row_count == len(results)
    assert [column.header for column in table.columns] == [
        *("case", "status", "ids", "grid", "pixels", "cosine", "max_abs_diff", "reason"),
    ]


@pytest.fixture
def folder(tmp_path):
    """A folder of some cases under other names, each of which a test may change."""

    def make(cases, change=lambda entries, arrays: None):
        stated = json.loads((GOLDEN / "golden.json").read_text())["cases"]
        stored = np.load(GOLDEN / "golden.npz")
        entries = {new: stated[old] for new, old in cases.items()}
        arrays = {
            f"{new}/{key.removeprefix(old + '/')}": stored[key]
            for new, old in cases.items()
            for key in stored.files
            if key.startswith(old + "/")
        }
        change(entries, arrays)
        (tmp_path / "golden.json").write_text(json.dumps({"cases": entries}))
        np.savez(tmp_path / "golden.npz", **arrays)
        if not (tmp_path / "media").exists():
            (tmp_path / "media").symlink_to(GOLDEN / "media")
        return tmp_path

    return make


def statuses(folder, reranker=RERANKER):
    return {r.case: (r.status, r.reason) for r in run_doctor(MODEL, folder, reranker)}


def test_cases_are_told_apart_by_content_not_by_name(folder):
    made = folder(
        {
            "a": "text_plain",
            "b": "text_special",
            "c": "batch_bad_image",
            "rr_d": "img_small_20x30.png",
            "e": "rr_instr",
            "frames": "img_corrupt.jpg",
        }
    )
    assert [status for status, _ in statuses(made).values()] == [
        *("equal", "documented difference", "official failed", "equal", "equal"),
        "official failed",
    ]


def test_wrong_vectors_ids_grids_pixels_and_scores_are_found(folder):
    def change(entries, arrays):
        arrays["vector/embedding"][0, 3] += 2e-5
        arrays["ids/input_ids"][0, 30] += 1
        arrays["grid/image_grid_thw"][0] = [1, 4, 6]
        arrays["pixels/pixel_values"][5, 7] += 1e-6
        entries["sha"]["inputs"]["pixel_values"]["sha256"] = "0" * 64
        arrays["score/scores"][0] += 2e-5

    made = folder(
        {
            "vector": "text_plain",
            "ids": "text_instr",
            "grid": "img_small_20x30.png",
            "pixels": "img_tiny_1x1.png",
            "sha": "img_img.webp",
            "score": "rr_instr",
        },
        change,
    )
    found = statuses(made)
    assert {status for status, _ in found.values()} == {"different"}
    for name, words in (
        ("vector", "off by 2e-05"),
        ("ids", "token ids: 55 here, 55 there"),
        ("grid", "grids [[1, 6, 4]] here, [[1, 4, 6]] there"),
        ("pixels", "pixels of the images"),
        ("sha", "sha256"),
        ("score", "score is off by 2e-05"),
    ):
        assert words in found[name][1]
    assert doctor(str(MODEL), str(made), str(RERANKER), as_json=True) == 1


def test_a_literal_token_excuses_its_own_unit_only(folder):
    """Two units in one batch: the one with the literal token may differ, the other may not."""

    def join(entries, arrays, offset):
        entries["batch"]["input"] += entries.pop("other")["input"]
        entries["batch"] |= {"n_in": 2, "n_out": 2, "decoded": None}
        widest = max(arrays[f"{name}/input_ids"].shape[1] for name in ("batch", "other"))
        for key in ("input_ids", "attention_mask", "embedding"):
            rows = [arrays[f"batch/{key}"], arrays.pop(f"other/{key}")]
            if key != "embedding":
                rows = [np.pad(row, ((0, 0), (0, widest - row.shape[1]))) for row in rows]
            arrays[f"batch/{key}"] = np.concatenate(rows)
        arrays["batch/embedding"][1, 0] += offset

    cases = {"batch": "text_special", "other": "text_plain"}
    ((status, _),) = statuses(folder(cases, lambda e, a: join(e, a, 0))).values()
    assert status == "documented difference"
    ((status, reason),) = statuses(folder(cases, lambda e, a: join(e, a, 1e-3))).values()
    assert status == "different"
    assert "vector [1]" in reason


def test_missing_fields_are_not_compared(folder):
    def strip(entries, arrays):
        for name in ("few", "nothing"):
            for key in ("inputs", "decoded", "norm", "n_out", "n_in", "image_grid_thw"):
                entries[name].pop(key, None)
        for key in list(arrays):
            if key.startswith("nothing/") or (key.startswith("few/") and "embedding" not in key):
                del arrays[key]

    found = statuses(folder({"few": "img_small_20x30.png", "nothing": "text_plain"}, strip))
    assert found["few"][0] == "equal"
    assert found["nothing"][0] == "different"
    assert "nothing to compare" in found["nothing"][1]


def test_several_parts_in_one_unit_and_an_error_of_the_official_code(folder):
    """What the official code could not do is a vector here: a long HD clip, many parts."""

    def change(entries, arrays):
        arrays.clear()
        entries["parts"] = {
            "input": [
                {
                    "text": ["one", "two"],
                    "image": ["media/small_20x30.png", "media/tiny_1x1.png"],
                    "video": ["media/v10_2f_320x240.mp4", "media/v10_3f_320x240.mp4"],
                },
                {"video": [["media/tiny_1x1.png"] * 3, "media/corrupt.mp4"]},
                {"video": [[]]},
            ],
            "error": "Traceback …\nValueError: Mismatch in image token count",
        }
        entries["long"] = {
            "input": [{"video": "media/v1fps_70s_1280x720.mp4"}],
            "error": "ValueError: Mismatch in video token count",
        }

    found = statuses(folder({"parts": "text_plain"}, change))
    assert found["parts"][0] == found["long"][0] == "official failed"
    assert "official: ValueError: Mismatch in image token count" in found["parts"][1]
    assert "ours [0]: a vector; ours [1]: CorruptMediaError" in found["parts"][1]
    assert "ours [2]: a vector" in found["parts"][1]
    assert "7,864,320 px in total; ours: a vector" in found["long"][1]


def test_a_long_text_behind_a_clip_is_cut_and_the_clip_is_not(folder):
    """The official class cuts the text; the documented total is for clips alone too long."""

    def change(entries, arrays):
        arrays.clear()
        text = {"repeat": "word{i}", "count": 3000, "joined_by": " "}
        entries["cut"]["input"][0] |= {"text": text, "video": "media/v10_2f_320x240.mp4"}
        entries["cut"] |= {"error": "as if", "n_out": 0}

    ((status, reason),) = statuses(folder({"cut": "text_plain"}, change)).values()
    assert status == "official failed"
    assert reason == "official: as if; ours: a vector"


def test_goldens_of_a_transformers_that_nests_vision_tokens(folder):
    """Their prompts tell; ours is then rendered the same way."""
    unit = EmbedInput(videos=(Vision(np.zeros((2, 320, 448, 3), np.uint8), (0.05,)),))

    def change(entries, arrays):
        arrays["clip/input_ids"] = (
            PromptTokenizer(MODEL, token_layout="nested").encode(unit).ids[None]
        )
        prompt = entries["clip"]["decoded"][0].replace("user\n<0", "user\n<|vision_start|><0")
        entries["clip"]["decoded"] = [prompt]
        for name in ("attention_mask", "embedding"):
            del arrays[f"clip/{name}"]

    cases = {"clip": "vid_v10_2f_320x240.mp4"}
    ((status, _),) = statuses(folder(cases, change)).values()
    assert status == "equal"


def test_reranking_cases_need_a_reranker(folder, capsys):
    made = folder({"a": "text_plain", "b": "rr_instr"})
    assert list(statuses(made, reranker=None)) == ["a"]
    assert doctor(str(MODEL), str(made), None, as_json=True) == 0
    printed = capsys.readouterr()
    assert "1 reranking case(s) left out" in printed.err
    stated = json.loads(printed.out)
    (case,) = stated["cases"]
    assert case["case"] == "a"
    assert case["status"] == "equal"
    certificate = certify_golden(MODEL, made)
    assert stated.pop("sha256") == certificate.sha256
    assert stated == certificate.to_dict()
    assert stated["holds"]
    assert stated["thresholds"] == {"min_cosine": 0.99999, "max_abs_diff": 1e-5}
    assert "golden folder, sha256 " in stated["reference"]


def test_another_checkpoint_is_different_not_a_crash(folder, tmp_path):
    made = folder({"a": "text_plain"})
    other = shutil.copytree(MODEL, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.language_model.norm.weight"][7] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    (result,) = run_doctor(other, made)
    assert result.status == "different"


@pytest.mark.parametrize(
    ("model", "golden", "words"),
    [
        ("missing", GOLDEN, "no model folder"),
        (MODEL, "missing", "no golden folder"),
        (MODEL, MODEL, "no golden.json"),
        (GOLDEN, GOLDEN, "no config.json"),
    ],
)
def test_missing_folders(model, golden, words):
    with pytest.raises(InputError, match=words):
        doctor(str(model), str(golden), None, as_json=False)


def test_a_folder_that_is_no_golden(tmp_path):
    (tmp_path / "golden.json").write_text("[]")
    with pytest.raises(InputError, match="can not be read"):
        read_golden(tmp_path)


def test_frame_lists_as_the_official_class_takes_them():
    assert frame_list_indices(1) == [0, 0]
    assert frame_list_indices(3) == [0, 1, 2, 2]
    assert frame_list_indices(64) == list(range(64))
    seventy = frame_list_indices(70)
    assert len(seventy) == 64
    # Truncated, not rounded: 69 / 63 = 1.095, 20 steps are 21.9.
    assert seventy[20] == 21
    assert seventy[-1] == 69


@given(st.binary(max_size=60), st.sampled_from([b"\x89PNG\r\n\x1a\n", b"GIF89a", b""]))
def test_any_bytes_may_be_asked_for_transparency(body, head):
    assert has_palette_transparency(head + body) in (True, False)


def test_palette_transparency_is_seen():
    files = {
        p.name: has_palette_transparency(p.read_bytes()) for p in (GOLDEN / "media").glob("*.*")
    }
    assert [name for name, found in files.items() if found] == ["p_transp_400x240.png"]


def test_importing_the_doctor_is_light():
    code = "import qvl_batch.api.doctor, sys; print({'torch', 'av', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
