"""The README's limits, and the built site: complete, and without anything from the network."""

import dataclasses
import importlib.util
import re

import pytest
import yaml
from mkdocs.commands.build import build
from mkdocs.config import load_config

from longlive_jax.sampling.script import ShotScript, parse_script
from longlive_jax.sampling.settings import SampleSpec
from tests.docs.blocks import REPOSITORY

README = REPOSITORY / "README.md"


def test_the_readme_is_short():
    lines = README.read_text().splitlines()
    assert len(lines) <= 180
    assert sum(line.startswith("|") for line in lines) <= 12


def test_links_of_the_readme_exist():
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", README.read_text())
    local = [target for target in targets if not target.startswith("https://")]
    assert local
    assert not [target for target in local if not (REPOSITORY / target).exists()]


def test_own_scripts_show_what_they_say():
    """They are the script that the judge accepts in tests/longlive_jax/small_world."""
    script = ShotScript.read(REPOSITORY / "examples" / "shots.yaml")
    page = (REPOSITORY / "docs" / "index.md").read_text()
    (text,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert parse_script(yaml.safe_load(text), name=script.name) == script
    # The Python example shows the first shots; later ones do not change them.
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert re.findall(r'"(a .*?)"', code) == [shot.prompt for shot in script.shots[:2]]
    assert f"seconds={script.shots[0].seconds:g}, seed={script.seed}" in code


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; a warning of the build is an error."""
    folder = tmp_path_factory.mktemp("site")
    config = load_config(str(REPOSITORY / "mkdocs.yml"), strict=True, site_dir=str(folder))
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    return folder


def test_pages_load_nothing_from_the_network(site):
    loaded = re.compile(r"<(?:script|img|link|iframe)[^>]*(?:src|href)=[\"']?(https?:[^\"' >]+)")
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    assert not {url for page in pages for url in loaded.findall(page.read_text())}
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    assert not re.findall(r"(?:@import|url\()\s*[\"']?https?:", styles)


def test_all_settings_of_sampling_are_on_the_page(site):
    text = (site / "settings.html").read_text()
    for field in dataclasses.fields(SampleSpec):
        assert f"sample.{field.name}" in text


def test_images_of_pages_exist(site):
    for page in site.glob("*.html"):
        for source in re.findall(r"<img[^>]*src=\"([^\":]+?)(?:#[^\"]*)?\"", page.read_text()):
            assert (page.parent / source).is_file(), f"{page.name}: {source}"


def test_the_picture_of_the_packages_implies_exactly_the_imports():
    path = REPOSITORY / "docs" / "draw_architecture.py"
    spec = importlib.util.spec_from_file_location("draw_architecture", path)
    drawing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(drawing)
    graph = drawing.read_imports(drawing.read_rules())
    assert graph["longlive_jax.cli"] and not graph["pallas_kernels"]
    assert closure(drawing.without_implied(graph)) == closure(graph)
    boxes = drawing.place(graph, drawing.read_rules().FLOORS)
    assert set(boxes) == set(graph)
    assert len({(round(x, 1), y) for x, y in boxes.values()}) == len(boxes)


def closure(graph: dict[str, set[str]]) -> set[tuple[str, str]]:
    """All pairs of packages that are connected by imports."""
    pairs = {(a, b) for a, targets in graph.items() for b in targets}
    while more := {(a, d) for a, b in pairs for c, d in pairs if b == c} - pairs:
        pairs |= more
    return pairs


def test_pages_keep_their_numbers_with_place_and_date():
    for name in ("small_world", "nvfp4", "plan", "status", "conversion"):
        text = (REPOSITORY / "docs" / f"{name}.md").read_text()
        assert re.search(r"jax 0\.\d+\.\d+|EPYC", text) and re.search(r"2026-\d\d-\d\d", text), name
