"""Weights in the formats of diffusers and transformers: PyTorch's safetensors and Flax's msgpack."""

from megjax.weights.folder import MODELS, ModelFolder, open_folder
from megjax.weights.formats import Format
from megjax.weights.reading import load
from megjax.weights.writing import save

__all__ = ["MODELS", "Format", "ModelFolder", "load", "open_folder", "save"]
