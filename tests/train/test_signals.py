"""A signal is a request once, an order the second time, and breaks off only what can be dropped."""

from __future__ import annotations

import os
import signal

import pytest

from mmit.train import signals
from mmit.train.signals import EXIT_STOPPED, Stop, StopNow, stop_asked


def send(signum: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), signum)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_told_once_and_the_handlers_come_back(signum: int) -> None:
    before, said = signal.getsignal(signum), []
    with stop_asked(said.append) as stop:
        assert not stop() and not said
        send(signum)
        assert stop() and stop()
    assert len(said) == 1 and signal.Signals(signum).name in said[0] and str(EXIT_STOPPED) in said[0]
    assert signal.getsignal(signum) is before


def test_what_a_launcher_passes_on_is_the_same_wish() -> None:
    with stop_asked(lambda text: None) as stop:
        send()
        send(signal.SIGINT)  # at once: the group has got it already
        assert stop()


def test_a_later_one_leaves_at_once_with_the_signal_s_own_status(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[tuple[int, int]] = []
    with stop_asked(lambda text: None) as stop:
        stop.handle(signal.SIGTERM, None)
        monkeypatch.setattr(signals, "ECHO_SECONDS", -1.0)
        monkeypatch.setattr(signals.os, "kill", lambda pid, signum: killed.append((pid, signum)))
        stop.handle(signal.SIGTERM, None)
        assert killed == [(os.getpid(), signal.SIGTERM)] and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_helper_that_was_forked_does_not_answer_for_the_run() -> None:
    with stop_asked(lambda text: None):
        child = os.fork()
        if not child:
            send()
            os._exit(0)  # not reached: the signal ends it
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM


def test_only_what_can_be_dropped_is_broken_off() -> None:
    stop = Stop(lambda text: None)
    with pytest.raises(StopNow), stop.leaving():
        stop.handle(signal.SIGTERM, None)
    with pytest.raises(StopNow), stop.leaving():
        raise AssertionError("a signal that came before the block must keep it from beginning")
    other = Stop(lambda text: None)
    with other.leaving():
        pass
    other.handle(signal.SIGTERM, None)  # between two of them nothing is broken off
    assert other() and not isinstance(StopNow(), Exception)
