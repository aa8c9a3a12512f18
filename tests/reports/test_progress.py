# SPDX-License-Identifier: Apache-2.0
"""Signals: the first is a flag, the second an end, and neither tears what is saved."""

import logging
import os
import pty
import re
import signal
import subprocess
import sys

import pytest

from ospec_jax.reports import progress
from ospec_jax.reports.progress import Interrupt, Interrupted


def test_the_second_signal_ends_but_not_while_something_is_held():
    with Interrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        with interrupt.held():
            signal.raise_signal(signal.SIGINT)
        assert interrupt
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_what_was_cut_short_tells_the_signal(name):
    number = signal.Signals[name]
    before = signal.getsignal(number)
    with Interrupt() as interrupt:
        interrupt.raise_if_set()  # there was none
        signal.raise_signal(number)
    with pytest.raises(Interrupted, match=name) as caught:
        interrupt.raise_if_set()
    assert caught.value.exit_code == 128 + number
    assert signal.getsignal(number) == before


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            signal.raise_signal(signal.SIGHUP)
            assert not interrupt
    finally:
        signal.signal(signal.SIGHUP, before)


_IN_A_TERMINAL = """
import sys
from pathlib import Path
from ospec_jax.reports.progress import Interrupt

with Interrupt() as interrupt:
    Path(sys.argv[1]).touch()
    while not interrupt:
        pass
    print("to nobody", file=sys.stderr, flush=True)
    Path(sys.argv[2]).touch()
"""


def test_output_to_a_terminal_that_is_gone_does_not_keep_from_saving(tmp_path):
    ours, theirs = pty.openpty()
    ready, saved = tmp_path / "ready", tmp_path / "saved"
    command = [sys.executable, "-c", _IN_A_TERMINAL, str(ready), str(saved)]
    process = subprocess.Popen(command, stderr=theirs, stdout=theirs)
    os.close(theirs)
    try:
        while not ready.exists():
            assert process.poll() is None
        os.close(ours)
        process.send_signal(signal.SIGHUP)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
    assert saved.exists()


def test_grace_is_over_at_once_or_later():
    for grace, is_over in ((0.0, True), (3600.0, False)):
        with Interrupt(grace) as interrupt:
            assert not interrupt.is_over()
            signal.raise_signal(signal.SIGTERM)
            assert interrupt.is_over() == is_over


def test_an_outer_one_knows_what_an_inner_one_caught():
    with Interrupt() as outer:
        with Interrupt() as inner:
            signal.raise_signal(signal.SIGTERM)
            assert inner
        assert outer.number == signal.SIGTERM
    with Interrupt() as outer, Interrupt():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_what_takes_its_time_says_so(capsys):
    log = logging.getLogger("ospec_jax.models.hub")
    log.info("before")
    with progress.told():
        log.info("loading [bold] a model")
    log.info("after")
    assert re.fullmatch(
        r"  0\.\d s  loading \[bold\] a model\n", capsys.readouterr().err
    )
