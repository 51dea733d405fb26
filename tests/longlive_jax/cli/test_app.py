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
    with pytest.raises(UserError, match="required"):
        parser.parse_args([])
    with pytest.raises(UserError, match="unknown argument 'b'"):
        parser.parse_args(["--script=a", "b"])
