"""Training curves of several runs in one figure."""

import json

from longlive_jax.cli.app import run
from longlive_jax.io.pictures import read_image


def test_several_runs_are_plotted_together(tmp_path, capsys):
    for name, losses in (("a", [3.0, 2.0]), ("b", [3.0, 1.0])):
        folder = tmp_path / name
        folder.mkdir()
        rows = [{"step": i, "loss": x} for i, x in enumerate(losses)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "pictures" / "both.png"
    assert run(["curves", f"first={tmp_path / 'a'}", str(tmp_path / "b"), f"--out={out}"]) == 0
    assert str(out) in capsys.readouterr().out
    assert read_image(str(out), (64, 64)).std() > 0.01


def test_a_directory_without_metrics_is_reported(tmp_path, capsys):
    assert run(["curves", str(tmp_path)]) == 2
    assert "no metrics.jsonl" in capsys.readouterr().err
