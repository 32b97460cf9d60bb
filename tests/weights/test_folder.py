"""A pipeline's folder: its parts and classes, and which files of a hub repository are fetched."""

import json
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

from megjax import weights
from megjax.errors import WeightsError
from tests.weights.weight_trees import CONFIGS, component, same

INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "force_zeros_for_empty_prompt": True,
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    for part in CONFIGS:
        _, params, config = component(part)
        weights.save(folder / part, params, config)
    for part, file in [("tokenizer", "tokenizer_config"), ("tokenizer_2", "tokenizer_config")]:
        (folder / part).mkdir()
        (folder / part / f"{file}.json").write_text(json.dumps({"model_max_length": 77}))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"beta_start": 0.00085}))
    (folder / "model_index.json").write_text(json.dumps(INDEX))
    return folder


@pytest.fixture
def pipeline(built, tmp_path):
    return shutil.copytree(built, tmp_path / "pipeline")


def edit(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "gone"}))


def test_a_folder_gives_all_configs(pipeline):
    folder = weights.open_folder(pipeline)
    assert folder.path == pipeline
    assert folder.index["force_zeros_for_empty_prompt"] is True
    assert sorted(folder.configs) == sorted(
        set(INDEX) - {"_class_name", "force_zeros_for_empty_prompt", "image_encoder"}
    )
    for part in CONFIGS:
        expected = component(part)
        assert folder.configs[part] == expected.json
        assert same(weights.load(folder.path / part, expected.shapes), expected.params)


@pytest.mark.parametrize("value", ["gone", [None, None]])
def test_one_text_encoder(pipeline, value):
    edit(pipeline / "model_index.json", text_encoder_2=value, tokenizer_2=value)
    configs = weights.open_folder(str(pipeline)).configs
    assert "text_encoder" in configs
    assert not {"text_encoder_2", "tokenizer_2"} & configs.keys()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda p: edit(p / "model_index.json", unet="gone"), "model_index.json: names no unet"),
        (
            lambda p: edit(p / "model_index.json", vae=["diffusers", "VQModel"]),
            "vae is a VQModel; expected Autoenc",
        ),
        (
            lambda p: edit(p / "unet/config.json", _class_name="SD3Model"),
            "unet/config.json: unet is a SD3Model; exp",
        ),
        (
            lambda p: edit(p / "unet/config.json", _class_name="gone"),
            "unet/config.json: unet is a None; expected UNet",
        ),
        (
            lambda p: edit(p / "text_encoder_2/config.json", architectures=["CLIPTextModel"]),
            "text_encoder_2 is a CLIPTextModel; expected CLIPTextModelWithProjection",
        ),
        (lambda p: (p / "model_index.json").unlink(), "model_index.json: no such file"),
        (
            lambda p: (p / "model_index.json").write_text('{"unet": ['),
            "model_index.json: not readable as JSON",
        ),
        (
            lambda p: (p / "model_index.json").write_text("[]"),
            "model_index.json: expected a JSON object, found list",
        ),
        (lambda p: (p / "vae/config.json").unlink(), "vae/config.json: no such file"),
        (lambda p: (p / "tokenizer/tokenizer_config.json").unlink(), "tokenizer_config.json: no such file"),
        (
            lambda p: (p / "vae/diffusion_pytorch_model.safetensors").unlink(),
            "vae: no weights; expected diffusion",
        ),
        (lambda p: shutil.rmtree(p / "scheduler"), "scheduler_config.json: no such file"),
    ],
)
def test_broken_folders(pipeline, wrong, said):
    wrong(pipeline)
    with pytest.raises(WeightsError) as caught:
        weights.open_folder(pipeline)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["./nothing", "nothing", "/nothing/here", "a/b/c"])
def test_a_path_that_is_neither_folder_nor_hub_id(name):
    with pytest.raises(
        WeightsError, match="no such folder; expected a folder in diffusers layout or a hub id"
    ):
        weights.open_folder(name)


# What a full repository of SDXL holds: exports, variants and single-file checkpoints of the same weights.
_MODEL = (
    "config.json",
    "{0}.safetensors",
    "{0}.fp16.safetensors",
    "{1}.msgpack",
    "{0}.bin",
    "model.onnx",
    "openvino.xml",
)
REPOSITORY = [
    "README.md",
    "model_index.json",
    "sd_xl_base_1.0.safetensors",
    "scheduler/scheduler_config.json",
    *(f"tokenizer{n}/{f}" for n in ("", "_2") for f in ("merges.txt", "vocab.json", "tokenizer_config.json")),
    *(
        f"{part}/{f.format('diffusion_pytorch_model', 'diffusion_flax_model')}"
        for part in ("unet", "vae")
        for f in _MODEL
    ),
    *(f"text_encoder{n}/{f.format('model', 'flax_model')}" for n in ("", "_2") for f in _MODEL),
    "vae_1_0/diffusion_pytorch_model.safetensors",
    "vae_decoder/model.onnx",
]


@pytest.fixture
def hub(built, tmp_path, monkeypatch):
    """A hub with one repository; `snapshot_download` picks files by huggingface_hub's own rules."""
    listing = list(REPOSITORY)
    fetched = []

    def snapshot_download(repo_id, *, allow_patterns, ignore_patterns):
        assert repo_id == "org/name"
        for name in filter_repo_objects(
            listing, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            fetched.append(name)
            target = tmp_path / "snapshot" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(
                (built / name).read_bytes() if name.endswith(".json") and (built / name).exists() else b""
            )
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return listing, fetched


def test_only_one_format_and_variant_is_fetched(hub):
    _, fetched = hub
    folder = weights.open_folder("org/name")
    assert sorted(folder.configs) == sorted(
        set(INDEX) - {"_class_name", "force_zeros_for_empty_prompt", "image_encoder"}
    )
    assert sorted(name for name in fetched if not name.endswith((".json", ".txt"))) == [
        "text_encoder/model.safetensors",
        "text_encoder_2/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    assert {name for name in fetched if name.startswith("tokenizer_2/")} == {
        f"tokenizer_2/{file}" for file in ("merges.txt", "vocab.json", "tokenizer_config.json")
    }


def test_what_is_distilled_is_fetched_and_a_device_takes_its_own_alone(hub):
    listing, fetched = hub
    student = ["unet_student/flow.json", "unet_student/diffusion_pytorch_model.safetensors"]
    decoders = ["decoders/meg/diffusion_pytorch_model.safetensors", "decoders/pruning/gate.safetensors"]
    listing += [*student, *decoders]
    weights.open_folder("org/name")
    assert {*student, *decoders} <= set(fetched)
    fetched.clear()
    weights.open_folder("org/name", parts=("vae",))
    assert sorted(name for name in fetched if name.endswith(".safetensors")) == [
        *decoders,
        "vae/diffusion_pytorch_model.safetensors",
    ]


def test_a_variant_is_fetched(hub):
    _, fetched = hub
    weights.open_folder("org/name", variant="fp16")
    found = [name for name in fetched if not name.endswith((".json", ".txt"))]
    assert len(found) == 4
    assert all(name.endswith(".fp16.safetensors") for name in found)


def test_shards_and_their_index_are_fetched(hub):
    listing, fetched = hub
    stem = "unet/diffusion_pytorch_model"
    listing.remove(f"{stem}.safetensors")
    shards = [f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    half = [f"{stem}.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    indices = [f"{stem}.safetensors.index.json", f"{stem}.safetensors.index.fp16.json"]
    listing += [*shards, *half, *indices]
    weights.open_folder("org/name")
    assert {*shards, indices[0]} <= set(fetched)
    assert not {*half, indices[1]} & set(fetched)
    fetched.clear()
    listing.remove(f"{stem}.fp16.safetensors")
    weights.open_folder("org/name", variant="fp16")
    assert {*half, indices[1]} <= set(fetched)
    assert not {*shards, indices[0]} & set(fetched)


def test_msgpack_is_fetched_where_there_is_no_safetensors(hub):
    listing, fetched = hub
    listing.remove("unet/diffusion_pytorch_model.safetensors")
    weights.open_folder("org/name")
    assert [name for name in fetched if name.endswith("msgpack")] == ["unet/diffusion_flax_model.msgpack"]


def test_the_only_variant_is_fetched_where_there_is_no_plain_file(hub):
    listing, fetched = hub
    listing[:] = [n for n in listing if not n.endswith("msgpack") and ("fp16" in n or "safetensors" not in n)]
    weights.open_folder("org/name")
    assert len([name for name in fetched if name.endswith(".fp16.safetensors")]) == 4


def test_one_of_several_variants_must_be_named(hub):
    listing, _ = hub
    stem = "unet/diffusion_pytorch_model"
    listing[:] = [n for n in listing if not n.startswith("unet/d")]
    listing += [f"{stem}.{variant}.safetensors" for variant in ("bf16", "fp16")]
    with pytest.raises(WeightsError, match="no weights of variant 'plain'; there are bf16, fp16"):
        weights.open_folder("org/name")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (errors.LocalEntryNotFoundError("not cached\nmore"), "not in the hub's cache"),
        (errors.OfflineModeIsEnabled("offline"), "the hub is offline"),
        (errors.HFValidationError("bad name"), "not a hub id"),
        (ConnectionError("refused\nmore"), r"the download failed \(refused\)"),
        (Exception("timed out"), r"the download failed \(timed out\)"),  # httpx's errors are no OSError
    ],
)
def test_hub_errors_are_one_line(monkeypatch, error, said):
    def snapshot_download(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(WeightsError, match=said) as caught:
        weights.open_folder("org/name")
    assert "\n" not in str(caught.value)


def test_offline_mode(built, tmp_path):
    """With huggingface_hub itself: what is cached opens, what isn't is one clear error."""
    revision = "0" * 40
    cached = tmp_path / "models--org--name"
    shutil.copytree(built, cached / "snapshots" / revision)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(revision)
    code = (
        "from megjax import weights\n"
        "print(len(weights.open_folder('org/name').configs))\n"
        "try: weights.open_folder('org/other')\n"
        "except weights.folder.WeightsError as error: print(error)"
    )
    env = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path), "JAX_PLATFORMS": "cpu", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "7",
        "org/other: no such folder; not in the hub's cache either, and the hub is offline or cannot be "
        "reached",
    ]
