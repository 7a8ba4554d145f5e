"""What `load` makes of its arguments; no model is built."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmit import precision
from mmit.errors import ConfigError
from mmit.generate import loading
from mmit.generate.loading import _adapt, load
from mmit.train.checkpoint import model as checkpoint


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Arguments of `load_model`, and of the Model that is made of what it gives."""
    calls: list[Any] = []

    def load_model(path: Path, **given: Any) -> Any:
        calls.append(given)
        chat = SimpleNamespace(with_template_args=lambda args: ("chat", dict(args)))
        return SimpleNamespace(
            vlm="vlm", tokenizer="tokens", chat=chat, image={"mode": "pad"}, folder=path, meta={"step": 3}, notes=["n"]
        )

    monkeypatch.setattr(checkpoint, "load_model", load_model)
    monkeypatch.setattr(loading, "Model", lambda *given, **facts: calls.append((given, facts)))
    return calls


def test_a_checkpoint_is_loaded_as_fast_as_it_can_be_unless_a_format_is_named(tmp_path: Path, asked: list[Any]) -> None:
    load(tmp_path, template_args={"a": 1})
    given, ((vlm, tokens, chat), facts) = asked
    assert given["dtype"] == "fast" and given["device"] == "auto" and not given["untuned"] and not given["allow_code"]
    assert (vlm, tokens, chat) == ("vlm", "tokens", ("chat", {"a": 1}))
    assert facts == {"image": {"mode": "pad"}, "folder": tmp_path, "meta": {"step": 3}, "notes": ["n"]}
    load(tmp_path, dtype="fp32", device="cpu", untuned=True, allow_code=True)
    assert (asked[2]["dtype"], asked[2]["device"], asked[2]["untuned"]) == (torch.float32, "cpu", True)
    load(tmp_path, device_map="auto", offload_folder="there")
    large = asked[4]["large"]
    assert (large.device_map, large.offload, large.bits) == ("auto", "there", None)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"dtype": "fp61"}, "unknown dtype 'fp61'"),
        ({"devise": "cpu"}, r"unknown option 'devise'\ndid you mean 'device'"),
        ({"alow_code": True}, r"unknown option 'alow_code'\ndid you mean 'allow_code'"),
        ({"chat": "vicuna_v1"}, "chat is for folders of other projects"),
        ({"tower": "eye"}, "tower is for folders of other projects"),
    ],
)
def test_what_a_checkpoint_cannot_be_given_is_refused_before_it_is_read(
    tmp_path: Path, asked: list[Any], given: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        load(tmp_path, **given)
    assert asked == []


def test_a_slow_format_is_warned_of_where_load_is_called(
    tmp_path: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "warning", lambda place, name: f"{name} is slow on {place}")
    with pytest.warns(UserWarning, match="bf16 is slow on cpu") as caught:
        load(tmp_path, dtype="bf16", device="cpu")
    assert caught[0].filename == __file__ and asked[0]["dtype"] == torch.bfloat16
    load(tmp_path, dtype="fp32", device="cpu")  # fp32 is never warned of
    assert len(caught) == 1


def test_weights_of_another_project_become_float32_only_where_that_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    turned: list[str] = []
    place = torch.device("cpu")

    def found(dtype: torch.dtype) -> Any:
        return SimpleNamespace(dtype=dtype, vlm=SimpleNamespace(float=lambda: turned.append(str(dtype))))

    monkeypatch.setattr(precision, "fast_half", lambda place, name: (name == "fp16", "measured"))
    assert _adapt(found(torch.bfloat16), place) == ["stored in bf16, loaded in fp32: measured"]
    assert _adapt(found(torch.float16), place) == _adapt(found(torch.float32), place) == []
    assert turned == ["torch.bfloat16"]
