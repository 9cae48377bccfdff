"""The pixel networks of EDM (Karras et al. 2022) as a diffusers pipeline, and a reader of their published pickles."""

# diffusers looks for ModelMixin in the module a saved pipeline names; without it a reload fails.
from diffusers import ModelMixin

from .convert import convert_edm
from .network import EDMUNet
from .pipeline import EDMPipeline

__all__ = ["EDMPipeline", "EDMUNet", "ModelMixin", "convert_edm"]
