"""A pipeline's folder in diffusers layout, local or from the Hugging Face hub, and its parts' configs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megjax.errors import WeightsError
from megjax.files import expanded
from megjax.weights import formats

_ENCODER = ("CLIPTextModel", "FlaxCLIPTextModel")
_TOKENIZER = ("CLIPTokenizer", "CLIPTokenizerFast")
CLASSES = {
    "text_encoder": _ENCODER,
    "text_encoder_2": tuple(f"{name}WithProjection" for name in _ENCODER),
    "unet": ("UNet2DConditionModel", "FlaxUNet2DConditionModel"),
    "vae": ("AutoencoderKL", "FlaxAutoencoderKL"),
    "tokenizer": _TOKENIZER,
    "tokenizer_2": _TOKENIZER,
    "scheduler": None,
}
"""The classes that each part may be of, by diffusers' names; None is any."""

MODELS = ("text_encoder", "text_encoder_2", "unet", "vae")
_CONFIG_FILES = {
    **dict.fromkeys(MODELS, "config.json"),
    **dict.fromkeys(("tokenizer", "tokenizer_2"), "tokenizer_config.json"),
    "scheduler": "scheduler_config.json",
}
_OPTIONAL = ("text_encoder_2", "tokenizer_2")
_DISTILLED = {"unet": "unet_student/*", "vae": "decoders/*"}
"""What MegJAX's own backbones have beside a part, whole."""


class ModelFolder(NamedTuple):
    """A pipeline's folder.

    Args:
        path: local; a part's files lie in the sub-folder of its name.
        index: what model_index.json holds.
        configs: each part's parsed config; a part that the pipeline lacks (`text_encoder_2`) is absent.
    """

    path: Path
    index: dict[str, Any]
    configs: dict[str, dict[str, Any]]


def open_folder(
    model: str | Path, *, variant: str | None = None, parts: Sequence[str] = MODELS
) -> ModelFolder:
    """Open a pipeline's folder in diffusers layout, downloading it first if `model` is a hub id.

    Args:
        model: path of a folder that holds model_index.json, or a hub id such as `org/name`, looked up
            only if no such folder exists. `HF_HUB_OFFLINE=1` keeps to what is cached.
        variant: of the weights to download, such as `fp16`.
        parts: whose weights are wanted, and what is distilled from them; all parts' configs are read.

    Raises `WeightsError` if the folder, a part or its config is missing, or of a class that MegJAX lacks.
    """
    path = expanded(model)
    if not path.is_dir():
        path = _download(str(model), variant, parts)
    index = formats.read_json(path / "model_index.json")
    configs = {}
    for part in CLASSES:
        entry = index.get(part)  # [library, class]
        name = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if name is None:
            if part in _OPTIONAL:
                continue
            raise WeightsError(f"{path / 'model_index.json'}: names no {part}")
        origin = path / part / _CONFIG_FILES[part]
        configs[part] = formats.read_json(origin)
        _check_class(path / "model_index.json", part, [name])
        if part in MODELS:
            _check_class(
                origin, part, configs[part].get("architectures") or [configs[part].get("_class_name")]
            )
        if part in parts:
            formats.find(path / part, variant)
    return ModelFolder(path, index, configs)


def _check_class(origin: Path, part: str, found: list[Any]) -> None:
    allowed = CLASSES[part]
    if allowed is not None and not any(name in allowed for name in found):
        raise WeightsError(
            f"{origin}: {part} is a {', '.join(map(str, found))}; expected {' or '.join(allowed)}"
        )


def _lacks_weights(part: Path) -> bool:
    return part.is_dir() and not any([*part.glob("*.safetensors"), *part.glob("*.msgpack")])


def _download(model: str, variant: str | None, wanted: Sequence[str]) -> Path:
    """Fetch a hub repository's configs and one format of some weights; returns the local snapshot."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise WeightsError(
            f"{model}: no such folder; expected a folder in diffusers layout or a hub id (org/name)"
        )

    def fetch(suffix: formats.Format, parts: list[str], every_variant: bool = False) -> Path:
        dotted = f".{variant}" if variant else ""
        weights = [f"{part}/*{dotted}*.{suffix}" for part in parts]
        index = [f"{part}/*.index{dotted}.json" for part in parts]
        # Repositories hold every variant; without one, names with a second dot are not wanted.
        ignore = None if variant or every_variant else [f"*.*.{suffix}", "*.index.*.json"]
        configs = ["model_index.json", *(f"{part}/{file}" for part, file in _CONFIG_FILES.items())]
        tokenizers = [f"tokenizer{n}/*.{kind}" for n in ("", "_2") for kind in ("json", "txt")]
        distilled = [_DISTILLED[part] for part in wanted if part in _DISTILLED]
        patterns = [*configs, *tokenizers, *weights, *index, *distilled]
        return Path(snapshot_download(model, allow_patterns=patterns, ignore_patterns=ignore))

    try:
        path = fetch("safetensors", list(wanted))
        others: list[tuple[formats.Format, bool]] = [("msgpack", False), ("safetensors", True)]
        for suffix, every_variant in others:
            if lacking := [part for part in wanted if _lacks_weights(path / part)]:
                path = fetch(suffix, lacking, every_variant)
        return path
    except GatedRepoError:
        reason = (
            "its owner must grant you access; accept its terms on the hub and log in with `hf auth login`"
        )
    except RepositoryNotFoundError:
        reason = "no such folder, and no such repository on the hub"
    except HFValidationError as error:
        reason = f"no such folder, and not a hub id ({formats.first_line(error)})"
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        reason = "no such folder; not in the hub's cache either, and the hub is offline or cannot be reached"
    except Exception as error:  # OSError, and the errors of whichever HTTP library the hub's client uses
        reason = f"the download failed ({formats.first_line(error)})"
    raise WeightsError(f"{model}: {reason}")
