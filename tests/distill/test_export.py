"""Export: the delta turns the teacher into the student, and any fine-tune into a few-step model."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from megjax import weights
from megjax.distill.export import add_delta, average, copy_backbone, delta, save_weights
from megjax.models import Network, UNetConfig


def trees():
    rng = np.random.default_rng(0)

    def tree(scale):
        return {"conv_in": {"kernel": jnp.asarray(scale * rng.normal(size=(3, 3, 4, 8)), jnp.float32)}}

    teacher, tuned = tree(1.0), tree(0.05)
    student = jax.tree.map(lambda t, d: t + 0.01 * d, teacher, tree(1.0))
    return teacher, student, jax.tree.map(jnp.add, teacher, tuned)


def test_delta_merges_into_any_fine_tune(tmp_path):
    teacher, student, tuned = trees()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), teacher)
    network = Network(UNetConfig(), None, shapes, lambda: None)
    save_weights(tmp_path / "unet_delta", network, delta(student, teacher))
    again = str(tmp_path / "unet_delta")
    save_weights(again, network, delta(student, teacher), extra={"note.json": b"{}"})  # replaces
    assert [path.name for path in tmp_path.iterdir()] == ["unet_delta"]
    assert (tmp_path / "unet_delta" / "note.json").read_bytes() == b"{}"
    stored = weights.load(tmp_path / "unet_delta", shapes, dtype=jnp.float32)
    kernel = np.asarray(add_delta(teacher, stored)["conv_in"]["kernel"])
    np.testing.assert_allclose(kernel, student["conv_in"]["kernel"], atol=2e-5)
    merged = add_delta(tuned, stored, strength=0.5)
    expected = tuned["conv_in"]["kernel"] + 0.5 * (
        student["conv_in"]["kernel"] - teacher["conv_in"]["kernel"]
    )
    np.testing.assert_allclose(merged["conv_in"]["kernel"], expected, atol=2e-5)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tuned)
    assert add_delta(half, stored)["conv_in"]["kernel"].dtype == jnp.bfloat16


def test_students_are_averaged_in_float32():
    teacher, student, _ = trees()
    half = jax.tree.map(lambda x: x.astype(jnp.float16), student)
    mean = average([teacher, student, half])["conv_in"]["kernel"]
    assert mean.dtype == jnp.float32
    want = (teacher["conv_in"]["kernel"] + 2 * student["conv_in"]["kernel"]) / 3
    np.testing.assert_allclose(mean, want, atol=1e-3)


def test_an_exported_folder_is_never_half_there(tmp_path, monkeypatch):
    """What is removed piece by piece has another name by then."""
    teacher = trees()[0]
    network = Network(UNetConfig(), None, teacher, lambda: None)
    removed = []
    remove = shutil.rmtree

    def watched(path, **kwargs):
        if Path(path).exists():
            removed.append(Path(path))
            assert sorted(p.name for p in (tmp_path / "model").iterdir()) == whole
        remove(path, **kwargs)

    save_weights(tmp_path / "model", network, teacher)
    whole = sorted(p.name for p in (tmp_path / "model").iterdir())
    shutil.copytree(tmp_path / "model", tmp_path / "source")
    monkeypatch.setattr(shutil, "rmtree", watched)
    save_weights(tmp_path / "model", network, teacher)
    copy_backbone(tmp_path / "source", tmp_path / "model", {})
    assert [path.parent for path in removed if path.name.endswith("model-old")] == [tmp_path] * 2


def test_a_backbone_is_copied_with_its_new_parts(tmp_path):
    source, part = tmp_path / "source", tmp_path / "part"
    told = source / "README.md"  # of other pictures
    for path in (source / "unet" / "a", source / "decoders" / "meg" / "old", part / "new", told):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    for _ in range(2):
        copy_backbone(source, tmp_path / "model", {"decoders/meg": part})
    found = sorted(
        p.relative_to(tmp_path / "model").as_posix() for p in (tmp_path / "model").rglob("*") if p.is_file()
    )
    assert found == ["decoders/meg/new", "unet/a"]
