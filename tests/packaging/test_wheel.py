"""The installed wheel works in an empty folder, with the packages of the test environment."""

import json
import sys

import av
import pytest

SCRIPT = """\
shots:
  - {prompt: a red circle moves left on a mint background, seconds: 1}
seed: 7
"""
USER = """\
from longlive_jax import Pipeline, ShotScript
pipe = Pipeline.from_checkpoint()
reveal_type(pipe)
reveal_type(ShotScript.read("shots.yaml"))
pipe.samples("a red circle")
"""
MYPY = """\
[mypy]
strict = true
[mypy-jax.*,jaxlib.*,flax.*,numpy.*,optax.*]
follow_imports = skip
ignore_missing_imports = true
"""


@pytest.fixture(scope="module", autouse=True)
def script(installed):
    (installed.folder / "shots.yaml").write_text(SCRIPT)


def frames_of(path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_the_package_is_the_installed_one(installed, repository):
    program = "import longlive_jax as l, pallas_kernels as p; print(l.__file__, p.__file__)"
    for path in installed.run(installed.python, "-c", program).split():
        assert path.startswith(str(installed.environment)), path


def test_version(installed):
    assert "0.1.0" in installed.longlive("--version")


def test_demo(installed):
    prompt = "a red circle moves left on a mint background"
    installed.longlive("demo", "--steps=1", f"--prompt={prompt}", "--out=demo")
    assert frames_of(installed.folder / "demo" / "video.mp4") > 100


def test_sample_needs_no_config(installed):
    installed.longlive("sample", "--script=shots.yaml", "--steps=1", "--out=mine")
    assert frames_of(installed.folder / "mine" / "video.mp4") == 29


def test_a_recipe_is_found_by_name(installed):
    installed.longlive(
        "train", "--config=small_world:text", "--config.loop.steps=2", "--workdir=run", "--out=ck"
    )
    assert (installed.folder / "ck" / "longlive.json").is_file()


def test_an_unknown_recipe_is_one_line(installed):
    out = installed.longlive("train", "--config=smal_world:text", "--workdir=a", "--out=b", code=2)
    assert len(out.splitlines()) == 1 and "small_world" in out


def test_plan(installed):
    mesh = ("--chip=gb200", "--mesh=data=8,sp=4", "--no-compile")
    out = json.loads(installed.longlive("plan", "--config=ar_5b:64s", *mesh, "--json"))
    assert out["mesh"] == {"data": 8, "fsdp": 1, "sp": 4}


def test_evaluate_one_video(installed):
    out = installed.longlive(
        "evaluate", "--config=small_world:evaluate", "--parts=steps", "--out=report",
        "--config.evaluate.short.least_shots=1", "--config.evaluate.batch=1",
        "--config.evaluate.sample.steps=1", "--config.evaluate.fewer_steps=()",
    )  # fmt: skip
    assert "caption accuracy" in out
    assert (installed.folder / "report" / "report.json").is_file()


def test_a_users_program_is_type_checked(installed):
    (installed.folder / "user.py").write_text(USER)
    (installed.folder / "mypy.ini").write_text(MYPY)
    mypy = (sys.executable, "-m", "mypy", f"--python-executable={installed.python}", "user.py")
    notes = installed.run(*mypy, code=1).splitlines()
    assert 'user.py:3: note: Revealed type is "longlive_jax.sampling.pipeline.Pipeline"' in notes
    assert 'user.py:4: note: Revealed type is "longlive_jax.sampling.script.ShotScript"' in notes
    assert [note for note in notes if "error" in note and "samples" not in note] == [notes[-1]]
