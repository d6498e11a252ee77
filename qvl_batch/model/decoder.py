"""The language model over packed sequences, each with or without a prefix computed before.

The layers are transformers' own modules; the loop around them is ours, for two savings that its
own loop has not: the last layer works at the pooled tokens only, and the keys and values of a
prefix serve every sequence that begins with it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.models.qwen3_vl.modeling_qwen3_vl import rotate_half

from qvl_batch.model.attention import packed_attention


@dataclass(frozen=True, slots=True)
class Prefix:
    """Keys and values of a sequence's first tokens.

    ``layers`` has (keys, values) a layer, each of shape (1, kv_heads, num_tokens, head_dim).
    """

    num_tokens: int
    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]


@dataclass(frozen=True, slots=True)
class PackedRow:
    """Sequences behind each other, without their prefixes.

    ``embeds`` has shape (tokens, hidden), ``positions`` (3, tokens). ``visual_index`` says at which
    tokens a row of each of ``deepstack`` is added behind the first layers; None without vision.
    """

    embeds: torch.Tensor
    positions: torch.Tensor
    lengths: Sequence[int]
    prefixes: Sequence[Prefix | None]
    visual_index: torch.Tensor | None = None
    deepstack: Sequence[torch.Tensor] = ()


class _KeysValues:
    """Stands for transformers' cache: puts prefixes before, or keeps what is computed."""

    def __init__(self, row: PackedRow, keep: bool) -> None:
        self._lengths = row.lengths
        self._prefixes = row.prefixes if any(row.prefixes) else None
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] | None = [] if keep else None

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values that the layer's queries attend to."""
        if self.kept is not None:
            self.kept.append((keys, values))
        if self._prefixes is None:
            return keys, values
        own_keys, own_values = (part.split(self._lengths, dim=2) for part in (keys, values))
        all_keys, all_values = [], []
        for number, prefix in enumerate(self._prefixes):
            if prefix is not None:
                before = prefix.layers[layer]
                all_keys.append(before[0])
                all_values.append(before[1])
            all_keys.append(own_keys[number])
            all_values.append(own_values[number])
        return torch.cat(all_keys, dim=2), torch.cat(all_values, dim=2)


class PackedDecoder:
    """Runs packed rows through transformers' ``Qwen3VLTextModel``."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model

    def last_states(self, row: PackedRow) -> torch.Tensor:
        """Return the final-norm hidden state at each sequence's last token, (sequences, hidden)."""
        keys_values = _KeysValues(row, keep=False)
        hidden, rotary = self._below_last_layer(row, keys_values)
        layer, count = self._model.layers[-1], len(row.lengths)
        attention = layer.self_attn
        last = torch.tensor(
            [edge - 1 for edge in itertools.accumulate(row.lengths)], device=hidden.device
        )
        normed = layer.input_layernorm(hidden)
        keys, values = keys_values.update(
            *_keys_values(attention, normed, rotary), attention.layer_idx
        )
        query = attention.q_proj(normed[:, last]).view(1, count, -1, attention.head_dim)
        query = attention.q_norm(query).transpose(1, 2)
        # One query a sequence, its last token, which sees every key.
        attended, _ = packed_attention(
            attention,
            _rotated(query, [part[:, last] for part in rotary]),
            keys,
            values,
            scaling=attention.scaling,
            is_causal=False,
            **_edges([1] * count, row),
        )
        pooled = hidden[0, last] + attention.o_proj(attended.reshape(count, -1))
        pooled = pooled + layer.mlp(layer.post_attention_layernorm(pooled))
        return self._model.norm(pooled)

    def prefixes(self, row: PackedRow) -> list[Prefix]:
        """Return every sequence's keys and values; the sequences have no prefixes themselves."""
        keys_values = _KeysValues(row, keep=True)
        hidden, rotary = self._below_last_layer(row, keys_values)
        layer = self._model.layers[-1]
        normed = layer.input_layernorm(hidden)
        # Nothing of the last layer is seen by later tokens but its keys and values.
        keys_values.kept.append(_keys_values(layer.self_attn, normed, rotary))
        parts = [
            zip(*(part.split(list(row.lengths), dim=2) for part in pair), strict=True)
            for pair in keys_values.kept
        ]
        return [
            Prefix(length, layers)
            for length, layers in zip(row.lengths, zip(*parts, strict=True), strict=True)
        ]

    def _below_last_layer(
        self, row: PackedRow, keys_values: _KeysValues
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        hidden = row.embeds.unsqueeze(0)
        rotary = self._model.rotary_emb(hidden, row.positions.unsqueeze(1))
        edges = _edges(row.lengths, row)
        for number, layer in enumerate(self._model.layers[:-1]):
            hidden = layer(
                hidden,
                position_embeddings=rotary,
                attention_mask=None,
                past_key_values=keys_values,
                **edges,
            )
            # Rows behind the last layer would change visual tokens only, which are never pooled.
            if row.visual_index is not None and number < len(row.deepstack):
                hidden[0].index_add_(0, row.visual_index, row.deepstack[number].to(hidden.dtype))
        return hidden, rotary


def _edges(lengths: Sequence[int], row: PackedRow) -> dict[str, Any]:
    """Return the boundaries of ``lengths`` queries on a row's keys, as attention wants them."""
    keys = [
        length + (prefix.num_tokens if prefix is not None else 0)
        for length, prefix in zip(row.lengths, row.prefixes, strict=True)
    ]
    edges = [
        torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32, device=row.embeds.device)
        for sizes in (lengths, keys)
    ]
    return {
        "cu_seq_lens_q": edges[0],
        "cu_seq_lens_k": edges[1],
        "max_length_q": max(lengths),
        "max_length_k": max(keys),
    }


def _keys_values(
    attention: torch.nn.Module, normed: torch.Tensor, rotary: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a layer's rotated keys and its values, each (1, kv_heads, tokens, head_dim)."""
    shape = (*normed.shape[:-1], -1, attention.head_dim)
    keys = attention.k_norm(attention.k_proj(normed).view(shape)).transpose(1, 2)
    values = attention.v_proj(normed).view(shape).transpose(1, 2)
    return _rotated(keys, rotary), values


def _rotated(heads: torch.Tensor, rotary: Sequence[torch.Tensor]) -> torch.Tensor:
    cosine, sine = (part.unsqueeze(1) for part in rotary)
    return heads * cosine + rotate_half(heads) * sine
