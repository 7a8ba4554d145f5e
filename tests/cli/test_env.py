"""`mmit env`: what is installed, what was not tested, who holds the cores."""

from __future__ import annotations

import re

from tests.cli.commands import good


def test_env_lists_what_is_installed_and_what_is_not(monkeypatch):
    import mmit.cli.env as env

    monkeypatch.setattr(env, "PACKAGES", {"torch": "", "no-such-package": "", "nor-this-one": "extra"})
    text = good("env").stdout
    assert re.search(r"torch +│ \d+\.\d+", text) and "CPU threads" in text
    assert "pip install no-such-package" in text and "mmit-tune[extra]" in text


def test_env_says_what_was_not_tested_and_who_holds_the_cores(monkeypatch):
    import mmit.cli.env as env
    from mmit import cores, versions

    monkeypatch.setattr(versions, "TESTED", {"torch": ("1.0", "1.1"), "python": ("3.10", "3.99")})
    monkeypatch.setattr(env, "PACKAGES", {"torch": "", "peft": ""})
    monkeypatch.setattr(cores.Watch, "others", lambda self: cores.Others(0.7, 2, "a[/b] (pid 7)"))
    text = " ".join(good("env").stdout.replace("│", " ").split())
    assert "outside the tested 1.0 to 1.1" in text and "train.precision auto:" in text
    assert "other processes use 0.7 of 2 cores" in text and "a[/b] (pid 7)" in text
    monkeypatch.setattr(cores.Watch, "others", lambda self: cores.Others(0.2, 2, ""))
    assert "other processes" not in good("env").stdout
