"""How processes say where the others are."""

import os

import jax
import pytest

from longlive_jax.cli.app import run
from longlive_jax.parallel.hosts import Hosts, leave_at_once
from longlive_jax.spec import Failure, UserError


def test_hosts_are_found_by_the_manager_or_by_address():
    assert Hosts.parse("auto") == Hosts()
    assert Hosts.parse("10.0.0.1:8476,4,3") == Hosts("10.0.0.1:8476", 4, 3)


@pytest.mark.parametrize(
    "text", ["", "10.0.0.1", "10.0.0.1:8476", "h:1,2,2", "h:99999,2,0", "h:1,x,0", "h:1,2,0,1"]
)
def test_anything_else_is_said(text, capsys):
    with pytest.raises(ValueError, match=r"HOST:PORT,PROCESSES,INDEX"):
        Hosts.parse(text)
    command = ["train", "--config=configs/small_world.py:ar", "--workdir=w", "--out=o"]
    assert run([*command, f"--hosts={text}"]) == 2
    assert "--hosts" in capsys.readouterr().err


def test_alone_an_error_stays_an_error():
    with pytest.raises(KeyError):
        leave_at_once(lambda: {}["missing"])
    assert leave_at_once(lambda: 3) == 3


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("no such thing"), 2, "longlive: no such thing\n"),
        (Failure("the disk is full"), 1, "longlive: the disk is full\n"),
        (KeyboardInterrupt(), 130, "longlive: interrupted\n"),
        (KeyError("missing"), 1, "process 0 of 2 failed:\nTraceback"),
    ],
)
def test_one_of_several_says_why_and_waits_for_nobody(error, code, said, monkeypatch, capfd):
    def leave(number):
        raise SystemExit(number)

    def fail():
        raise error

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit) as left:
        leave_at_once(fail)
    assert left.value.code == code and capfd.readouterr().err.startswith(said)
