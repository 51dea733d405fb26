"""Tables of paired cases: requirements, training costs, Markdown and pictures."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from longlive_jax.adapters import Adapter, save_adapter
from longlive_jax.cli.app import run
from longlive_jax.io.checkpoint import load_component, save_component
from longlive_jax.quant.lora import LoRASpec, init_adapter
from longlive_jax.small_world.case_runner import Case, CaseRunner
from longlive_jax.small_world.cases import EvaluateSpec, select_cases
from longlive_jax.small_world.evaluator import EvaluationSet
from longlive_jax.small_world.metrics import rate
from longlive_jax.small_world.paired import Difference
from longlive_jax.small_world.table_report import tables_markdown, write_table_picture
from longlive_jax.small_world.tables import (
    METRICS,
    Bar,
    TableSpec,
    bar_line,
    bar_results,
    table_results,
    training_cost,
)
from longlive_jax.spec import UserError, build


def case(words, *, seed=0, cuts="1 1"):
    outcomes = {"all_right": words, "identity_held": words, "cut_exact": cuts}
    counts = {k: rate(v.count("1"), v.count("1") + v.count("0")) for k, v in outcomes.items()}
    asked = {"sample": {"steps": 4}, "footage": {"seed": seed}, "batch": 2}
    times = {"frames_per_second": None}
    return {**counts, "asked": asked, "outcomes": outcomes, "shots": 4, "times": times}


TABLE = TableSpec(
    name="few",
    title="Few steps",
    rows=("base", "good", "bad", "absent", "elsewhere"),
    baseline="base",
    bars=(
        Bar(case="good", against="base", points=3.0),
        Bar(case="bad", against="base", points=3.0),
        Bar(case="bad", against="good", metric="cut_exact", kind="no_worse"),
        Bar(case="absent", against="base"),
    ),
)
CASES = {
    "base": case("11 11"),
    "good": case("11 11") | {"bytes": {"dit": 2e6, "cache": 1e6}},
    "bad": case("10 01"),
    "elsewhere": case("11 11", seed=1),
}


def test_a_table_has_differences_bars_and_what_is_missing():
    got = table_results(TABLE, CASES)
    assert got is not None and json.loads(json.dumps(got)) == got
    assert list(got["rows"]) == ["base", "good", "bad"]
    assert got["missing"] == ["absent", "elsewhere"]
    assert got["rows"]["bad"]["all_right"]["estimate"] == -0.5
    assert [bar["met"] for bar in got["bars"]] == [True, False, True]
    assert table_results(TABLE, {"good": CASES["good"]}) is None


@pytest.mark.parametrize(
    ("kind", "low", "high", "is_met"),
    [
        ("within", -0.029, 0.0, True),
        ("within", -0.031, 0.02, False),
        ("no_worse", -0.2, 0.001, True),
        ("no_worse", -0.2, -0.001, False),
    ],
)
def test_a_bar_is_judged_by_its_bound(kind, low, high, is_met):
    bar = Bar(case="one", against="two", points=3.0, kind=kind)
    difference = Difference(estimate=(low + high) / 2, low=low, high=high, n=100, videos=25)
    assert bar.is_met(difference) == is_met


def test_markdown_and_picture_of_a_table(tmp_path):
    results = table_results(TABLE, CASES)
    report = {"cases": CASES, "tables": {"few": results}}
    text = "\n".join(tables_markdown(report))
    assert "| bad | 4 | 4 | 50.0 (15.0–85.0) | -50.0 (-50.0, -50.0) |" in text
    assert "| good | caption accuracy | at most 3 points below | base |" in text
    assert "Not measured on these videos: absent, elsewhere." in text
    lines = [bar_line(bar) for _, bar in bar_results(report)]
    assert lines[1].startswith("bad, caption accuracy: at most 3 below base: -50.0")
    assert [line.rpartition(": ")[2] for line in lines] == ["met", "missed", "met"]
    write_table_picture(results, CASES, tmp_path / "few.png")
    with Image.open(tmp_path / "few.png") as image:
        assert image.size[0] > 1000


def test_videos_of_one_shot_have_no_cut_timing(tmp_path):
    cases = {name: case("1 0", cuts="- -") for name in ("base", "good")}
    table = TableSpec(
        name="few",
        title="One shot",
        rows=("base", "good"),
        baseline="base",
        bars=(Bar(case="good", against="base", metric="cut_exact"),),
    )
    results = table_results(table, cases)
    assert results is not None and results["bars"] == []
    write_table_picture(results, cases, tmp_path / "one.png")
    assert "| – | – |" in "\n".join(tables_markdown({"cases": cases, "tables": {"one": results}}))


def test_training_costs_are_read_from_the_log(tmp_path):
    rates = [0.1, 2.0, 2.0, 4.0]  # the first window compiles
    records = [{"step": 10 * (i + 1), "steps_per_s": r} for i, r in enumerate(rates)]
    lines = [*records, {"step": 40, "held_out_loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert training_cost(tmp_path) == {"updates": 40, "seconds_per_update": 0.5}
    with pytest.raises(UserError, match=r"has no metrics\.jsonl with updates"):
        training_cost(tmp_path / "elsewhere")


def spec(**fields):
    rows = [{"name": "one", "steps": 1}, {"name": "two", "steps": 2}, {"name": "three"}]
    table = {"name": "few", "title": "Few", "rows": ["one", "two"], "baseline": "two"}
    return build(EvaluateSpec, {"compared": rows, "tables": [table | fields], "runs": "folder"})


def test_a_part_is_a_kind_of_cases_or_a_table():
    assert [x.name for x in select_cases(spec(), ["few"])] == ["one", "two"]
    assert [x.name for x in select_cases(spec(), ["compared"])] == ["one", "two", "three"]
    with pytest.raises(UserError, match="unknown part 'fev'; did you mean 'few'"):
        select_cases(spec(), ["fev"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rows": ["one", "two", "four"]}, "few: no case is named 'four'"),
        ({"baseline": "three"}, "few: 'three' is not one of its rows"),
        ({"name": "steps"}, "'steps' is not a unique name"),
        ({"bars": [{"case": "one", "against": "two", "metric": "right"}]}, "metric must be one of"),
        ({"bars": [{"case": "one", "against": "two", "points": -1.0}]}, "points must be >= 0"),
    ],
)
def test_tables_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        spec(**fields)


def test_relative_paths_start_from_the_folder_of_the_runs():
    rows = [{"name": "one", "adapter": "few:0.5", "log": "few.run", "checkpoint": "/model"}]
    (row,) = select_cases(build(EvaluateSpec, {"compared": rows, "runs": "runs"}), ["compared"])
    assert (row.adapter, str(row.log)) == ("runs/few:0.5", "runs/few.run")
    assert str(row.checkpoint) == "/model"


def test_an_adapter_is_plugged_in_with_its_settings(tiny_world, tmp_path):
    """And is part of what a result depends on: its weights, its settings and its strength."""
    model = shutil.copytree(tiny_world, tmp_path / "model")
    params, cfg = load_component(model, "dit")
    params["head"]["linear"]["kernel"] += 0.1  # which is zero in a new model
    save_component(model, "dit", params, cfg, overwrite=True)
    branches = init_adapter(jax.random.key(0), params, LoRASpec(rank=4))
    branches = jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), x.shape) / 4, branches)
    save_adapter(tmp_path / "few", Adapter(branches, settings={"steps": 1, "solver": "euler"}))
    small = EvaluationSet(least_shots=2, chunks=2, shot_chunks=(1, 2))
    rows = [Case("compared", "plain", small, {"steps": 1, "solver": "euler"})]
    for name, adapter in (("whole", "few"), ("none", "few:0")):
        rows.append(Case("compared", name, small, {}, adapter=f"{tmp_path}/{adapter}"))
    runner = CaseRunner(model, {})
    asked = {row.name: runner.dependencies(row, 1) for row in rows}
    assert asked["plain"]["sample"] == asked["whole"]["sample"] == asked["none"]["sample"]
    assert asked["whole"]["adapter"]["strength"] == 1 and asked["none"]["adapter"]["strength"] == 0
    assert "adapter" not in asked["plain"]
    pixels = {}
    for row in rows:
        _, example = runner.measure(row, 1, lambda *_: None)
        pixels[row.name] = np.concatenate(example.shots)
    assert np.array_equal(pixels["none"], pixels["plain"])
    assert not np.array_equal(pixels["whole"], pixels["plain"])


def test_one_command_makes_a_table(tiny_world, tmp_path, capsys):
    """Two step counts on the same videos; a second command measures nothing again."""
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "metrics.jsonl").write_text('{"step": 5, "steps_per_s": 2.0}\n')
    rows = [{"name": "one", "steps": 1, "log": "log"}, {"name": "two"}, {"name": "three"}]
    bars = [{"case": "one", "against": "two"}]
    table = {"name": "few", "title": "Few", "rows": ["one", "two"], "baseline": "two", "bars": bars}
    videos = "{'least_shots': 4, 'chunks': 3, 'shot_chunks': (1, 2)}"
    settings = {
        "compared": rows, "tables": [table], "comparison": videos, "runs": tmp_path, "batch": 2,
    }  # fmt: skip
    flags = [f"--config.evaluate.{name}={value}" for name, value in settings.items()]
    paths = [f"--checkpoint={tiny_world}", f"--out={tmp_path / 'out'}"]
    for _ in range(2):
        assert run(["evaluate", *flags, *paths, "--parts=few"]) == 0
        printed = capsys.readouterr()
    assert "has no effect" not in printed.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(report["cases"]) == ["one", "two"]
    assert report["cases"]["one"]["training"]["seconds_per_update"] == 0.5
    assert set(report["tables"]["few"]["rows"]["one"]) == set(METRICS)
    assert (tmp_path / "out" / "few.png").is_file()
    assert "## Few" in printed.out and "at most 3 points below" in printed.out
