"""The benchmarks on a tiny size: equal results and right counts; nothing about time."""

import importlib.util
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.bench.beds import make_bed
from tests.bench.bench_packing import PACKED, bench_packing
from tests.bench.bench_peers import OURS, PLAIN, SENTENCE_OPEN, SENTENCE_WAYS, bench_peers
from tests.bench.bench_rerank import WAYS, bench_rerank
from tests.bench.flops import cost_of, work
from tests.bench.padded import by_length, in_order
from tests.bench.shapes import SMALL, TWO_B, random_model

CPU = torch.device("cpu")
TINY = replace(
    SMALL, hidden=128, inter=256, layers=3, vision_depth=3, vision_inter=128, deepstack=(0, 1, 2)
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    return make_bed(TINY, CPU, tmp_path_factory.mktemp("bed"))


@pytest.fixture(scope="module")
def in_memory(tmp_path_factory):
    shape = replace(TWO_B.shrunk(), hidden=128, inter=256, heads=2, kv_heads=1)
    return make_bed(shape, CPU, tmp_path_factory.mktemp("bed"))


def test_2b_costs_what_its_published_sizes_give():
    cost = cost_of(TWO_B)
    assert cost.token == pytest.approx(2.82e9, rel=0.01)
    assert cost.patch == pytest.approx(0.607e9, rel=0.01)
    assert cost.merged == pytest.approx(0.20e9, rel=0.01)


def test_linear_flops_equal_torchs_count():
    cost = cost_of(TINY)
    model = random_model(TINY, CPU, torch.float32)
    embeds = torch.zeros(1, 7, TINY.hidden)
    positions = torch.arange(7).expand(3, 1, 7)
    with FlopCounterMode(display=False) as counter:
        model.language_model(inputs_embeds=embeds, position_ids=positions, use_cache=False)
    counted = counter.get_flop_counts()["Global"]
    linear = sum(
        n for name, n in counted.items() if name in (torch.ops.aten.mm, torch.ops.aten.addmm)
    )
    assert linear == 7 * cost.token


def test_what_is_left_out_is_less_than_the_last_layer():
    cost = cost_of(TINY)
    assert 0.5 / TINY.layers < cost.left_out(100) / cost.language(100) < 1 / TINY.layers
    # Of the 2B model's linear FLOPs it is 3.3 %.
    assert cost_of(TWO_B).last_layer / cost_of(TWO_B).token == pytest.approx(0.033, abs=0.001)


def test_padding_is_counted_by_hand():
    done = work(cost_of(TINY), [[10, 30], [5]], [])
    assert (done.tokens, done.positions) == (45, 65)
    assert done.padded_positions == pytest.approx(20 / 65)
    assert 0 < done.padded_flops < 1
    assert work(cost_of(TINY), [[10], [30]], [(1, 4, 4)]).padded_flops == 0


def test_batches_hold_every_index_once():
    assert in_order(5, 2) == [[0, 1], [2, 3], [4]]
    assert by_length([3, 9, 1, 7], 2) == [[1, 3], [0, 2]]


@pytest.mark.parametrize("bed", ["on_disk", "in_memory"])
def test_every_way_of_batching_gives_the_same_vectors(bed, request):
    bed = request.getfixturevalue(bed)
    result = bench_packing(bed, units=10, rounds=1, batch_tokens=512)
    assert PACKED in result.max_abs_diff
    assert max(result.max_abs_diff.values()) < 2e-6


@pytest.mark.parametrize("bed", ["on_disk", "in_memory"])
def test_peers_agree_with_ours(bed, request, tmp_path):
    bed = request.getfixturevalue(bed)
    result = bench_peers(bed, tmp_path, texts=3, pictures=2, rounds=1, batch_tokens=512)
    assert result.max_abs_diff[OURS] < 2e-6
    assert PLAIN not in result.missing
    if importlib.util.find_spec("sentence_transformers") is None:
        assert set(result.missing) == set(SENTENCE_WAYS)
        assert "sentence_transformers" in result.missing[SENTENCE_OPEN]
    else:
        assert result.missing == {}
        assert min(result.min_cosine.values()) > 0.9999


@pytest.mark.parametrize("bed", ["on_disk", "in_memory"])
def test_reuse_changes_no_score(bed, request):
    bed = request.getfixturevalue(bed)
    result = bench_rerank(bed, candidates=(4,), side_px=64, rounds=1, batch_tokens=512)
    assert set(result.max_abs_diff) == {(4, name) for name in WAYS}
    assert max(result.max_abs_diff.values()) < 1e-5
