"""Signals are recorded, and the handlers before are restored."""

import signal
import threading

from longlive_jax.io.signals import StopSignals


class Calls(StopSignals):
    def __init__(self):
        super().__init__()
        self.calls = []

    def received(self, number, *, is_first):
        self.calls.append((number, is_first))


def test_the_first_signal_counts_and_every_one_is_passed_on():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Calls() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert stop.signal == signal.SIGTERM
    assert stop.calls == [(signal.SIGTERM, True), (signal.SIGINT, False)]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_other_threads_catch_no_signals():
    handlers = []

    def enter():
        with StopSignals():
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGTERM)]
