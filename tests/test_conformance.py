"""The conformance runner: our goldens pass, and changed ones fail."""

import importlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

KINDS = (
    "ar_training_loss",
    "dit_bidirectional",
    "dit_teacher_forcing",
    "dmd",
    "error_buffer",
    "facts",
    "flow_schedulers",
    "lora",
    "nvfp4_quantize",
    "rht",
    "sampling_i2v",
    "sampling_kvquant",
    "sampling_multishot",
    "teacher_forcing_masks",
    "umt5_encoder",
    "vae22",
    "vae_halo",
)
TOO_LARGE = {"dmd", "vae22"}
"""Kinds without a file in tests/goldens, as its README.md says."""
SLOW = {"dmd"}
"""Kinds that take minutes."""
FIELDS = ["file", "case", "error", "tolerance", "status"]


@pytest.fixture(scope="module")
def runner():
    """The script as a module, with its folder on the path, as Python does for a script."""
    before = list(sys.path)
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    yield importlib.import_module("conformance")
    sys.path[:] = before


@pytest.fixture
def report(runner, capsys):
    """A function that runs a folder with --json and returns the exit code and the rows."""

    def run(folder):
        capsys.readouterr()
        code = runner.main([str(folder), "--json"])
        return code, json.loads(capsys.readouterr().out)

    return run


def golden_of(goldens, kind):
    return goldens / ("facts.json" if kind == "facts" else f"{kind}.npz")


def rewritten(path, target, change):
    """Writes a copy of a golden file, with `change` applied to its arrays, to `target`."""
    with np.load(path) as file:
        arrays = dict(file)
    change(arrays)
    np.savez(target, **arrays)


def test_the_repository_has_a_file_of_each_kind(repository):
    files = [p for p in (repository / "tests" / "goldens").iterdir() if p.suffix != ".md"]
    assert {path.stem for path in files} == set(KINDS) - TOO_LARGE
    assert sum(path.stat().st_size for path in files) <= 15_000_000


def test_the_files_of_the_repository_are_the_shared_ones(repository, goldens):
    own, reference = (type(goldens)([folder]) for folder in goldens.folders)
    for kind in sorted(set(KINDS) - TOO_LARGE - {"facts"}):
        with np.load(golden_of(own, kind)) as ours, np.load(golden_of(reference, kind)) as theirs:
            assert set(ours.files) == set(theirs.files)
            for name in ours.files:
                np.testing.assert_array_equal(ours[name], theirs[name], f"{kind}: {name}")
    assert golden_of(own, "facts").read_bytes() == golden_of(reference, "facts").read_bytes()


def test_a_missing_file_is_skipped_by_name(goldens, tmp_path):
    with pytest.raises(pytest.skip.Exception, match=r"no vae22\.npz in .*LONGLIVE_SHARED"):
        type(goldens)([tmp_path]) / "vae22.npz"


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.slow) if k in SLOW else k for k in KINDS]
)
def test_goldens_pass(goldens, tmp_path, report, kind):
    shutil.copy(golden_of(goldens, kind), tmp_path)
    code, rows = report(tmp_path)
    assert code == 0, [row for row in rows if row["status"] == "fail"]
    assert any(row["status"] == "pass" for row in rows)


def test_every_golden_has_a_row(goldens, runner):
    """Without running them; kinds that are not implemented have one case, "all"."""
    for path in goldens.paths():
        cases = runner.cases_of(path)
        assert cases, path.name
        assert path.stem in KINDS or [case.name for case in cases] == ["all"]


def test_report_has_exactly_the_fields(goldens, tmp_path, report):
    shutil.copy(golden_of(goldens, "umt5_encoder"), tmp_path)
    np.savez(tmp_path / "something_else.npz", x=np.zeros(3))
    _, rows = report(tmp_path)
    assert all(list(row) == FIELDS for row in rows)
    status = {(row["file"], row["status"]) for row in rows}
    assert status == {("umt5_encoder.npz", "pass"), ("something_else.npz", "not implemented")}


@pytest.mark.parametrize(
    ("kind", "name", "change", "case"),
    [
        ("umt5_encoder", "y", lambda x: x * 1.001, "y"),
        ("umt5_encoder", "w/norm.weight", lambda x: x * 1.001, "y"),
        ("teacher_forcing_masks", "natural_1", lambda x: ~x, "natural_1"),
        ("flow_schedulers", "unipc4_traj", lambda x: x + 1e-3, "unipc4/trajectory"),
        ("flow_schedulers", "fm_sigmas", lambda x: x[::-1], "fm_sigmas"),
        ("flow_schedulers", "fm_weights", lambda x: x * np.nan, "fm_weights"),
    ],
)
def test_changed_goldens_fail(goldens, tmp_path, report, kind, name, change, case):
    """Only the case that uses the changed array fails; NaN fails as well."""
    source = golden_of(goldens, kind)

    def apply(arrays):
        arrays[name] = change(arrays[name])

    rewritten(source, tmp_path / source.name, apply)
    code, rows = report(tmp_path)
    assert code == 1
    assert [row["case"] for row in rows if row["status"] == "fail"] == [case]


def test_kinds_without_a_file_are_named(goldens, tmp_path, runner, capsys):
    shutil.copy(golden_of(goldens, "teacher_forcing_masks"), tmp_path)
    assert runner.main([str(tmp_path)]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    others = [kind for kind in KINDS if kind not in ("facts", "teacher_forcing_masks")]
    assert line.split(": ")[-1] == ", ".join(others)


def one_video(arrays):
    for name in ("x", "t_tokens", "t_scalar", "context", "context_lens", "y", "y_scalar_t"):
        arrays[name] = arrays[name][:1]


def shorter_text(arrays):
    inside = arrays["mask"][0] > 0
    for name in ("ids", "mask", "y"):
        arrays[name] = arrays[name][:1, inside]


def shorter_video(arrays):
    """One case of five chunks; the chunks that are left out do not affect the earlier ones."""
    meta = json.loads(bytes(arrays["__meta__"]))
    meta["cases"] = [case for case in meta["cases"] if case["inference"]["sampling_steps"] == 2]
    frames = 5 * meta["num_frame_per_block"]
    for case in meta["cases"]:
        del case["cache_state"]
        case["prompts"] = case["prompts"][:5]
        name = f"{case['name']}/latents"
        arrays[name] = arrays[name][:, :frames]
        del arrays[f"{case['name']}/k_cache_layer0"]
    arrays["noise"] = arrays["noise"][:, :frames]
    arrays["__meta__"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("dit_bidirectional", one_video),
        ("umt5_encoder", shorter_text),
        ("sampling_multishot", shorter_video),
    ],
)
def test_sizes_come_from_the_file(goldens, tmp_path, report, kind, change):
    source = golden_of(goldens, kind)
    rewritten(source, tmp_path / source.name, change)
    code, rows = report(tmp_path)
    assert code == 0 and {row["status"] for row in rows} == {"pass"}, rows


def test_file_names_may_have_suffixes(goldens, tmp_path, report):
    shutil.copy(
        golden_of(goldens, "teacher_forcing_masks"), tmp_path / "teacher_forcing_masks_7.npz"
    )
    code, rows = report(tmp_path)
    assert code == 0 and {row["status"] for row in rows} == {"pass"}


def test_broken_files_fail_and_the_others_run(goldens, tmp_path, runner, capsys):
    (tmp_path / "dit_bidirectional.npz").write_bytes(b"not an archive")
    np.savez(tmp_path / "vae22.npz", x=np.zeros(3))
    shutil.copy(golden_of(goldens, "teacher_forcing_masks"), tmp_path)
    assert runner.main([str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    status = {(line.split()[0], line.split()[-1]) for line in out.splitlines()[1:]}
    assert status == {
        ("dit_bidirectional.npz", "fail"),
        ("vae22.npz", "fail"),
        ("teacher_forcing_masks.npz", "pass"),
    }
    assert "__meta__" in err and "Traceback" not in err


@pytest.mark.parametrize("name", [".", "missing"])
def test_a_folder_without_goldens_is_an_error(tmp_path, runner, capsys, name):
    assert runner.main([str(tmp_path / name)]) == 2
    out, err = capsys.readouterr()
    assert not out and len(err.splitlines()) == 1
