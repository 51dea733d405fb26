"""`longlive settings`: overview, groups, recipes with their values, search."""

import json

import pytest

from longlive_jax.cli.app import run
from longlive_jax.io.builtin import builtin_checkpoint
from longlive_jax.io.checkpoint import CHECKPOINT_MANIFEST


def printed(capsys, *argv):
    assert run(["settings", *argv]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    return text


def rows(capsys, *argv):
    assert run(["settings", *argv, "--json"]) == 0
    groups = json.loads(capsys.readouterr().out)
    return {row["path"]: row for group in groups for row in group["settings"]}


def test_overview_lists_groups_and_recipes(capsys):
    text = printed(capsys)
    for word in ("train clips", "small_world:nvfp4", "ar_5b:64s", "sample_5b:two_step"):
        assert word in text
    line = next(line for line in text.splitlines() if line.startswith("small_world:evaluate"))
    assert line.split()[1] == "evaluate"


def test_defaults_of_a_group(capsys):
    settings = rows(capsys, "sample")
    assert settings["sample.size"]["default"] == "(704, 1280)"  # the 5B model's
    assert settings["sample.solver"]["type"] == "unipc | euler | sde"
    assert rows(capsys, "clips") == rows(capsys, "train", "clips")


def test_values_of_a_recipe_are_marked(capsys):
    settings = rows(capsys, "ar_5b:64s")
    assert (
        settings["recycling.buffer.rows"] | {"default": "48", "mark": "*"}
        == (settings["recycling.buffer.rows"])
    )
    assert settings["ema.decay"]["mark"] == "*" and settings["loop.patience"]["mark"] == ""
    assert settings["stage"]["default"] == "clips"


def test_values_of_the_checkpoint_are_marked(capsys):
    manifest = json.loads((builtin_checkpoint() / CHECKPOINT_MANIFEST).read_text())
    settings = rows(capsys, "small_world:nvfp4")
    assert settings["sample.kv"]["default"] == "nvfp4" and settings["sample.kv"]["mark"] == "*"
    assert settings["sample.steps"]["default"] == str(manifest["sampling"]["steps"])
    assert settings["sample.steps"]["mark"] == "+" and settings["sample.fps"]["mark"] == ""


def test_recipe_whose_checkpoint_is_missing(capsys):
    text = printed(capsys, "sample_5b:ar")
    assert "checkpoint 'checkpoints/5b' is not a directory" in " ".join(text.split())


def test_recipe_that_the_command_line_completes(capsys, tmp_path):
    path = tmp_path / "own.py"
    path.write_text("def get_config(): return {'stage': 'vae', 'loop': {'steps': 7}}\n")
    settings = rows(capsys, str(path))
    assert settings["loop.steps"]["default"] == "7" and settings["loop.steps"]["mark"] == "*"
    assert settings["phases"]["default"] == "required"
    assert "missing key 'phases'" in " ".join(printed(capsys, str(path)).split())
    path.write_text("def get_config(): return {'stage': 'vae', 'lop': {'steps': 7}}\n")
    assert run(["settings", str(path)]) == 2
    assert "did you mean 'loop'" in capsys.readouterr().err


def test_search(capsys):
    settings = rows(capsys, "--search", "Rope")
    assert {"sample.shot_rope_offset", "windows.shot_rope_offset"} <= settings.keys()
    assert all("rope" in json.dumps(row).lower() for row in settings.values())
    assert printed(capsys, "--search=loop.save_every").count("loop.save_every") == 1
    assert set(rows(capsys, "ar_5b:64s", "--search=mesh.sp")) == {"mesh.sp"}


def test_options_of_verbs_without_recipes(capsys):
    settings = rows(capsys, "data", "encode")
    assert settings["--chunks"]["default"] == "12" and settings["--out"]["default"] == "required"
    assert settings["--compute"]["type"] == "auto | float32 | bfloat16"
    assert "--lora" in printed(capsys, "quantize")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "unknown name 'trian'; did you mean 'train'?"),
        (["small_wrld:vae"], "did you mean 'small_world'"),
        (["data"], "write `longlive settings data VERB`"),
        (["data", "chek"], "did you mean 'data check'?"),
        (["sample", "train"], "unknown name 'sample train'"),
        (["--search=zzzz"], "no setting has the word 'zzzz'"),
        (["--search=patiense"], "did you mean 'patience'?"),
        (["--search="], "expected a word"),
        (["--serach=x"], "did you mean '--search'"),
    ],
)
def test_mistakes(argv, message, capsys):
    assert run(["settings", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
