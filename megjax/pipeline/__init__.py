"""From a prompt to a picture through the split."""

from megjax.pipeline.generate import Generated, Request, check, generate, generate_each
from megjax.pipeline.load import Pipeline, load_pipeline

__all__ = ["Generated", "Pipeline", "Request", "check", "generate", "generate_each", "load_pipeline"]
