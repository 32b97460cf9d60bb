"""The documentation: every equation has its function and its test, and the names and links in it exist."""

import importlib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def found(name):
    """The object of a dotted name."""
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:i]))
        except ModuleNotFoundError:
            continue
        for part in parts[i:]:
            value = getattr(value, part)
        return value
    raise AttributeError(name)


def rows():
    for text in (DOCS / "equations.md").read_text().splitlines():
        if re.match(r"\| \(\d+\)", text):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", text.strip("|"))]
            yield cells


def test_every_equation_has_a_function_and_a_test():
    covered = set()
    for equation, _, functions, tests in rows():
        numbers = [int(n) for n in re.findall(r"\((\d+)\)", equation)]
        covered |= set(range(numbers[0], numbers[-1] + 1))
        assert re.findall(r"\]\[([\w.]+)\]", functions), equation
        assert re.findall(r"`tests/[\w/]+\.py::\w+`", tests), equation
    assert covered == set(range(1, 48))


def test_every_function_named_exists():
    for page in DOCS.glob("*.md"):
        for name in re.findall(r"\]\[(megjax[\w.]+)\]", page.read_text()):
            try:
                found(name)
            except AttributeError:
                pytest.fail(f"{page.name} names {name}, which does not exist")


def test_every_test_named_exists():
    for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (DOCS / "equations.md").read_text()):
        assert re.search(rf"^ *def {name}\(", (ROOT / file).read_text(), re.MULTILINE), f"{file}::{name}"


def test_every_page_is_in_the_navigation_and_every_link_leads_somewhere():
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = [p for p in DOCS.rglob("*") if p.suffix in (".md", ".ipynb")]
    for page in pages:
        assert str(page.relative_to(DOCS)) in navigation
        if page.suffix == ".md":
            for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text()):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


INNER = """
    cli plan training weights
    allocator checks compilation files hlo data.loader data.pictures data.tokenizer
    models.layers models.layout models.placement distill.cache distill.encoding distill.windows
    serve.account serve.app serve.metrics serve.picture serve.server
"""
"""The library's own business, told in no page of the API: whole packages (or in part), then modules."""


def test_every_module_is_in_the_api_or_named_as_inner():
    text = "\n".join(page.read_text() for page in DOCS.glob("api/*.md"))
    listed = set(re.findall(r"^::: ([\w.]+)", text, re.MULTILINE))
    paths = (p.relative_to(ROOT).with_suffix("") for p in (ROOT / "megjax").rglob("*.py"))
    modules = {".".join(path.parts) for path in paths if path.name != "__init__"}
    packages = {name.rpartition(".")[0] for name in modules}
    exempt = {f"megjax.{name}" for name in INNER.split()}
    inner = {name for name in modules if any(f"{name}.".startswith(f"{own}.") for own in exempt)}
    assert listed - modules - packages == set()
    assert modules - listed - inner == set(), "list them in docs/api, or among INNER"
    assert exempt - modules - packages == set()


@pytest.mark.parametrize("notebook", sorted(p.name for p in (DOCS / "notebooks").glob("*.ipynb")))
def test_notebooks_were_run_without_errors(notebook):
    content = json.loads((DOCS / "notebooks" / notebook).read_text())
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    kinds = {output["output_type"] for cell in code for output in cell["outputs"]}
    assert "error" not in kinds
    assert "display_data" in kinds


@pytest.mark.long
@pytest.mark.parametrize("notebook", sorted(p.name for p in (DOCS / "notebooks").glob("*.ipynb")))
def test_notebooks_still_run(notebook, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    monkeypatch.chdir(ROOT)
    content = json.loads((DOCS / "notebooks" / notebook).read_text())
    names = {}
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
