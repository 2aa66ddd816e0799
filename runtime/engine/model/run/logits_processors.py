"""Changes to logits before a draw: bias, penalties over a row's tokens, suppressed ids, allowed ids and token masks.

Order: logit bias, repetition penalty (prompt and output, as transformers), frequency and presence penalties (output, as OpenAI), suppressed
ids, allowed ids. For a masked row, suppressed and allowed ids are part of its mask. Token counts are kept on the device, and only for rows with
a penalty.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from runtime.engine.grammar.interfaces import TokenMasks, mask_words
from runtime.engine.interfaces import RowSetup
from runtime.engine.model.run.row_state import FREQUENCY, PRESENCE, REPETITION, RowState, to_device

_IN_PROMPT = 1 << 30
_COUNT_MASK = _IN_PROMPT - 1


@dataclass(slots=True)
class _Row:
    bias_ids: npt.NDArray[np.int64]
    bias: npt.NDArray[np.float32]
    suppressed: npt.NDArray[np.int64]
    suppressed_until: int  # first position at which nothing is suppressed
    table: int  # line of the history, -1 = none
    prompt_len: int
    counted: int  # positions below this are in the history
    allowed: torch.Tensor | None  # [V] float32 on the device: 0 for allowed ids, -inf for others; None = all
    limits: "_MaskLimits | None"  # of a masked row, in place of `suppressed` and `allowed`


@dataclass(frozen=True, slots=True)
class _MaskLimits:
    """Packed masks [words] of what the request itself allows; None = all tokens."""

    not_suppressed: TokenMasks | None
    allowed: TokenMasks | None


class LogitsProcessors:
    """Changes the logits of one model's rows that have any such parameter."""

    def __init__(self, vocab_size: int, tables: RowState) -> None:
        self._vocab_size = vocab_size
        self._tables = tables
        self._rows: dict[int, _Row] = {}
        self._history = torch.zeros((0, vocab_size), dtype=torch.int32, device=tables.device)
        self._free: list[int] = []
        self.limited_rows: set[int] = set()  # masked rows whose request itself allows fewer tokens

    def open(self, setup: RowSetup) -> bool:
        """Set up a row. Returns False if its logits are never changed."""
        sampling = setup.sampling
        suppresses = setup.min_tokens > 0 and bool(setup.suppressed)
        limits_ids = sampling.allowed_token_ids or suppresses
        if not (setup.masked or sampling.logit_bias or sampling.needs_history or limits_ids):
            return False
        ids = np.array([i for i, _ in sampling.logit_bias], np.int64)
        bias = np.array([b for _, b in sampling.logit_bias], np.float32)
        known = (ids >= 0) & (ids < self._vocab_size)
        suppressed = np.array(
            [i for i in setup.suppressed if 0 <= i < self._vocab_size] if suppresses else [], np.int64
        )
        row = _Row(
            ids[known],
            bias[known],
            suppressed,
            setup.prompt_len + setup.min_tokens,
            -1,
            setup.prompt_len,
            len(setup.prompt),
            self._allowed(sampling.allowed_token_ids) if sampling.allowed_token_ids and not setup.masked else None,
            self._mask_limits(suppressed, sampling.allowed_token_ids) if setup.masked else None,
        )
        if sampling.needs_history:
            row.table = self._take_table()
            prompt = np.array(setup.prompt, np.int64)
            line = self._history[row.table].zero_()
            line.index_fill_(0, to_device(prompt[: setup.prompt_len], self._tables.device), _IN_PROMPT)
            self._count(np.full(max(0, len(prompt) - setup.prompt_len), row.table), prompt[setup.prompt_len :])
        self._rows[setup.row] = row
        if row.limits is not None and (row.limits.allowed is not None or row.limits.not_suppressed is not None):
            self.limited_rows.add(setup.row)
        return True

    def close(self, row: int) -> None:
        known = self._rows.pop(row, None)
        self.limited_rows.discard(row)
        if known is not None and known.table >= 0:
            self._free.append(known.table)

    def active(self, row: int, position: int) -> bool:
        """Whether the logits of a draw for `position` of the row are changed."""
        known = self._rows.get(row)
        return known is not None and (
            known.limits is not None
            or len(known.bias_ids) > 0
            or known.table >= 0
            or known.allowed is not None
            or position < known.suppressed_until
        )

    def note_given(self, row: int, start: int, ids: list[int]) -> None:
        """Count ids that the host gave for positions from `start` on, such as the earlier output of a preempted row."""
        known = self._rows.get(row)
        if known is None or known.table < 0:
            return
        first = max(known.counted, known.prompt_len)
        new = ids[max(0, first - start) :]
        if new:
            self._count(np.full(len(new), known.table), np.array(new, np.int64))
        known.counted = max(known.counted, start + len(ids))

    def note_drawn(self, rows: list[int], positions: list[int], targets: list[int], drawn: torch.Tensor) -> None:
        """Count the tokens drawn[targets[i]] of rows with penalties."""
        kept = [i for i, row in enumerate(rows) if row in self._rows and self._rows[row].table >= 0]
        if not kept:
            return
        for i in kept:
            self._rows[rows[i]].counted = positions[i] + 1
        where = np.array(
            [[self._rows[rows[i]].table * self._vocab_size for i in kept], [targets[i] for i in kept]], np.int64
        )
        base, target = to_device(where, self._tables.device)
        self._add(base + drawn[target].clamp(min=0))  # the counts of a row that drew NO_TOKEN are not read again

    def apply(self, logits: torch.Tensor, rows: list[int], positions: list[int]) -> None:
        """Change float32 `logits` [m, V] of `rows` in place, for draws at `positions`."""
        known = [self._rows[row] for row in rows]
        flat = logits.view(-1)
        offsets = np.arange(len(rows)) * self._vocab_size
        if any(len(row.bias_ids) for row in known):
            where = np.concatenate([row.bias_ids + offset for row, offset in zip(known, offsets, strict=True)])
            values = np.concatenate([row.bias for row in known])
            flat.index_add_(0, to_device(where, logits.device), to_device(values, logits.device))
        with_history = [i for i, row in enumerate(known) if row.table >= 0]
        if with_history:
            self._penalise(
                logits, with_history, [known[i].table for i in with_history], [rows[i] for i in with_history]
            )
        hidden = [
            row.suppressed + offset
            for row, offset, position in zip(known, offsets, positions, strict=True)
            if position < row.suppressed_until and row.limits is None
        ]
        if hidden:
            flat.index_fill_(0, to_device(np.concatenate(hidden), logits.device), float("-inf"))
        for index, row in enumerate(known):
            if row.allowed is not None:
                logits[index] += row.allowed

    def only_masked(self, row: int) -> bool:
        """Whether nothing but a mask changes the row's logits."""
        known = self._rows[row]
        return known.limits is not None and not len(known.bias_ids) and known.table < 0

    def limit(self, mask: TokenMasks, row: int, position: int) -> None:
        """Take out of `mask` [words] of a masked row its suppressed ids and the ids outside of its allowed ones.

        A limit that would leave no token is dropped: the mask has precedence.
        """
        limits = self._rows[row].limits
        assert limits is not None
        suppresses = position < self._rows[row].suppressed_until
        for limit in (limits.not_suppressed if suppresses else None, limits.allowed):
            if limit is not None and (mask & limit).any():
                mask &= limit

    def _mask_limits(self, suppressed: npt.NDArray[np.int64], allowed: tuple[int, ...]) -> _MaskLimits:
        ids = np.array([i for i in allowed if 0 <= i < self._vocab_size], np.int64)
        return _MaskLimits(
            ~_packed(suppressed, self._vocab_size) if len(suppressed) else None,
            _packed(ids, self._vocab_size) if allowed else None,
        )

    def _allowed(self, token_ids: tuple[int, ...]) -> torch.Tensor:
        ids = np.array([i for i in token_ids if 0 <= i < self._vocab_size], np.int64)
        device = self._tables.device
        return torch.full((self._vocab_size,), float("-inf"), device=device).index_fill_(0, to_device(ids, device), 0.0)

    def _penalise(self, logits: torch.Tensor, which: list[int], tables: list[int], rows: list[int]) -> None:
        at, table, slot = to_device(np.array([which, tables, rows], np.int64), logits.device)
        rules = self._tables.rules[slot].view(torch.float32)
        history = self._history[table]
        x = logits[at]
        repetition = rules[:, REPETITION, None]
        x = torch.where(history != 0, torch.where(x < 0, x * repetition, x / repetition), x)
        count = (history & _COUNT_MASK).float()
        x -= rules[:, FREQUENCY, None] * count + rules[:, PRESENCE, None] * (count > 0)
        logits.index_copy_(0, at, x)

    def _count(self, tables: npt.NDArray[np.int64], ids: npt.NDArray[np.int64]) -> None:
        if len(ids):
            self._add(to_device(tables * self._vocab_size + ids, self._tables.device))

    def _add(self, where: torch.Tensor) -> None:
        self._history.view(-1).index_add_(
            0, where, torch.ones(1, dtype=torch.int32, device=where.device).expand(where.shape[0])
        )

    def _take_table(self) -> int:
        if not self._free:
            size = self._history.shape[0]
            grown = torch.zeros((max(4, 2 * size), self._vocab_size), dtype=torch.int32, device=self._tables.device)
            grown[:size] = self._history
            self._history = grown
            self._free = list(range(grown.shape[0] - 1, size - 1, -1))
        return self._free.pop()


def _packed(ids: npt.NDArray[np.int64], vocab_size: int) -> TokenMasks:
    """Return a packed mask of the given ids."""
    bits = np.zeros(mask_words(vocab_size) * 32, np.bool_)
    bits[ids] = True
    return np.packbits(bits, bitorder="little").view(np.int32)
