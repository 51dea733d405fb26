"""The command line: exit codes, one-line errors, help."""

import subprocess
import sys
from types import ModuleType

import pytest

from longlive_jax.cli import app
from longlive_jax.spec import UserError


@pytest.fixture
def verb(monkeypatch):
    """A function that installs a verb `probe` with the given main function."""

    def install(main):
        module = ModuleType("longlive_jax.cli.probe")
        module.main = main
        monkeypatch.setitem(sys.modules, "longlive_jax.cli.probe", module)
        monkeypatch.setitem(app.VERBS, "probe", "for tests")

    return install


def test_help_does_not_import_jax():
    code = "import sys; from longlive_jax.cli import app; app.run(['--help'])"
    code += "; assert 'jax' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(verb in done.stdout for verb in app.VERBS)


@pytest.mark.parametrize("name", sorted(app.VERBS))
def test_every_verb_has_help(name, capsys):
    assert app.run([name, "--help"]) == 0
    assert f"longlive {name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(app.VERBS))
def test_every_verb_rejects_an_unknown_option(name, capsys):
    assert app.run([name, "--no-such-option=1"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error


def test_unknown_verb_suggests_the_nearest(capsys):
    assert app.run(["smaple"]) == 2
    assert capsys.readouterr().err == "longlive: unknown verb 'smaple'; did you mean 'sample'?\n"


def test_user_errors_exit_with_2_and_print_one_line(verb, capsys):
    def main(argv):
        raise UserError(f"no checkpoint at {argv[0]}")

    verb(main)
    assert app.run(["probe", "x"]) == 2
    assert capsys.readouterr().err == "longlive: no checkpoint at x\n"


def test_interrupts_exit_with_130_and_bugs_are_raised(verb):
    def interrupted(argv):
        raise KeyboardInterrupt

    def broken(argv):
        raise RuntimeError("bug")

    verb(interrupted)
    assert app.run(["probe"]) == 130
    verb(broken)
    with pytest.raises(RuntimeError, match="bug"):
        app.run(["probe"])


def test_parser_suggests_the_nearest_option():
    parser = app.Parser("probe", "for tests")
    parser.add_argument("--script", required=True)
    with pytest.raises(UserError, match=r"'--scrpt'; did you mean '--script'"):
        parser.parse_args(["--script=a", "--scrpt=a"])
    with pytest.raises(UserError, match="--script is missing; write --script=VALUE"):
        parser.parse_args([])
    with pytest.raises(UserError, match="unknown argument 'b'"):
        parser.parse_args(["--script=a", "b"])


@pytest.mark.parametrize(
    "words",
    [[verb] for verb in app.VERBS]
    + [[verb, x] for verb in app.SUBVERBS for x in app.SUBVERBS[verb]],
)
def test_help_of_a_verb(words, capsys):
    """`longlive help data check` and, of verbs without verbs of their own, `VERB -h`."""
    assert app.run(["help", *words]) == 0
    text = capsys.readouterr().out
    assert f"longlive {' '.join(words)}" in text
    assert max(map(len, text.splitlines())) <= 100
    assert app.run([*words, "-h"]) == 0
    assert capsys.readouterr().out == text


@pytest.mark.parametrize("verb", app.SUBVERBS)
def test_subverbs_are_those_of_the_verb(verb, capsys):
    assert app.run([verb, "zzzzzz", "--chip=x"]) == 2
    known = capsys.readouterr().err.strip().rpartition("known: ")[2]
    assert known.split(", ") == sorted(app.SUBVERBS[verb])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["help", "smaple"], "unknown verb 'smaple'; did you mean 'sample'?"),
        (["hlep"], "unknown verb 'hlep'; did you mean 'help'?"),
        (["help", "data", "chek"], "data has no 'chek'; did you mean 'check'?"),
        (["help", "sample", "steps"], "unexpected argument 'steps'"),
    ],
)
def test_help_of_something_unknown(argv, message, capsys):
    assert app.run(argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("argv", [["-V"], ["--version"]])
def test_version(argv, capsys):
    from importlib.metadata import version

    assert app.run(argv) == 0
    assert capsys.readouterr().out.strip() == version("longlive-jax")


@pytest.mark.parametrize("argv", [[], ["help"], ["-h"], ["help", "help"]])
def test_usage(argv, capsys):
    assert app.run(argv) == 0
    text = capsys.readouterr().out
    assert all(f"  {verb} " in text for verb in app.VERBS)
    assert max(map(len, text.splitlines())) <= 100


def test_help_shows_defaults_and_keeps_examples():
    parser = app.Parser("probe", "One\nparagraph.\n\n    longlive probe\n    longlive probe 2\n")
    parser.add_argument("--out", default="out/x", help="folder")
    parser.add_argument("--size", default="1", help="size (default: the script's)")
    text = parser.format_help()
    assert "One paragraph.\n\n    longlive probe\n    longlive probe 2\n" in text
    assert "folder (default: out/x)" in text and "(default: 1)" not in text
