"""The checkpoint's format: tensors and plain JSON, read and written safely. Knows no classes.

The captioner lives under one key of its own, whatever else the file holds (Lightning keeps the optimiser's state beside
it). It is opened with ``weights_only=True``, so a file can hold data and no code. None of that data is trusted: what is
not as :class:`Contents` says is refused before anything is built of it.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captioner.errors import InputError

KEY = "captioner"
PLACE = "resumption"  # where the place in a training is kept, beside Lightning's own state
VERSION = 2
OF_WORDS = 1  # of files of COCO's words, which a release that reads this version alone can read, too
MOST_SETTINGS = 10_000  # a model has about a hundred
DEEPEST = 20  # settings in settings


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
    settings : str
        A digest of the configuration of its run; empty where there is none.
    """

    epochs: int
    steps: int
    validates: bool
    stopped: bool
    settings: str = ""


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
        Where the file is another program's or a later version's, or what it holds is not what a model is made of.
    """
    packed = checkpoint.get(KEY) if isinstance(checkpoint, dict) else None
    needed = {"version", *Contents._fields} - Contents._field_defaults.keys()
    if not isinstance(packed, dict) or not needed <= packed.keys():
        raise InputError(
            f"{source} is not a checkpoint of captioner: give the file whose path 'captioner fit' prints at its end."
        )
    if type(packed["version"]) is not int:
        raise _damaged(source, "its version is no number")
    if packed["version"] not in (OF_WORDS, VERSION):
        raise InputError(
            f"{source} was written in version {packed['version']} of the checkpoint format, and this captioner reads "
            f"version {VERSION} and older: install the release of captioner that wrote it."
        )
    contents = Contents(**{field: packed[field] for field in Contents._fields if field in packed})
    if fault := _fault(contents):
        raise _damaged(source, fault)
    return contents


def _fault(contents: Contents) -> str:
    """Say what of the contents is not what it should be; empty where all is."""
    words = contents.words
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        return "its words are no list of texts"
    if len(set(words)) < len(words):
        return "a word stands twice in it"
    if not isinstance(contents.settings, dict) or not is_plain(contents.settings):
        return "its settings are not plain ones"
    scores = contents.scores
    if not isinstance(scores, dict) or not all(
        isinstance(name, str) and isinstance(value, int | float) for name, value in scores.items()
    ):
        return "its scores are no numbers"
    tensors = contents.tensors
    if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
        return "its tensors have no names"
    return next((f"{name!r} is no tensor with values" for name, value in tensors.items() if not _is_whole(value)), "")


def is_plain(settings: object) -> bool:
    """Tell whether settings are plain JSON of a size that settings have."""
    left = [(settings, 0)]
    seen = 0
    while left:
        value, depth = left.pop()
        seen += 1
        if isinstance(value, dict):
            if not all(isinstance(name, str) for name in value):
                return False
            inside = list(value.values())
        elif isinstance(value, list | tuple):
            inside = list(value)
        elif value is None or isinstance(value, str | float) or (isinstance(value, int) and abs(value) < 2**63):
            continue
        else:
            return False
        # A pickle may hold the same list a thousand times in itself, in a few bytes.
        if depth >= DEEPEST or seen + len(left) + len(inside) > MOST_SETTINGS:
            return False
        left += [(each, depth + 1) for each in inside]
    return True


def _is_whole(value: object) -> bool:
    """Tell whether something is a tensor all of whose values stand in the file, and not one value for a terabyte."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and not value.is_nested
        and not value.is_complex()
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def _damaged(source: str | Path, fault: str) -> InputError:
    return InputError(f"{source} is damaged, or was not written by captioner ({fault}): take another copy of it.")


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
        checkpoint = load(path)
    except Exception as error:  # torch raises a dozen kinds for a file that is none of its own
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
    held = load(path)
    try:
        epochs, steps = held["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"], held["global_step"]
        place = held.get(PLACE, {})
        validates, stopped, settings = place.get("pending") is True, place.get("stopped") is True, place.get("settings")
        return Progress(int(epochs), int(steps), validates, stopped, settings if isinstance(settings, str) else "")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} does not say how far its training has come: give a last.ckpt of a run.") from error


def load(path: str | Path) -> Any:
    """Return what a file of torch's holds, plain data and tensors on the CPU, and nothing that it would have run.

    The values of tensors are mapped, so that what nobody asks for is never read.

    Raises
    ------
    Exception
        Of whatever kind, where it holds something else. torch packs nothing: what would grow as it is unpacked is
        refused before it is.
    """
    with zipfile.ZipFile(path) as archive:
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
            raise ValueError("Something in it is compressed, which nothing of torch's is.")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
