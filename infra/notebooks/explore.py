# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What is in these tables?
#
# `qvl-batch embed` turns pictures, pages, videos and texts into vectors: lists of numbers that lie
# close together when their contents are alike. It writes them to plain LanceDB tables. This
# notebook looks at such tables, asks them a question, and shows how far the answers can be trusted.
#
# Each row is one vector: of a picture, of a text, of one page of a document, or of a video. Rows
# lie in one table a partition (a day, say). All tables that were made in the same way form a
# collection.
#
# Settings are environment variables, so that the notebook can stay as it is:
#
# | variable | meaning |
# |---|---|
# | `QVL_ROOT` | folder or `s3://` address of the tables; default: what `qvl-batch demo` writes |
# | `QVL_COLLECTION` | which collection; default: the first |
# | `QVL_MODEL` | embedding model, if it does not lie where the tables say |
# | `QVL_RERANKER` | reranker model; without it that section is left out |
# | `QVL_QUERY` | the question |

# %%
import io
import json
import os
import textwrap
import warnings

import duckdb
import lancedb
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyarrow as pa
from IPython.display import Markdown, display

import qvl_batch
from qvl_batch.errors import UnitError
from qvl_batch.media.thumbnail import MediaPart, Thumbnailer
from qvl_batch.storage import Storage

# A progress bar that falls back to plain text is no news.
warnings.filterwarnings("ignore", message="IProgress not found")

ROOT = os.environ.get("QVL_ROOT", "qvl-demo/vectors")
QUERY = os.environ.get("QVL_QUERY", "two red circles")
RERANKER = os.environ.get("QVL_RERANKER")
# Rows looked at where all would be too many: of every table its share.
SAMPLE = 5_000

COLOURS = {
    "text": "#4878d0",
    "image": "#ee854a",
    "document": "#6acc64",
    "video": "#d65f5f",
    "mixed": "#956cb4",
}
plt.rcParams |= {
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "legend.frameon": False,
}
pd.options.display.max_colwidth = 70


def short(uri):
    """The end of an address: enough to know a file by."""
    return "" if uri is None else "/".join(str(uri).split("/")[-2:])


# %% [markdown]
# ## Connect
#
# `connect` reads names and counts only; no model is loaded before the first question. `health`
# compares tables and catalog and names whatever does not fit.

# %%
storage = Storage.of()
root = qvl_batch.connect(ROOT, storage=storage, model=os.environ.get("QVL_MODEL"))
database = lancedb.connect(ROOT, storage_options=storage.lance_options(ROOT))
print(root.health())

# %%
collections = root.collections().to_pandas()
name = os.environ.get("QVL_COLLECTION") or collections["collection"][0]
collection = root.collection(name)
collections.drop(columns=["recipe_id"])

# %% [markdown]
# ## What is there
#
# One line a partition. Failures are media that could not be embedded (broken, missing, too large);
# the table `_qvl_failures` has the reason of each.

# %%
partitions = collection.partitions().to_pandas()
partitions["partition"] = [
    ", ".join(f"{key}={value}" for key, value in json.loads(partition).items()) or "(all)"
    for partition in partitions["partition"]
]
partitions[["partition", "num_rows", "num_units", "num_failures", "updated_at"]]


# %%
def sample_rows(columns, size=SAMPLE):
    """Rows of the collection's tables, from each in proportion; all of them if there are few."""
    share = min(1.0, size / max(1, partitions["num_rows"].sum()))
    parts = []
    for table in partitions["table"]:
        dataset = database.open_table(table).to_lance()
        wanted = round(share * dataset.count_rows())
        if wanted:
            parts.append(dataset.sample(wanted, columns=columns).replace_schema_metadata(None))
    return pa.concat_tables(parts)


stored = [field.name for field in collection.schema if field.name.startswith("vector")]
rows = sample_rows(["row_id", "uri", "kind", "text", "num_tokens", "truncated", *stored])
frame = rows.drop_columns(stored).to_pandas()
kinds = [kind for kind in COLOURS if kind in set(frame["kind"])]
sampled = "all rows" if len(frame) == collection.count else f"a sample of {len(frame):,} rows"

fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
frame["kind"].value_counts()[kinds].plot.barh(ax=left, color=[COLOURS[kind] for kind in kinds])
left.set(title="Rows of each kind", xlabel="rows", ylabel="")
left.bar_label(left.containers[0], padding=3)
for place, kind in enumerate(kinds):
    tokens = frame.loc[frame["kind"] == kind, "num_tokens"]
    right.boxplot(
        tokens,
        positions=[place],
        orientation="horizontal",
        widths=0.6,
        patch_artist=True,
        boxprops={"facecolor": COLOURS[kind]},
        medianprops={"color": "black"},
    )
right.set_yticks(range(len(kinds)), kinds)
right.set(title="Size of a row as the model saw it", xlabel="tokens")
plt.show()

cut = int(frame["truncated"].sum())
display(Markdown(f"Drawn from {sampled}; {cut or 'none'} of them had a text that was cut to fit."))

# %% [markdown]
# ## Ask a question
#
# The question becomes a vector too, by the same model. `score` is the cosine between the two: 1 for
# the same direction, 0 for nothing in common. Scores are good for ordering rows; they are no
# probabilities, and different models have different scales. Pages count from 0, times are seconds.

# %%
SHOWN = ["rank", "score", "kind", "file", "page", "start_s", "end_s", "text"]
# What is needed to fetch a row's medium again.
PLACE = ["etag", "byte_offset", "byte_length"]


def shown(hits, columns=SHOWN):
    """Hits as a table to read: columns that are empty throughout are left out."""
    table = hits.to_pandas().assign(file=lambda hits: hits["uri"].map(short))
    table = table[[column for column in columns if table[column].notna().any()]]
    whole = ("rank", "rank_before", "rank_after", "page", "start_s", "end_s")
    numbers = table.select_dtypes("number").columns
    formats = {column: "{:.0f}" if column in whole else "{:.3f}" for column in numbers}
    words = [column for column in table if column not in numbers]
    styled = table.style.format(formats, na_rep="").hide(axis="index")
    return styled.set_properties(subset=words, **{"text-align": "left"})


hits = collection.search(QUERY, top_k=10, columns=PLACE)
display(Markdown(f"Nearest to **{QUERY}**:"))
shown(hits)


# %% [markdown]
# The media themselves, fetched again from where they lie: of a video a few frames, of a document
# the page. What has changed since it was embedded is not shown.


# %%
def pictures(hits, title, score="score"):
    """The first picture of each hit, under its score; of a text its beginning."""
    rows = hits.to_pylist()
    fields = ("uri", "kind", "page", "start_s", "end_s", *PLACE)
    parts = [
        None if row["kind"] == "text" else MediaPart(**{f: row[f] for f in fields}) for row in rows
    ]
    with Thumbnailer(storage) as thumbnailer:
        made = iter(thumbnailer.thumbnails([part for part in parts if part is not None]))
    fig, axes = plt.subplots(1, len(rows), figsize=(10, 2.0), squeeze=False)
    fig.suptitle(title, x=0.01, ha="left", weight="bold")
    for row, part, ax in zip(rows, parts, axes[0], strict=True):
        made_of_row = row["text"] if part is None else next(made)
        if isinstance(made_of_row, UnitError):
            made_of_row = type(made_of_row).__name__
        if isinstance(made_of_row, str):
            words = textwrap.fill(textwrap.shorten(made_of_row, 60), 12)
            ax.text(0.5, 0.5, words, ha="center", va="center", fontsize=7.5)
            ax.set_box_aspect(1)
        else:
            ax.imshow(plt.imread(io.BytesIO(made_of_row.pictures[0].jpeg), format="jpeg"))
        value = "no score" if row[score] is None else f"{row[score]:.2f}"
        ax.set_title(value, fontsize=9, weight="normal", loc="center")
        ax.set(xticks=[], yticks=[], xlabel=row["kind"])
    plt.show()


pictures(hits, f"The best {len(hits)} for “{QUERY}”, with their scores")

# %% [markdown]
# A query may also be a picture (`Path("photo.png")`), a vector, or a row. Here: what is most like
# the best hit?

# %%
alike = collection.like(hits["row_id"][0].as_py(), top_k=8, columns=PLACE)
pictures(alike, f"Most like {short(hits['uri'][0].as_py()) or 'the best hit'}")

# %% [markdown]
# ## Filters and facets
#
# `where` keeps rows by any column, `partitions` keeps whole tables. Values are values: no SQL is
# made of them. A facet counts the best hits by such a column.

# %%
depth = min(50, collection.count)
deep = collection.search(QUERY, top_k=depth).to_pandas()
deep["partition"] = deep["table"].map(partitions.set_index("table")["partition"])
deep.pivot_table(
    index="partition", columns="kind", values="row_id", aggfunc="count", fill_value=0, margins=True
)

# %%
others = deep.loc[deep["kind"] != deep["kind"][0], "kind"]
kind = others.iloc[0] if len(others) else deep["kind"][0]
display(Markdown(f"The same question, answered by rows of kind **{kind}** only:"))
shown(collection.search(QUERY, top_k=5, where={"kind": kind}))

# %% [markdown]
# ## How far do the best hits stand out?
#
# The scores of many rows for the question. Hits worth looking at stand apart from the bulk on the
# right. Kinds often have bulks of their own: compare scores within a kind rather than across.


# %%
def as_floats(rows):
    """The most exact vectors that are stored, float32 (rows, dim), and what they are."""
    if "vector" in rows.column_names:
        values = rows["vector"].combine_chunks()
        floats = values.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
        return floats.reshape(len(rows), -1), f"float{values.type.value_type.bit_width}"
    if "vector_int8" in rows.column_names:
        ints = rows["vector_int8"].combine_chunks().flatten().to_numpy()
        scale = rows["vector_scale"].to_numpy()[:, None]
        return ints.reshape(len(rows), -1).astype(np.float32) * scale, "int8"
    bits = rows["vector_bits"].combine_chunks().flatten().to_numpy().reshape(len(rows), -1)
    signs = np.unpackbits(bits, axis=1).astype(np.float32) * 2 - 1
    return signs / np.sqrt(signs.shape[1]), "binary"


vectors, reference = as_floats(rows)
scores = vectors @ collection.embed(QUERY)
tenth = hits["score"][-1].as_py()

fig, ax = plt.subplots(figsize=(9, 3.4))
ax.hist(
    [scores[frame["kind"] == kind] for kind in kinds],
    bins=40,
    stacked=True,
    color=[COLOURS[kind] for kind in kinds],
    label=kinds,
)
ax.axvline(tenth, color="black", linestyle="--", linewidth=1)
ax.annotate(
    f" the best {len(hits)} →",
    (tenth, 1),
    xycoords=("data", "axes fraction"),
    va="top",
    fontsize=9,
)
ax.set(title=f"Scores of {sampled} for “{QUERY}”", xlabel="score (cosine)", ylabel="rows")
ax.legend(title="kind")
plt.show()

# %% [markdown]
# ## A map
#
# The two directions in which the vectors differ most (principal components), drawn flat. What is
# close here is often alike, but most of the differences are in the directions that are not drawn:
# the axes say how much is. The best hits are circled.

# %%
centred = vectors - vectors.mean(axis=0)
spread, axes = np.linalg.eigh(centred.T @ centred)
points = centred @ axes[:, ::-1][:, :2]
drawn = spread[::-1][:2] / spread.sum()

fig, ax = plt.subplots(figsize=(7.5, 6))
for kind in kinds:
    of_kind = (frame["kind"] == kind).to_numpy()
    ax.scatter(*points[of_kind].T, s=22, color=COLOURS[kind], label=kind, alpha=0.75, linewidths=0)
best = frame["row_id"].isin(hits["row_id"].to_pylist()).to_numpy()
ax.scatter(*points[best].T, s=110, facecolors="none", edgecolors="black", label=f"best {len(hits)}")
ax.set(
    title=f"{sampled.capitalize()}, seen from where they differ most",
    xlabel=f"1st component ({drawn[0]:.0%} of the variance)",
    ylabel=f"2nd component ({drawn[1]:.0%} of the variance)",
    aspect="equal",
)
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# ## What do smaller vectors cost?
#
# Vectors can be stored as `float16`, `int8` (one byte a number) or `binary` (one bit a number). We
# take rows as questions and see how many of the ten nearest rows stay the same when vectors are
# stored smaller. `binary, then int8` is what search does: signs choose a short list, the bytes put
# it in order.

# %%
dim = vectors.shape[1]
neighbours = min(10, len(vectors) - 1)
chosen = np.random.default_rng(0).permutation(len(vectors))[:200]
asked = vectors[chosen]


def nearest(scores, count=neighbours):
    """Positions of the highest scores of each question, less the row that is asked with."""
    others = scores.copy()
    others[np.arange(len(chosen)), chosen] = -np.inf
    return np.argsort(-others, axis=1, kind="stable")[:, :count]


scale = np.abs(vectors).max(axis=1, keepdims=True) / 127
ints = np.round(vectors / scale) * scale
signs = np.where(vectors > 0, 1, -1).astype(np.float32)

exact = asked @ vectors.T
by_int8 = asked @ ints.T
by_bits = np.where(asked > 0, 1, -1).astype(np.float32) @ signs.T
shortlist = nearest(by_bits, min(200, max(neighbours, len(vectors) // 5)))
listed = np.full_like(by_int8, -np.inf)
np.put_along_axis(listed, shortlist, np.take_along_axis(by_int8, shortlist, axis=1), axis=1)

found = {
    "float32": (4 * dim, exact),
    "float16": (2 * dim, asked @ vectors.astype(np.float16).astype(np.float32).T),
    "int8": (dim + 4, by_int8),
    "binary, then int8": (dim + 4 + dim / 8, listed),
    "binary": (dim / 8, by_bits),
}
truth = nearest(exact)
same = {
    encoding: np.mean([len({*a} & {*b}) / len(a) for a, b in zip(truth, nearest(s), strict=True)])
    for encoding, (_, s) in found.items()
}

fig, ax = plt.subplots(figsize=(9, 3.2))
encodings = list(found)[::-1]
bars = ax.barh(encodings, [100 * same[encoding] for encoding in encodings], color="#4878d0")
ax.bar_label(bars, [f"{found[e][0]:,.0f} bytes, {same[e]:.1%}" for e in encodings], padding=3)
ax.set(
    title=f"The {neighbours} nearest rows that stay, and bytes a vector of {dim} numbers",
    xlabel="% of the nearest rows",
    xlim=(0, 125),
    xticks=range(0, 101, 20),
)
plt.show()
lines = [
    f"{len(asked)} rows as questions to {sampled}; short list of {shortlist.shape[1]}. The truth "
    f"is the order by the stored `{reference}` vectors."
]
if reference in ("int8", "binary"):
    lines.append(f"What `{reference}` itself lost does not show: nothing more exact is stored.")
display(Markdown(" ".join(lines)))

# %% [markdown]
# ## Ask a second model
#
# A reranker looks at the question and a row's picture, page, video or text together and says how
# likely it is an answer. That takes longer, so it is asked about the best hits only. The media are
# read again where they lie.

# %%
if RERANKER is None:
    display(Markdown("`QVL_RERANKER` is not set: left out."))
else:
    reranked = collection.search(QUERY, top_k=10, rerank=RERANKER, rerank_top=30, columns=PLACE)
    display(shown(reranked, ["rank", "rank_before", "rerank_score", *SHOWN[1:]]))
    pictures(reranked, "After reranking, with the reranker's scores", "rerank_score")

# %% [markdown]
# ## Scores of a rerank job
#
# `qvl-batch rerank` does the same for many queries at once and writes tables of scores: one row for
# each pair of a query and a row that was found for it. `row_id` joins them with the other tables.

# %%
tables = {table: database.open_table(table) for table in database.list_tables(limit=10_000).tables}
of_scores = [
    table
    for table in tables.values()
    if (table.schema.metadata or {}).get(b"qvl.kind") == b"scores"
]
if not of_scores:
    display(Markdown("There are no tables of scores under this root."))
else:
    pairs = pd.concat([table.to_pandas() for table in of_scores], ignore_index=True)
    display(Markdown(f"{len(pairs):,} pairs of {pairs['query_id'].nunique():,} queries."))
    joined = pairs.merge(frame[["row_id", "num_tokens"]], "left", "row_id", suffixes=("", "_row"))
    by_kind = joined.groupby("kind").agg(
        pairs=("pair_id", "size"),
        mean_score=("first_score", "mean"),
        mean_rerank_score=("rerank_score", "mean"),
        mean_tokens_of_row=("num_tokens_row", "mean"),
    )
    display(by_kind.style.format(precision=2))
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    for kind in kinds:
        of_kind = pairs[pairs["kind"] == kind]
        left.scatter(
            of_kind["first_score"],
            of_kind["rerank_score"],
            s=16,
            alpha=0.6,
            linewidths=0,
            color=COLOURS[kind],
            label=kind,
        )
    left.set(
        title="Do both models agree?",
        xlabel="score of the search (cosine)",
        ylabel="score of the reranker (0 to 1)",
    )
    left.legend(title="kind")
    ranked = pairs.dropna(subset=["rank_after"])
    right.scatter(ranked["rank_before"], ranked["rank_after"], s=16, alpha=0.5, linewidths=0)
    last = max(2, ranked[["rank_before", "rank_after"]].max().max())
    right.plot([1, last], [1, last], color="black", linewidth=1, linestyle="--")
    right.set(title="Who moved?", xlabel="rank by the search", ylabel="rank by the reranker")
    plt.show()
    display(Markdown("Where the two disagree most, by rank:"))
    moved = (ranked["rank_before"] - ranked["rank_after"]).abs().sort_values(ascending=False)
    most = ranked.loc[moved.index[:5]].rename(columns={"first_score": "score"})
    most = pa.Table.from_pandas(most, preserve_index=False)
    display(shown(most, ["score", "rank_before", "rerank_score", "rank_after", *SHOWN[2:]]))

# %% [markdown]
# ## Other tools
#
# The tables are plain Lance: DuckDB and polars read them too, without a copy of the whole. See
# `README.md` beside this notebook for more. Here, SQL on the columns of one table:

# %%
first = tables[partitions["table"][0]].to_lance().scanner(["kind", "num_tokens", "truncated"])
duckdb.sql(
    "select kind, count(*) as rows, sum(num_tokens)::bigint as tokens, "
    "count(*) filter (truncated) as cut from first group by kind order by kind"
).df()
