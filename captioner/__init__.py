"""Image captioning with visual attention, in the line of *Show, Attend and Tell* (Xu et al., 2015).

The public names are loaded when they are first used (PEP 562): `import captioner` does not import torch, so that
scoring captions and asking for help need not wait for it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from captioner.annotation_files import (
        AnyFormat,
        CaptionTable,
        COCOCaptions,
        Flickr8k,
        Flickr30k,
        ImageFolder,
        Karpathy,
    )
    from captioner.datamodule import CaptionData
    from captioner.decoding import Decoding
    from captioner.ensemble import Ensemble
    from captioner.errors import InputError
    from captioner.images import Preprocessing
    from captioner.metrics import score_captions
    from captioner.model import Caption, Captioner
    from captioner.overlay import attention_map, draw_overlay, make_figure, save_figure
    from captioner.overlay_page import PageImage, write_page
    from captioner.task import CaptioningTask

    __version__: str

__all__ = [
    "AnyFormat",
    "COCOCaptions",
    "Caption",
    "CaptionData",
    "CaptionTable",
    "Captioner",
    "CaptioningTask",
    "Decoding",
    "Ensemble",
    "Flickr30k",
    "Flickr8k",
    "ImageFolder",
    "InputError",
    "Karpathy",
    "PageImage",
    "Preprocessing",
    "attention_map",
    "draw_overlay",
    "make_figure",
    "save_figure",
    "score_captions",
    "write_page",
]

_MODULES = {
    "AnyFormat": "annotation_files",
    "COCOCaptions": "annotation_files",
    "Caption": "model",
    "CaptionData": "datamodule",
    "CaptionTable": "annotation_files",
    "Captioner": "model",
    "CaptioningTask": "task",
    "Decoding": "decoding",
    "Ensemble": "ensemble",
    "Flickr30k": "annotation_files",
    "Flickr8k": "annotation_files",
    "ImageFolder": "annotation_files",
    "InputError": "errors",
    "Karpathy": "annotation_files",
    "PageImage": "overlay_page",
    "Preprocessing": "images",
    "attention_map": "overlay",
    "draw_overlay": "overlay",
    "make_figure": "overlay",
    "save_figure": "overlay",
    "score_captions": "metrics",
    "write_page": "overlay_page",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("captioner")
    if name not in _MODULES:
        raise AttributeError(f"module 'captioner' has no attribute {name!r}")
    return getattr(import_module(f"captioner.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
