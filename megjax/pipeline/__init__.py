"""From a prompt to a picture through the split."""

from megjax.pipeline.generate import Generated, Request, check, generate
from megjax.pipeline.load import Pipeline, load_pipeline

__all__ = ["Generated", "Pipeline", "Request", "check", "generate", "load_pipeline"]
