"""Names of kinds: what help lists is what the code has, and every kind has a test of its own."""

from __future__ import annotations

import pytest

from mmit import kinds
from mmit.config import Config
from mmit.configs import shipped
from mmit.data.chat_builtin import BUILT_IN
from mmit.models.projectors import PROJECTORS
from mmit.models.tuning import MODES
from mmit.models.vision import ENCODERS, FUSED
from mmit.sections import describe

CODE = {
    "model.vision.kind": (kinds.ENCODERS, {*ENCODERS, FUSED}),
    "model.projector.kind": (kinds.PROJECTORS, PROJECTORS.keys()),
    "model.chat.format": (kinds.CHAT_FORMATS, {"hf", *BUILT_IN}),
    "tune.vision.mode": (kinds.TUNING["vision"], MODES["vision"].keys()),
    "tune.projector.mode": (kinds.TUNING["projector"], MODES["projector"].keys()),
    "tune.llm.mode": (kinds.TUNING["llm"], MODES["llm"].keys()),
    "engine.deepspeed": (kinds.ZERO, shipped("deepspeed").keys()),
}


@pytest.mark.parametrize("key", CODE)
def test_help_lists_what_the_code_has(key: str) -> None:
    listed, code = CODE[key]
    assert listed.keys() == set(code)
    said = next(entry.help for entry in describe(Config) if entry.key == key)
    assert kinds.listed(listed) in said
