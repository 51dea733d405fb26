"""`longlive bench`: its table of benchmarks, their options, and dispatch by name."""

import dataclasses
import json
import pkgutil
import re
import subprocess
import sys

import pytest

from longlive_jax.bench.balanced import BalancedSpec
from longlive_jax.cli.app import run
from longlive_jax.cli.benchmarks import BENCHMARKS

FLAGS = {
    "sampler": "--checkpoint --model --steps --chunks --batch",
    "encode": "--frames --sp --size",
    "attention": ("--seconds --chunk --rows --columns --heads --width --dtype --repeats --product"),
    "balanced": "--sp --chunks --chunk --size --dim --layers --repeats",
    "nvfp4": (
        "--rows --inputs --outputs --slots --tokens --heads --width --calls --repeats --product "
        "--copy --bytes --chip"
    ),
    "kernels": "--kernel",
    "kv": "--checkpoint --chunks --tokens --heads --width --outliers",
}


def test_the_table_has_every_benchmark():
    assert list(BENCHMARKS) == list(FLAGS)


@pytest.mark.parametrize("name", FLAGS)
def test_help_lists_the_options(name, capsys):
    assert run(["bench", name, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"usage: longlive bench {name} " in text
    options = re.findall(r"^  (--\w+)", text, flags=re.MULTILINE)
    assert options == [*FLAGS[name].split(), "--json", "--out"]


def test_help_without_a_name_lists_the_benchmarks(capsys):
    assert run(["bench", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in FLAGS)


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from longlive_jax.cli import app\n"
        f"for name in {list(FLAGS)}: assert app.run(['bench', name, '--help']) == 0\n"
        "assert not {'jax', 'numpy', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


@pytest.mark.parametrize("name", FLAGS)
def test_every_setting_has_an_option_of_its_type(name):
    benchmark = BENCHMARKS[name]
    fields = {x.name: x.type for x in dataclasses.fields(pkgutil.resolve_name(benchmark.spec))}
    if name == "encode":
        del fields["model"]  # the VAE is always Wan2.2's
    assert {x.name for x in benchmark.options} == set(fields)
    for option in benchmark.options:
        if isinstance(option.type, type):
            assert fields[option.name] in (option.type, option.type | None)


@pytest.fixture
def specs(monkeypatch):
    """Replaces the code of `bench balanced`; the settings that it ran with."""
    runs: list[BalancedSpec] = []

    def record(spec: BalancedSpec) -> dict:
        runs.append(spec)
        return {"layers": spec.layers}

    fake = dataclasses.replace(
        BENCHMARKS["balanced"],
        run=record,
        show=lambda report: print(f"table of {report['layers']}"),
        defaults=lambda: {"layers": 7},
    )
    monkeypatch.setitem(BENCHMARKS, "balanced", fake)
    return runs


def test_options_override_the_defaults_of_this_machine(specs, capsys):
    assert run(["bench", "balanced"]) == 0
    assert run(["bench", "--chunk=3", "balanced", "--layers=1"]) == 0
    assert specs == [BalancedSpec(layers=7), BalancedSpec(chunk_frames=3, layers=1)]
    assert capsys.readouterr().out == "table of 7\ntable of 1\n"


def test_json_is_printed_and_written(specs, tmp_path, capsys):
    out = tmp_path / "new" / "report.json"
    assert run(["bench", "balanced", "--json", f"--out={out}"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(out.read_text()) == {"layers": 7}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "bench: the following arguments are required: what"),
        (["balance"], "bench: unknown benchmark 'balance'; did you mean 'balanced'?"),
        (["balanced", "--head=1"], "bench balanced: unknown option '--head'"),
        (["balanced", "--sp=two"], "bench balanced: argument --sp: invalid int value: 'two'"),
        (["balanced", "--out=/proc/x/y.json"], "cannot write"),
    ],
)
def test_mistakes_run_nothing(specs, words, message, capsys):
    assert run(["bench", *words]) == 2
    assert message in capsys.readouterr().err
    assert not specs
