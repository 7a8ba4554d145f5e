"""Words of a body that scales only what it looks up: ids and given embeddings are one and the same after it."""

from __future__ import annotations

import torch
from torch import nn

from mmit.models.llm import load_llm
from mmit.models.words import ScaledWords, lookup_factor, scale_words
from tests.models.small_llms import family


class Plain(nn.Module):
    """Scales what it is given, however it came by it: nothing is to be done."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.factor = nn.Embedding(5, 4), 3.0

    def forward(self, input_ids: torch.Tensor | None = None, embeddings: torch.Tensor | None = None) -> torch.Tensor:
        if embeddings is None:
            embeddings = self.words(input_ids)
        return embeddings * self.factor


class Looking(Plain):
    """Scales its own look-up alone, as Falcon-H1 does."""

    def forward(self, input_ids: torch.Tensor | None = None, embeddings: torch.Tensor | None = None) -> torch.Tensor:
        return self.words(input_ids) * self.factor if embeddings is None else embeddings


class Model(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.base_model = body

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.words


IDS = torch.tensor([[0, 4, 2]])


def test_the_factor_moves_from_the_body_into_the_table() -> None:
    model = Model(Looking())
    before, names = model.base_model(IDS), list(model.state_dict())
    assert lookup_factor(Looking) == "factor"
    scale_words(model)
    words = model.get_input_embeddings()
    assert isinstance(words, ScaledWords) and words.embed_scale == 3 and model.base_model.factor == 1
    torch.testing.assert_close(model.base_model(IDS), before)
    torch.testing.assert_close(model.base_model(None, words(IDS)), before)
    assert list(model.state_dict()) == names
    scale_words(model)  # a second time changes nothing
    torch.testing.assert_close(model.base_model(IDS), before)


def test_a_body_that_scales_all_it_is_given_is_left_alone() -> None:
    model = Model(Plain())
    scale_words(model)
    assert lookup_factor(Plain) is None and type(model.get_input_embeddings()) is nn.Embedding
    assert model.base_model.factor == 3


def test_the_family_that_needs_it_has_it() -> None:
    llm = load_llm("tiny", random_init=family("falcon_h1"), dtype=torch.float32, empty=True)
    assert isinstance(llm.get_input_embeddings(), ScaledWords)
    plain = load_llm("tiny", random_init=family("llama"), dtype=torch.float32, empty=True)
    assert type(plain.get_input_embeddings()) is nn.Embedding
