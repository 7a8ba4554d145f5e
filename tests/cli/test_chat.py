"""`mmit chat`: one prompt, and a conversation."""

from __future__ import annotations

from tests.cli.commands import good


def test_chat_answers_one_prompt(made):
    picture = made / "data" / "0.png"
    answers = {good("chat", made / "run", "-i", picture, "-p", "What color is it?").stdout for _ in range(2)}
    assert len(answers) == 1 and answers.pop().endswith("\n")


def test_chat_converses(made):
    lines = [f"/image {made / 'data' / '0.png'}", "What color is it?", "Is it red?", "/image nowhere.png", "/hlep"]
    result = good("chat", made / "run", "--max-new-tokens", 3, input="\n".join([*lines, "/reset", "Hello?", "/quit"]))
    assert result.stdout.count("> ") == 8
    assert result.stderr.count("error:") == 1 and "nowhere.png" in result.stderr
    assert "not understood: /hlep" in result.stderr
    good("chat", made / "run", "--max-new-tokens", 3, input="Hello?\n")  # ends with the input
