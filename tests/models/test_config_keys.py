"""Keys of a language model's config: those of the installed classes, and those that published files have besides."""

from __future__ import annotations

import inspect
import json

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig

from mmit.models.config_keys import FORMER_BASE, PUBLISHED_OF, config_keys
from mmit.models.llm import load_llm
from tests.models.published_keys import PUBLISHED
from tests.models.small_llms import FAMILIES, family, model_type


@pytest.mark.parametrize("kind", sorted(PUBLISHED))
def test_every_key_of_published_files_is_taken(kind):
    """And those that no class reads change no shape of a small model."""
    keys = {*PUBLISHED[kind].split(), *FORMER_BASE}
    assert not keys - config_keys(kind)
    name = next((name for name in FAMILIES if model_type(name) == kind), None)
    if name is None:
        return
    small, known = family(name), CONFIG_MAPPING[kind]().to_dict()
    given = dict.fromkeys({*FORMER_BASE, *PUBLISHED_OF.get(kind, ())} - known.keys(), False)
    made, plain = (
        load_llm("tiny", random_init={**more, **small}, dtype=torch.float32, empty=True) for more in (given, {})
    )
    assert {k: v.shape for k, v in made.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}


@pytest.mark.parametrize("kind", sorted(set(map(model_type, FAMILIES))))
def test_every_argument_of_the_installed_classes_is_taken(kind):
    """What a class writes into config.json, and what its constructor names, under the names of old files too."""
    known = CONFIG_MAPPING[kind]
    written = known().to_dict()
    arguments = {p.name for p in inspect.signature(known).parameters.values() if p.kind is not p.VAR_KEYWORD}
    unknown = {*written, *arguments, *known.attribute_map} - config_keys(kind)
    assert not unknown
    small = family(next(name for name in FAMILIES if model_type(name) == kind))
    config = AutoConfig.for_model(**small)
    whole = {**json.loads(config.to_json_string(use_diff=False)), "model_type": kind}
    again = load_llm("tiny", random_init=whole, dtype=torch.float32, empty=True).config
    # LongCat's layers are pairs, which some versions count twice.
    keys = {key for key in small if key not in ("model_type", "num_hidden_layers") and hasattr(config, key)}
    assert {key: getattr(again, key) for key in keys} == {key: getattr(config, key) for key in keys}
