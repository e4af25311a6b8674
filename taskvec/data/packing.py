"""Several sentences in one row of tokens, so that encoders of texts compute little padding.

A packed batch is what `taskvec.models.bert.apply` describes: attention, positions and pooling know where a sentence
ends, so features are those of the batch that was packed. Pieces of the library that pool over whole rows of tokens
(routers inside a model) want batches that are not packed.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from taskvec.data import batches
from taskvec.data.batches import Batch

MULTIPLE = 4  # of the number of rows, so that few shapes are compiled


def joiner(lengths: Sequence[np.ndarray], length: int) -> Callable[[Sequence[Batch]], Batch]:
    """As `batches.join`, which makes one batch of several, but packed into rows of `length` tokens.

    A batch of S sentences gets the rows that such batches need nearly always, so that one compiled program runs nearly
    all steps; one that needs more gets more. What a batch looks like depends on its sentences alone.

    Args:
      lengths: tokens of the sentences that may come, one array per task.
      length: of a row, at least that of the longest sentence. Attention costs its square; rows as long as the longest
        sentence are filled well already.
    """
    mean = np.mean([np.mean(x) for x in lengths])
    deviation = math.sqrt(np.mean([np.var(x) for x in lengths]))

    def join(parts: Sequence[Batch]) -> Batch:
        batch = batches.join(parts, length_multiple=1)
        count = len(batch["ids"])
        tokens = count * mean + 3 * math.sqrt(count) * deviation
        return packed(batch, length, math.ceil(1.05 * tokens / length))  # rows are never filled to the last token

    return join


def packed(batch: Batch, length: int, rows: int = 1, multiple: int = MULTIPLE) -> Batch:
    """A batch with several sentences in a row.

    Args:
      batch: ``ids`` int32 ``[S, N]`` and ``mask`` bool ``[S, N]``, true from a sentence's first token to its last;
        perhaps ``type_ids`` int32 ``[S, N]``.
      length: tokens of a row, at least those of the longest sentence.
      rows: at least so many.
      multiple: the number of rows is a multiple of this.

    Returns:
      ``ids`` int32 ``[R, length]`` (0 at padding), ``sentence`` int32 ``[R, length]``, the number of a token's sentence
      (-1 at padding), and ``first`` int32 ``[S]``, where in ``ids.ravel()`` a sentence begins, in place of ``ids`` and
      ``mask``; ``type_ids`` (0 at padding) go with ``ids``. Other keys pass unchanged: sentences keep their numbers.

    Raises:
      ValueError: a sentence longer than `length`; a mask with gaps or padding on the left; `multiple` below 1.
    """
    if multiple < 1:
        raise ValueError(f"multiple={multiple}; the number of rows is a multiple of it, so it must be at least 1")
    mask_SxN = batch["mask"]
    lengths_S = _lengths(mask_SxN, length)
    rows_S = _rows_of(lengths_S, length)
    rows = max(1, -(-max(rows, _used(rows_S)) // multiple)) * multiple
    first_S = _places(rows_S, lengths_S, length)
    # Tokens in the order of the sentences, and where each of them goes.
    number = np.repeat(np.arange(len(lengths_S)), lengths_S)
    to = np.flatnonzero(mask_SxN) % mask_SxN.shape[1] + first_S[number]

    def placed(values: np.ndarray, padding: int) -> np.ndarray:
        flat = np.full(rows * length, padding, np.int32)
        flat[to] = values
        return flat.reshape(rows, length)

    tokens = {key: placed(batch[key][mask_SxN], 0) for key in ("ids", "type_ids") if key in batch}
    rest = {key: x for key, x in batch.items() if key not in ("mask", *tokens)}
    return {**rest, **tokens, "sentence": placed(number, -1), "first": first_S.astype(np.int32)}


def _lengths(mask_SxN: np.ndarray, length: int) -> np.ndarray:
    """Tokens of every sentence, checked."""
    lengths_S = mask_SxN.sum(1)
    if (mask_SxN != (np.arange(mask_SxN.shape[1]) < lengths_S[:, None])).any():
        raise ValueError("a mask has gaps or padding on the left; packing wants padding after the tokens")
    if lengths_S.max(initial=0) > length:
        raise ValueError(f"a sentence has {lengths_S.max()} tokens, a row {length}; ask for longer rows")
    return lengths_S


def _rows_of(lengths_S: np.ndarray, length: int) -> np.ndarray:
    """The row of every sentence: the longest first, each into the first row with room for it."""
    room: list[int] = []
    rows_S = np.zeros(len(lengths_S), int)
    for number in np.argsort(-lengths_S, kind="stable"):
        row = next((row for row, left in enumerate(room) if left >= lengths_S[number]), len(room))
        if row == len(room):
            room.append(length)
        room[row] -= int(lengths_S[number])
        rows_S[number] = row
    return rows_S


def _used(rows_S: Sequence[int]) -> int:
    return max(rows_S, default=-1) + 1


def _places(rows_S: np.ndarray, lengths_S: np.ndarray, length: int) -> np.ndarray:
    """Where every sentence begins in the flat tokens; within a row in the order of their numbers."""
    first_S, filled = np.zeros(len(rows_S), int), np.zeros(_used(rows_S), int)
    for number, row in enumerate(rows_S):
        first_S[number] = row * length + filled[row]
        filled[row] += lengths_S[number]
    return first_S
