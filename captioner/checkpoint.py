"""The checkpoint's format: tensors and plain JSON, read and written safely. Knows no classes.

The captioner lives under one key of its own, whatever else the file holds (Lightning keeps the optimiser's state beside
it). It is opened with ``weights_only=True``, so a file can hold data and no code.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captioner.errors import InputError

KEY = "captioner"
PLACE = "resumption"  # where the place in a training is kept, beside Lightning's own state
VERSION = 2
OF_WORDS = 1  # of files of COCO's words, which a release that reads this version alone can read, too


class Contents(NamedTuple):
    """What a checkpoint holds: everything needed to caption.

    Attributes
    ----------
    settings : dict
        Plain JSON, from which the model is rebuilt; among it the preprocessing.
    words : list of str
        The vocabulary in the order of its ids, without the special words.
    tensors : dict of str to Tensor
        The model's state dict.
    scores : dict of str to float
        What the model reached, in COCO's units; empty where it was never scored.
    vocabulary : dict or None
        Plain JSON about the words, see `captioner.vocabulary`; None where they are words of COCO's tokenizer.
    """

    settings: dict[str, Any]
    words: list[str]
    tensors: dict[str, Tensor]
    scores: dict[str, float]
    vocabulary: dict[str, Any] | None = None


class Progress(NamedTuple):
    """How far the training of a checkpoint has come.

    Attributes
    ----------
    epochs, steps : int
        That are done.
    validates : bool
        Whether a validation is still due after the last step.
    stopped : bool
        Whether early stopping has ended it.
    """

    epochs: int
    steps: int
    validates: bool
    stopped: bool


def pack(contents: Contents) -> dict[str, Any]:
    """Return the contents as the plain dict that stands under :data:`KEY`."""
    packed = contents._asdict()
    if contents.vocabulary is None:
        del packed["vocabulary"]
        return {"version": OF_WORDS, **packed}
    return {"version": VERSION, **packed}


def unpack(checkpoint: object, source: str | Path) -> Contents:
    """Return the contents of an opened file.

    Raises
    ------
    InputError
        Where the file is another program's or a later version's.
    """
    packed = checkpoint.get(KEY) if isinstance(checkpoint, dict) else None
    needed = {"version", *Contents._fields} - Contents._field_defaults.keys()
    if not isinstance(packed, dict) or not needed <= packed.keys():
        raise InputError(
            f"{source} is not a checkpoint of captioner: give the file whose path 'captioner fit' prints at its end."
        )
    if packed["version"] not in (OF_WORDS, VERSION):
        raise InputError(
            f"{source} was written in version {packed['version']} of the checkpoint format, and this captioner reads "
            f"version {VERSION} and older: install the release of captioner that wrote it."
        )
    return Contents(**{field: packed[field] for field in Contents._fields if field in packed})


def read(path: str | Path) -> Contents:
    """Open a checkpoint on the CPU.

    Raises
    ------
    InputError
        Where there is no such file, or it is no checkpoint of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"There is no checkpoint {path}: give the file whose path 'captioner fit' prints at its end.")
    try:
        # Mapped, so that the optimiser's state that may stand beside the model is never read.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, OSError) as error:
        raise InputError(
            f"{path} is not a checkpoint of captioner, or it is damaged ({type(error).__name__}): give the file whose "
            "path 'captioner fit' prints at its end."
        ) from error
    return unpack(checkpoint, path)


def read_progress(path: Path) -> Progress:
    """Return how far the training of a checkpoint has come.

    Raises
    ------
    InputError
        Where there is no such file, it is no checkpoint of ours, or holds weights alone.
    """
    read(path)
    held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    try:
        epochs, steps = held["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"], held["global_step"]
        place = held.get(PLACE, {})
        return Progress(int(epochs), int(steps), place.get("pending") is True, place.get("stopped") is True)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} does not say how far its training has come: give a last.ckpt of a run.") from error
