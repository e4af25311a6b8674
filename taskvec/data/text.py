"""Text tasks: tokens from a model folder's own tokenizer, and tasks from JSON-lines files."""

import json
import logging
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from taskvec.data import base
from taskvec.messages import listing

log = logging.getLogger(__name__)


def load_tokenizer(folder: str | os.PathLike):
    """The `tokenizers.Tokenizer` of a Hugging Face model folder, without the padding and truncation it may carry.

    It is made from ``tokenizer.json`` (of any kind: WordPiece, BPE, SentencePiece's unigrams), or else from
    ``vocab.json`` and ``merges.txt`` of CLIP, GPT-2 or RoBERTa, or from BERT's ``vocab.txt`` (`wordpiece`).

    Raises:
      FileNotFoundError: the folder has none of them.
      ValueError: the files are damaged, or of an unknown kind.
    """
    import tokenizers

    from taskvec.data import bpe, wordpiece

    folder = pathlib.Path(folder)
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{path} is not a tokenizer: {error}") from error
    elif all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
        tokenizer = bpe.load(folder)
    elif (folder / "vocab.txt").is_file():
        tokenizer = wordpiece.load(folder)
    else:
        what = f"it holds {listing(folder)}" if folder.is_dir() else "it is no folder"
        raise FileNotFoundError(
            f"{folder} has no tokenizer.json, nor vocab.json and merges.txt, nor vocab.txt ({what}); name a model's "
            "folder with its tokenizer. A spiece.model alone is not read: save the tokenizer with transformers once"
        )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def encode(texts: np.ndarray, tokenizer, max_length: int, cut: str = "right", where: str = "") -> dict[str, np.ndarray]:
    """Tokens of N texts: ``{"ids": int32 [N, M], "mask": bool [N, M]}``, M the longest, at most `max_length`.

    Texts are ``[N]``, or ``[N, 2]`` for pairs, which are joined as the tokenizer joins them. ``"type_ids"`` int32
    ``[N, M]`` says which text of a pair a token is of (BERT's segments); it is left out where all are 0. Special tokens
    count and survive truncation, which is at the end, or with `cut` ``left`` at the beginning; how many texts it cuts
    is logged as of `where`, if that is given. Padding has id and type 0 and is false in the mask.
    """
    tokenizer.enable_truncation(max_length, direction=cut)
    pairs = [tuple(row) for row in texts] if np.ndim(texts) == 2 else list(texts)
    encodings = tokenizer.encode_batch(pairs)
    if where and (long := sum(bool(encoding.overflowing) for encoding in encodings)):
        end = {"right": "end", "left": "beginning"}[cut]
        log.warning("%s: %d of %d texts are cut to %d tokens, at their %s", where, long, len(pairs), max_length, end)
    lengths = np.array([len(encoding.ids) for encoding in encodings], int)
    mask = np.arange(max(lengths, default=0)) < lengths[:, None]

    def padded(rows: list[list[int]]) -> np.ndarray:
        made = np.zeros(mask.shape, np.int32)
        for out, row in zip(made, rows, strict=True):
            out[: len(row)] = row
        return made

    encoded = {"ids": padded([encoding.ids for encoding in encodings]), "mask": mask}
    types = padded([encoding.type_ids for encoding in encodings])
    return encoded | {"type_ids": types} if types.any() else encoded


def with_types(tasks: Sequence[base.Task]) -> list[base.Task]:
    """Encoded tasks with ``type_ids`` in all splits, if one has them: rows of several tasks make one batch."""
    splits = [getattr(task, name) for task in tasks for name in base.SPLITS]
    if not any("type_ids" in split.inputs for split in splits):
        return list(tasks)

    def typed(split: base.Split) -> base.Split:
        return split._replace(inputs={"type_ids": np.zeros_like(split.inputs["ids"]), **split.inputs})

    return [task._replace(**{name: typed(getattr(task, name)) for name in base.SPLITS}) for task in tasks]


def encode_task(task: base.Task, tokenizer, max_length: int, cut: str = "right") -> base.Task:
    """A task of ``{"text"}`` rows with its rows encoded (`encode`)."""

    def encoded(name: str) -> base.Split:
        split = getattr(task, name)
        where = f"task {task.name}, {name}"
        return split._replace(inputs=encode(split.inputs["text"], tokenizer, max_length, cut, where))

    return task._replace(**{name: encoded(name) for name in base.SPLITS})


def check_ids(task: base.Task, vocabulary: int, types: int = 0) -> None:
    """Raises `ValueError` for the first token that a model does not have: what it looks up for it is NaN.

    Args:
      task: encoded.
      vocabulary: number of tokens that the model has.
      types: number of types of tokens; 0 where it does not look at them.
    """
    known = {"ids": vocabulary, "target": vocabulary, "type_ids": types or np.inf}
    for which in base.SPLITS:
        inputs = getattr(task, which).inputs
        for key in known.keys() & inputs.keys():
            bad = np.argwhere(inputs[key] >= known[key])
            if len(bad):
                row, at = bad[0]
                raise ValueError(
                    f"task {task.name}: {which} row {row} has {key} {inputs[key][row, at]} at token {at}, the model "
                    f"has 0 to {known[key] - 1}; the tokenizer in its folder is another model's, or has tokens added "
                    "since: put the model's own there"
                )


def decode_bytes(raw: bytes) -> str:
    """Reads UTF-8 (with or without a byte order mark), else Latin-1, which always succeeds."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def jsonl(path: str | os.PathLike, name: str) -> base.Task:
    """A task from a file with one object a line: ``{"split": "train" | "test", "text": ..., "label": ...}``.

    Labels are integers (class names are then their numbers), or strings, which become classes in sorted order.
    Test rows whose text also stands in the training set are dropped.

    Raises:
      ValueError: names the file and the line that is not such an object.
    """
    rows: dict[str, tuple[list, list]] = {"train": ([], []), "test": ([], [])}
    # Lines end at \n alone: str.splitlines would also cut at the rarer separators that may stand in a text.
    for number, line in enumerate(pathlib.Path(path).read_bytes().split(b"\n"), 1):
        if line.strip():
            split, text, label = _row(line, f"{path}, line {number}")
            rows[split][0].append(text)
            rows[split][1].append(label)
    labels = rows["train"][1] + rows["test"][1]
    if len({type(label) for label in labels}) > 1:
        raise ValueError(f"{path}: some labels are numbers and some strings; use one kind")
    if labels and isinstance(labels[0], str):
        classes = sorted(set(labels))
        number_of = {label: i for i, label in enumerate(classes)}
        rows = {split: (texts, [number_of[label] for label in names]) for split, (texts, names) in rows.items()}
    else:
        # From the training rows alone, so that a test label never seen in training is reported as an error.
        classes = range(max(rows["train"][1], default=-1) + 1)
    return base.drop_overlap(base.task(name, classes, rows["train"], rows["test"], "text"))


def _row(line: bytes, where: str) -> tuple[str, str, int | str]:
    try:
        row = json.loads(decode_bytes(line))
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict) or not {"split", "text", "label"} <= row.keys():
        raise ValueError(f"{where}: want an object with split, text and label, found {str(row)[:80]}")
    split, text, label = row["split"], row["text"], row["label"]
    if split not in ("train", "test"):
        raise ValueError(f"{where}: split is {split!r}, allowed: train, test")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: text must be a string that is not empty, found {text!r}")
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise ValueError(f"{where}: label must be an integer or a string, found {label!r}")
    if isinstance(label, int) and label < 0:
        raise ValueError(f"{where}: label {label} is negative; classes count from 0")
    return split, text, label
