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
    from captioner.attention import Additive, Dot, General, MultiHead, NoAttention, ScaledDot, Uniform
    from captioner.bridges import LinearBridge, NoBridge, TransformerBridge
    from captioner.datamodule import CaptionData
    from captioner.decoders import GRUDecoder, LSTMDecoder, TransformerDecoder
    from captioner.decoding import Decoding
    from captioner.demo import score_scenes
    from captioner.encoders import VGG16, ForeignEncoder, ResNet, SmallCNN
    from captioner.ensemble import Ensemble
    from captioner.errors import InputError
    from captioner.images import Preprocessing, read_image
    from captioner.metrics import score_captions
    from captioner.model import Caption, Captioner
    from captioner.objectives import CrossEntropy
    from captioner.overlay import attention_map, draw_overlay, make_figure, save_figure
    from captioner.overlay_page import PageImage, write_page
    from captioner.scenes import read_scenes, write_scenes
    from captioner.self_critical import SelfCritical
    from captioner.task import CaptioningTask

    __version__: str

__all__ = [
    "AnyFormat",
    "Additive",
    "COCOCaptions",
    "Caption",
    "CaptionData",
    "CaptionTable",
    "Captioner",
    "CaptioningTask",
    "CrossEntropy",
    "Decoding",
    "Dot",
    "Ensemble",
    "Flickr30k",
    "Flickr8k",
    "ForeignEncoder",
    "GRUDecoder",
    "General",
    "ImageFolder",
    "InputError",
    "Karpathy",
    "LSTMDecoder",
    "LinearBridge",
    "MultiHead",
    "NoAttention",
    "NoBridge",
    "PageImage",
    "Preprocessing",
    "ResNet",
    "ScaledDot",
    "SelfCritical",
    "SmallCNN",
    "TransformerBridge",
    "TransformerDecoder",
    "Uniform",
    "VGG16",
    "attention_map",
    "draw_overlay",
    "make_figure",
    "read_image",
    "read_scenes",
    "save_figure",
    "score_captions",
    "score_scenes",
    "write_page",
    "write_scenes",
]

_MODULES = {
    "AnyFormat": "annotation_files",
    "Additive": "attention",
    "COCOCaptions": "annotation_files",
    "Caption": "model",
    "CaptionData": "datamodule",
    "CaptionTable": "annotation_files",
    "Captioner": "model",
    "CaptioningTask": "task",
    "CrossEntropy": "objectives",
    "Decoding": "decoding",
    "Dot": "attention",
    "Ensemble": "ensemble",
    "Flickr30k": "annotation_files",
    "Flickr8k": "annotation_files",
    "ForeignEncoder": "encoders",
    "GRUDecoder": "decoders",
    "General": "attention",
    "ImageFolder": "annotation_files",
    "InputError": "errors",
    "Karpathy": "annotation_files",
    "LSTMDecoder": "decoders",
    "LinearBridge": "bridges",
    "MultiHead": "attention",
    "NoAttention": "attention",
    "NoBridge": "bridges",
    "PageImage": "overlay_page",
    "Preprocessing": "images",
    "ResNet": "encoders",
    "ScaledDot": "attention",
    "SelfCritical": "self_critical",
    "SmallCNN": "encoders",
    "TransformerBridge": "bridges",
    "TransformerDecoder": "decoders",
    "Uniform": "attention",
    "VGG16": "encoders",
    "attention_map": "overlay",
    "draw_overlay": "overlay",
    "make_figure": "overlay",
    "read_image": "images",
    "read_scenes": "scenes",
    "save_figure": "overlay",
    "score_captions": "metrics",
    "score_scenes": "demo",
    "write_page": "overlay_page",
    "write_scenes": "scenes",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("captioner")
    if name not in _MODULES:
        raise AttributeError(f"module 'captioner' has no attribute {name!r}")
    return getattr(import_module(f"captioner.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
