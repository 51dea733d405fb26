"""Compiled programs are kept between commands, in a folder for this jaxlib and this CPU."""

import os
import subprocess
import sys

import pytest

from longlive_jax.cli import app
from longlive_jax.cli.compilation_cache import take_compilation_cache, use_compilation_cache
from longlive_jax.io import compilation_cache
from longlive_jax.spec import UserError

PROGRAM = """
import sys
from types import ModuleType
from longlive_jax.cli import app

def main(argv):
    import jax
    jax.jit(lambda x: (x @ x).sum())(jax.numpy.ones((64, 64))).block_until_ready()

probe = ModuleType("longlive_jax.cli.demo")
probe.main = main
sys.modules["longlive_jax.cli.demo"] = probe
sys.exit(app.run(sys.argv[1:]))
"""


def run(tmp_path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The verb `demo`, replaced by one small product, in a process of its own."""
    foreign = ("JAX_ENABLE_COMPILATION_CACHE", "JAX_COMPILATION_CACHE_DIR")
    environment = {k: v for k, v in os.environ.items() if k not in foreign}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache")} | variables
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, "demo", *arguments],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )


def entries(folder) -> dict[str, int]:
    """Cached programs and when they were written."""
    return {p.name: p.stat().st_mtime_ns for p in folder.rglob("*-cache")}


def test_programs_are_kept_and_the_folder_is_named_once(tmp_path):
    first = run(tmp_path)
    (folder,) = (tmp_path / "cache" / "longlive-jax" / "compiled").iterdir()
    programs = entries(folder)
    assert programs and str(folder) in first.stderr and first.stderr.count("\n") == 1
    second = run(tmp_path)
    assert second.stderr == "" and entries(folder) == programs


def test_jaxs_own_folder_takes_precedence(tmp_path):
    done = run(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"))
    assert entries(tmp_path / "own") and not (tmp_path / "cache").exists() and not done.stderr


@pytest.mark.parametrize(
    ("arguments", "variables"),
    [(["--compilation_cache=off"], {}), ([], {"JAX_ENABLE_COMPILATION_CACHE": "false"})],
)
def test_it_can_be_turned_off(tmp_path, arguments, variables):
    assert not run(tmp_path, *arguments, **variables).stderr
    assert not list(tmp_path.rglob("*-cache"))


def test_a_folder_can_be_chosen(tmp_path):
    run(tmp_path, "--compilation_cache", str(tmp_path / "chosen"))
    assert entries(tmp_path / "chosen") and not (tmp_path / "cache").exists()


def test_a_command_works_without_a_folder_that_can_be_written(tmp_path):
    (tmp_path / "cache").write_text("")
    done = run(tmp_path)
    assert "compiled programs are not kept: cannot write to" in done.stderr


def test_the_folder_depends_on_jaxlib_and_on_the_cpu(tmp_path, monkeypatch):
    def folder_of(text: str, version: str):
        (tmp_path / "cpuinfo").write_text(text)
        monkeypatch.setattr(compilation_cache, "version", lambda _: version)
        return compilation_cache.compilation_cache_folder()

    monkeypatch.setattr(compilation_cache, "CPU_INFO", tmp_path / "cpuinfo")
    x86 = "processor : 0\nflags : sse2 avx\ncpu MHz : {}\n\nprocessor : 1\nflags : sse2 avx\n"
    base = folder_of(x86.format(2000), "0.11.2")
    assert folder_of(x86.format(3000), "0.11.2") == base
    others = [
        folder_of(x86.format(2000).replace("avx", "avx512f"), "0.11.2"),
        folder_of("processor : 0\nFeatures : asimd sve\n", "0.11.2"),
        folder_of(x86.format(2000), "0.12.0"),
    ]
    assert len({base, *others}) == 4


def test_an_option_without_a_value_or_a_usable_folder_is_refused(tmp_path):
    for rest, got in (([], "nothing"), (["--seed=3"], "--seed=3")):
        with pytest.raises(UserError, match=f"expected off or a folder, got {got}$"):
            take_compilation_cache(["demo", "--compilation_cache", *rest])
    (tmp_path / "file").write_text("")
    argv = [f"--compilation_cache={tmp_path}/file/x", "demo"]
    code = f"from longlive_jax.cli import app; app.run({argv})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "cannot write to" in done.stderr and done.stderr.count("\n") == 1


def test_a_verb_that_does_not_use_it_says_so(capsys):
    use_compilation_cache("bench", "off")
    assert "--compilation_cache has no effect on bench" in capsys.readouterr().err
    use_compilation_cache("demo", "off")
    assert "no effect, because this process has imported JAX" in capsys.readouterr().err
    assert "--compilation_cache" in app.usage()
