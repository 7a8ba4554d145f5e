"""Modules that are shown one record at a time: in a packed row each record is what it is alone, exactly."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mmit.errors import ModelError
from mmit.models.per_record import length_types, mixers, rotary_limit, run_per_record, turning_point
from mmit.models.row_state import MIXER, RowState, running

# Two records that share nodes 0, one that stands alone: (first token, length, parent).
NODES = [[0, 3, -1], [3, 2, 0], [5, 4, 0], [9, 5, -1]]
PATHS = [[0, 1, 2, 3, 4], [0, 1, 2, 5, 6, 7, 8], [9, 10, 11, 12, 13]]
T = 14


class Mixer(nn.Module):
    """A causal convolution and a running sum, as a state space has them; gives its state beside its output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, kernel_size=3, padding=2, groups=4)

    def forward(
        self, x: torch.Tensor, attention_mask: torch.Tensor | None = None, scale: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert attention_mask is None, "a mask of the whole row reached a record"
        mixed = self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        out = mixed.cumsum(1) * scale
        return out, out[:, -1]


class Model(nn.Module):
    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer, self.plain = mixer, nn.Linear(4, 4)
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(layer_types=None))


def row() -> RowState:
    return RowState(NODES, None, torch.device("cpu"))


def pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    theirs = Mixer()
    ours = copy.deepcopy(theirs)
    run_per_record(Model(ours))
    return theirs, ours


def test_each_record_of_a_row_is_what_it_is_alone() -> None:
    theirs, ours = pair()
    x = torch.randn(1, T, 4)
    state = row()
    with running(state):
        out, states = ours(x, attention_mask=torch.ones(1, T), scale=0.5)
    assert out.shape == (1, T, 4) and states is None and state.calls == [MIXER]
    for path in PATHS:
        alone, _ = theirs(x[:, path], scale=0.5)
        assert torch.allclose(out[:, path], alone, atol=1e-6)


def test_gradients_of_a_row_are_those_of_its_records() -> None:
    """What two records share is computed for both, and its own loss counts once."""
    theirs, ours = pair()
    x = torch.randn(1, T, 4)
    with running(row()):
        ours(x)[0].square().sum().backward()
    owned = [PATHS[0], PATHS[1][3:], PATHS[2]]  # each token of the row once
    for path, own in zip(PATHS, owned, strict=True):
        theirs(x[:, path])[0][:, len(path) - len(own) :].square().sum().backward()
    assert torch.allclose(ours.conv.weight.grad, theirs.conv.weight.grad, atol=1e-4)


def test_outside_a_row_nothing_changes_and_weights_keep_their_names() -> None:
    theirs, ours = pair()
    x = torch.randn(2, 6, 4)
    assert all(torch.equal(a, b) for a, b in zip(ours(x), theirs(x), strict=True))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert isinstance(ours, Mixer) and type(ours).__name__ == "Mixer"


def test_a_module_is_changed_once_and_only_where_it_mixes() -> None:
    model = Model(Mixer())
    model.again = model.mixer
    run_per_record(model)
    kind = type(model.mixer)
    run_per_record(model)
    assert type(model.mixer) is kind and kind.__mro__[1] is Mixer
    assert type(model.plain) is nn.Linear
    assert [name for name, _ in mixers(model)] == ["mixer"]


def test_a_layer_that_the_config_calls_linear_is_a_mixer() -> None:
    model = Model(nn.Identity())
    model.layers = nn.ModuleList()
    for number in range(2):
        layer, part = nn.Module(), nn.Linear(4, 4)
        layer.layer_idx, part.layer_idx, layer.part = number, number, part
        model.layers.append(layer)
    kinds = ["full_attention", "linear_attention"]
    model.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(layer_types=kinds))
    # The innermost module with the number: the layer around it holds an MLP too.
    assert [name for name, _ in mixers(model)] == ["layers.1.part"]


def rotary(kind: str) -> LlamaRotaryEmbedding:
    more = {"short_factor": [1.0] * 2, "long_factor": [4.0] * 2} if kind == "longrope" else {}
    parameters = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0, **more}
    if kind == "longrope":
        parameters["original_max_position_embeddings"] = 6
    return LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=8, num_attention_heads=2, head_dim=4, max_position_embeddings=6, rope_parameters=parameters
        )
    )


def positions(nodes: list[list[int]]) -> torch.Tensor:
    starts: list[int] = []
    out: list[int] = []
    for _, length, parent in nodes:
        starts.append(0 if parent < 0 else starts[parent] + nodes[parent][1])
        out += range(starts[-1], starts[-1] + length)
    return torch.tensor([out])


@pytest.mark.parametrize("nodes", [[[0, 5, -1], [5, 9, -1], [14, 7, -1]], [[0, 9, -1], [9, 7, -1]]])
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_factors_are_those_of_each_record_s_length(kind: str, nodes: list[list[int]]) -> None:
    ours = Model(rotary(kind))
    run_per_record(ours)
    places = positions(nodes)
    x = torch.zeros(1, places.shape[1], 8)
    for _ in range(2):  # transformers' own goes on with the longest sequence it has seen
        with running(RowState(nodes, None, torch.device("cpu"))):
            cos, sin = ours.mixer(x, places)
    for start, length, _ in nodes:
        own = slice(start, start + length)
        alone_cos, alone_sin = rotary(kind)(x[:, own], places[:, own])
        assert torch.allclose(cos[:, own], alone_cos) and torch.allclose(sin[:, own], alone_sin)


def test_records_on_both_sides_of_the_turning_point_cannot_share_their_beginning() -> None:
    ours = Model(rotary("longrope"))
    run_per_record(ours)
    nodes = [[0, 4, -1], [4, 1, 0], [5, 5, 0]]  # 5 and 9 tokens, the limit is 6
    with running(RowState(nodes, None, torch.device("cpu"))), pytest.raises(ModelError, match="both sides of 6") as e:
        ours.mixer(torch.zeros(1, 10, 8), positions(nodes))
    assert "data.share_prefix=false" in (e.value.remedy or "")


def test_limits_are_read_from_the_rotary_embedding() -> None:
    assert length_types(rotary("default")) == set() and rotary_limit(Model(rotary("default"))) is None
    for kind, turn in (("dynamic", None), ("longrope", 6)):
        model = Model(rotary(kind))
        assert length_types(model.mixer) == {kind}
        assert rotary_limit(model) == 6 and turning_point(model) == turn
