"""Recipes: where they are looked up, what a broken one says, overrides, the verb they are for."""

import textwrap

import pytest
from ml_collections import ConfigDict

from longlive_jax.cli import recipes
from longlive_jax.cli.app import run
from longlive_jax.spec import UserError


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(
        textwrap.dedent('''
        """A config for tests."""
        from ml_collections import ConfigDict

        ARGUMENTS = ("fast", "slow")

        def get_config(arg=""):
            if arg == "fast,slow":
                raise ValueError("choose one")
            return ConfigDict({"name": "7", "sample": {"steps": 4}, "arg": arg})
        ''')
    )
    return str(path)


def test_config_argument_and_overrides(config_file):
    config, rest = recipes.take_config(
        [
            f"--config={config_file}:fast",
            "--script=a.yaml",
            "--config.sample.steps=2e-5",
            "--config.name=8",
            "--config.new.shape=(1, 2)",
            "--config.flag",
            "true",
        ]
    )
    assert rest == ["--script=a.yaml"]
    assert config.to_dict() == {
        "name": "8",  # a string in the config remains a string
        "sample": {"steps": 2e-5},
        "arg": "fast",
        "new": {"shape": (1, 2)},
        "flag": True,
    }


def test_default_config_can_be_overridden(config_file):
    config, _ = recipes.take_config(["--config.sample.steps=1"], default=config_file)
    assert config.sample.steps == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--config is missing"),
        (["--config="], "expected NAME:ARGUMENT or FILE.py:ARGUMENT; recipes: .*small_world"),
        (["--config"], "expected a value"),
        (["--config={}", "--config.sample.steps"], "write --config.sample.steps=VALUE"),
        (["--config={}", "--config.sample.steps", "--out=x"], "expected a value, got --out=x"),
        (["--config=configs/smal_world.py"], "no recipe or file .* did you mean 'small_world'"),
        (["--config=smal_world:vae"], "did you mean 'small_world'.*Known: ar_5b"),
        (["--config=small_world:vea"], "unknown argument 'vea'; did you mean 'vae'.*Known: ar, "),
        (["--config={}:fsat"], "unknown argument 'fsat'; did you mean 'fast'\\? Known: fast, slow"),
        (["--config={}:fast,slow"], "choose one"),
        (["--config={}", "--config.name.x=1"], "has no keys below it"),
        (["--config={}", "--config.sample=1"], "is a group of steps"),
        (["--config={}", "--config.sample..steps=1"], "empty key"),
        (["--config=small_world:vae,ar"], "choose one of sample, .*, got 'vae,ar'"),
        (["--config=ar_5b:16s,64s"], "choose one clip length"),
        (["--config=small_world", "--config.sample=4"], "is a group; set --config.sample.NAME"),
    ],
)
def test_config_errors(words, message, config_file):
    with pytest.raises(UserError, match=message):
        recipes.take_config([word.format(config_file) for word in words])


def test_group_can_be_set_to_none():
    config = ConfigDict({"recycling": {"clean": 0.5}, "loop": {"steps": 4}})
    recipes.override(config, "recycling", "none")
    assert config.recycling is None
    with pytest.raises(UserError, match="is a group of steps"):
        recipes.override(config, "loop", "3")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty current folder."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("where", ["small_world:nvfp4", "configs/small_world.py:nvfp4"])
def test_recipes_are_known_in_every_folder(where, elsewhere):
    assert recipes.load_config(where).sample.kv == "nvfp4"


def test_an_installation_has_its_recipes_in_the_package(elsewhere, monkeypatch):
    """In an installation `configs/` is a folder of the package, and there is no checkout."""
    package = elsewhere / "site-packages" / "longlive_jax"
    (package / "configs").mkdir(parents=True)
    (package / "configs" / "other.py").write_text(
        'ARGUMENTS = ("a", "b")\ndef get_config(arg): return {"sample": {"seed": arg}}\n'
    )
    monkeypatch.setattr(recipes.resources, "files", lambda name: package)
    monkeypatch.setattr(recipes, "REPOSITORY", package.parent)
    assert recipes.known_recipes() == ["other"]
    assert recipes.load_config("other:b").sample.seed == "b"
    assert recipes.load_config("configs/other.py").sample.seed == ""


def test_a_file_of_the_current_folder_wins_for_a_path_only(elsewhere):
    (elsewhere / "configs").mkdir()
    own = elsewhere / "configs" / "small_world.py"
    own.write_text("def get_config(): return {'sample': {'steps': 77}}\n")
    assert recipes.load_config("configs/small_world.py").sample.steps == 77
    assert "steps" not in recipes.load_config("small_world").sample


def test_own_files_may_lie_anywhere(elsewhere):
    folder = elsewhere / "with:colon"
    folder.mkdir()
    (folder / "mine.py").write_text("def get_config(arg): return {'sample': {'name': arg}}\n")
    assert recipes.load_config("with:colon/mine.py:a:b").sample.name == "a:b"
    (elsewhere / "mine.py").write_text("")
    with pytest.raises(UserError, match=r"write --config=mine\.py"):
        recipes.load_config("mine")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named .* line 1"),
        ("x = 1\nif", r"SyntaxError: invalid syntax \(.*, line 2\)"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("raise RuntimeError('two\\nlines')", "RuntimeError: two lines"),
        ("x = 1", "has no function get_config"),
        ("def get_config(arg):\n    return {}[arg]", r"KeyError: '' \(.*, line 2\)"),
        ("def get_config(arg): return [1]", "must return a ConfigDict or a dict, got list"),
        ("def get_config(arg): raise ValueError('choose one')", "own.py: choose one"),
        ("\x00", "own.py"),
    ],
)
def test_a_broken_file_costs_one_line(text, message, elsewhere, capsys):
    (elsewhere / "own.py").write_text(text)
    with pytest.raises(UserError, match=message):
        recipes.load_config("own.py")
    assert run(["settings", "own.py"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error


def test_a_file_may_take_no_argument(elsewhere):
    (elsewhere / "own.py").write_text("def get_config(): return {'sample': {}}\n")
    assert recipes.load_config("own.py").to_dict() == {"sample": {}}
    with pytest.raises(UserError, match="takes no argument, got 'fast'"):
        recipes.load_config("own.py:fast")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("sample --script=a.yaml --config=small_world:vae", "train --config=small_world:vae`"),
        ("sample --script=a.yaml --config=small_world:evaluate", "longlive evaluate --config="),
        ("train --workdir=w --out=o --config=small_world", "small_world is a sampling recipe; "),
        ("train --workdir=w --out=o --config=small_world:evaluate", "is an evaluation recipe"),
        ("evaluate --config=ar_5b:64s", "is a training recipe; run `longlive train"),
        ("plan --chip=gb200 --config=sample_5b:ar", "is a sampling recipe"),
    ],
)
def test_a_recipe_of_another_verb_is_named_as_such(command, message, elsewhere, capsys):
    assert run(command.split()) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(elsewhere.iterdir())


def test_an_override_may_state_the_stage(elsewhere):
    (elsewhere / "own.py").write_text("def get_config(): return {'checkpoint': 'x'}\n")
    config, _ = recipes.take_config(["--config=own.py", "--config.stage=clips"], verb="train")
    assert config.stage == "clips"
    with pytest.raises(UserError, match=r"own\.py is a sampling recipe"):
        recipes.take_config(["--config=own.py"], verb="train")


def test_arguments_and_summary_are_read_without_importing():
    path = recipes.recipe_folder() / "sample_5b.py"
    assert recipes.recipe_arguments(path) == ("distilled", "two_step", "ar")
    assert recipes.recipe_summary("sample_5b").startswith("Sampling with Wan2.2-TI2V-5B")
