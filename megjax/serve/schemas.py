"""What a request may say: strict, and nothing beyond it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from megjax.checks import LARGEST_SEED
from megjax.link import channel
from megjax.link.wire import WireDtype

PAPER_RATE_BPS = float(channel.rate_bps(channel.snr(250.0)))
"""At the middle of the paper's distances."""

MAX_GUIDANCE = 20.0


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class Limits(_Strict):
    """Mean latency and energy for a policy to keep."""

    latency_s: float = Field(gt=0, le=1e6)
    energy_j: float = Field(gt=0, le=1e12)


class ChannelReport(_Strict):
    """What the device knows of its channel; the paper's if it says nothing."""

    rate_bps: float = Field(default=PAPER_RATE_BPS, ge=1e-3, le=1e15, description="bit/s")
    psnr_db: float | None = Field(
        default=10.0, ge=-100, le=200, description="of the features; null is a perfect channel"
    )


class GenerateRequest(_Strict):
    """A picture to generate. Steps and ratio together, or limits: then the server's policy chooses both."""

    prompt: str = Field(min_length=1, max_length=1000)
    negative_prompt: str = Field(default="", max_length=1000)
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED, description="of the noise and the partition")
    height: int | None = Field(default=None, ge=1, le=65536, description="pixels; the server's first size")
    width: int | None = Field(default=None, ge=1, le=65536, description="likewise")
    steps: int | None = Field(default=None, ge=1, le=1000, description="denoising steps T")
    ratio: float | None = Field(default=None, ge=0, le=1, description="merging ratio r")
    limits: Limits | None = None
    channel: ChannelReport = ChannelReport()
    guidance: float = Field(default=2.5, ge=0, le=MAX_GUIDANCE, description="of classifier-free guidance")
    dtype: WireDtype = Field(default="float16", description="how a scalar travels")
    deadline_s: float | None = Field(default=None, gt=0, le=86400, description="the server's own at most")

    @model_validator(mode="after")
    def _one_who_chooses(self) -> GenerateRequest:
        if (self.height is None) != (self.width is None):
            raise ValueError("height and width: give both or neither")
        if (self.steps is None) != (self.ratio is None):
            raise ValueError("steps and ratio: give both, or limits alone for the policy to choose both")
        if self.steps is not None and self.limits is not None:
            raise ValueError("limits: only a policy keeps them; leave out steps and ratio")
        if self.steps is None and self.limits is None:
            raise ValueError("give steps and ratio, or limits for the policy to choose both")
        return self


def readable(errors: Sequence[Any]) -> str:
    """Validation errors as one line, a field each; nothing that was sent is repeated but names of fields."""
    lines = []
    for error in errors[:16]:
        place = ".".join(_name(part) for part in error["loc"] if part != "body")
        message = error["msg"].removeprefix("Value error, ")
        if error["type"] == "json_invalid":
            place, message = "body", "not JSON"
        elif error["type"] == "extra_forbidden":
            message = "no such field"
        # What the request's own rules say names its fields.
        lines.append(message if error["type"] == "value_error" else f"{place or 'body'}: {message.lower()}")
    return "; ".join(dict.fromkeys(lines))


def _name(part: object) -> str:
    text = "".join(c if c.isprintable() else " " for c in str(part))
    return text if len(text) <= 40 else f"{text[:40]}..."
