"""The stages as plain callables, with a small real engine: a vector is the mean colour."""

import datetime as dt

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from qvl_batch import schema
from qvl_batch.errors import BadVectorError
from qvl_batch.jobs.stages import DecodeMedia, EmbedMedia, WriteRows
from qvl_batch.media.decoder import DecodeLimits
from qvl_batch.media.fetch import FetchLimits
from qvl_batch.recipe import DocumentBudget, Recipe
from qvl_batch.storage import Storage
from qvl_batch.tables.layout import partition_json
from qvl_batch.tables.store import TableStore
from qvl_batch.units import Embedded

RECIPE = Recipe(
    model_digest="mean colour",
    dim=8,
    encodings=("float32",),
    document=DocumentBudget(dpi=72, max_px=4096),
)


class MeanColourEngine:
    """The mean of each channel, then the text's length; a black picture has no direction."""

    def embed(self, inputs):
        vectors = np.zeros((len(inputs), 8), np.float32)
        failures = {}
        for i, one in enumerate(inputs):
            for vision in (*one.videos, *one.images):
                vectors[i, :3] += vision.pixels.reshape(-1, 3).mean(axis=0)
            vectors[i, 3] = sum(map(len, one.texts))
            norm = np.linalg.norm(vectors[i])
            if norm == 0:
                failures[i] = BadVectorError(one.uri, "norm is 0")
            else:
                vectors[i] /= norm
        return Embedded(
            columns={"vector": vectors},
            num_tokens=np.arange(1, len(inputs) + 1, dtype=np.int32),
            truncated=np.zeros(len(inputs), np.bool_),
            failures=failures,
        )


def planned(*units):
    rows = [
        dict.fromkeys(schema.PLANNED.names)
        | {"unit_id": f"u{i}", "media_id": f"m{i}", "_ordinal": i, "_table": "t", "_attempt": 0}
        | {"kind": "text"}
        | unit
        for i, unit in enumerate(units)
    ]
    return pa.Table.from_pylist(rows, schema.PLANNED)


def picture(path, colour):
    Image.new("RGB", (64, 64), colour).save(path)
    return {"uri": str(path), "kind": "image"}


@pytest.fixture
def decode():
    workers = []

    def start(**changes):
        stage = DecodeMedia(
            **{
                "storage": Storage(),
                "recipe": RECIPE,
                "fetch_limits": FetchLimits(),
                "decode_limits": DecodeLimits(),
                "resize": "tests.media.resizes:stretch",
                "load_counter": lambda: lambda **_: 1,
            }
            | changes
        )
        workers.append(stage.open())
        return workers[-1]

    yield start
    for worker in workers:
        worker.close()


def test_one_row_a_unit_in_the_order_given_whatever_becomes_of_it(decode, tmp_path):
    units = planned(
        {"text": "hello"},
        picture(tmp_path / "red.png", "red"),
        {"uri": str(tmp_path / "absent.png"), "kind": "image"},
        picture(tmp_path / "black.png", "black"),
        {"text": "bye"},
    )
    decoded = decode()(units)
    assert decoded.schema.equals(schema.decoded(units.schema))
    embedded = EmbedMedia(MeanColourEngine)(decoded)
    assert embedded.schema.equals(schema.embedded(units.schema))
    assert embedded["unit_id"].to_pylist() == ["u0", "u1", "u2", "u3", "u4"]
    reasons = [failure and failure["error_type"] for failure in embedded["_failure"].to_pylist()]
    assert reasons == [None, None, "MissingMediaError", "BadVectorError", None]
    rows = embedded["_rows"].to_pylist()
    assert [len(unit) for unit in rows] == [1, 1, 0, 0, 1]
    red = np.frombuffer(rows[1][0]["vector"], np.float32)
    np.testing.assert_allclose(red[:4], [1, 0, 0, 0], atol=1e-6)
    assert (rows[1][0]["width_px"], rows[1][0]["num_frames"]) == (64, 1)


def test_a_document_fails_as_a_whole_if_one_page_gives_no_vector(decode, tmp_path):
    for name, colours in (("a.pdf", ("red", "black", "blue")), ("b.pdf", ("blue", "red"))):
        first, *others = (Image.new("RGB", (64, 64), colour) for colour in colours)
        first.save(tmp_path / name, save_all=True, append_images=others, resolution=72)
    units = planned(
        {"uri": str(tmp_path / "a.pdf"), "kind": "document"},
        {"uri": str(tmp_path / "b.pdf"), "kind": "document"},
    )
    embedded = EmbedMedia(MeanColourEngine)(decode()(units)).to_pylist()
    assert embedded[0]["_failure"]["error_type"] == "BadVectorError"
    assert embedded[0]["_rows"] == []
    assert embedded[1]["_failure"] is None
    assert [row["page"] for row in embedded[1]["_rows"]] == [0, 1]
    assert {row["num_segments"] for row in embedded[1]["_rows"]} == {2}


def test_a_block_that_comes_after_the_stop_is_neither_done_nor_failed(decode, tmp_path):
    asked = []

    def may_start(ordinal):
        asked.append(ordinal)
        return False

    units = planned({"text": "hello"}, picture(tmp_path / "red.png", "red"))
    embedded = EmbedMedia(MeanColourEngine)(decode(may_start=may_start)(units))
    assert asked == [0]
    write = writer(tmp_path)
    written = write([embedded], frozenset())
    assert written.not_started.tolist() == [0, 1]
    assert (written.num_units, written.num_rows, written.failures.num_rows) == (0, 0, 0)
    assert written.fragments == {}


def writer(tmp_path):
    store = TableStore(str(tmp_path / "root"))
    store.check_writable()
    table = schema.table_rows(RECIPE, [], {})
    store.create("t", table)
    return WriteRows(
        root=store.root,
        storage=Storage(),
        collection="c",
        schemas={"t": table},
        partitions={"t": partition_json(())},
        run_id="run",
    )


def test_writing_again_without_what_was_received_leaves_it_out(decode, tmp_path):
    units = planned(
        {"text": "one"}, {"text": "two"}, {"uri": str(tmp_path / "no.png"), "kind": "image"}
    )
    embedded = EmbedMedia(MeanColourEngine)(decode()(units))
    write = writer(tmp_path)
    first = write([embedded], frozenset())
    assert (first.num_units, first.num_rows, first.failures.num_rows) == (2, 2, 1)
    assert first.failures["attempt"].to_pylist() == [1]
    again = write([embedded, embedded.slice(0, 0)], frozenset({0, 2}))
    assert again.ordinals.tolist() == [1]
    assert (again.num_rows, again.failures.num_rows) == (1, 0)
    assert first.failures["failed_at"][0].as_py() <= dt.datetime.now(dt.UTC)
