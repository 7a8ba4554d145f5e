"""A `.gguf` file read once gives what transformers gives when it reads it again and again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from mmit.models.gguf_once import read_once
from mmit.models.llm import load_llm, load_tokenizer
from mmit.models.vlm import VLM
from tests.data.small_tokenizers import byte_level
from tests.interop.test_gguf import llama, written

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
SENTENCE = "One <|im_end|> café, 🙂 twice."


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = byte_level()
    torch.manual_seed(0)  # how far 8 bits move a logit depends on the weights
    made = load_llm("", random_init=llama(tokenizer), dtype=torch.float32)
    vlm, folder = VLM(made, vision=None, projector=None), tmp_path_factory.mktemp("gguf") / "out"
    found, _ = written(folder, vlm, tokenizer, dtype="q8_0", name="m")
    return found.files[0]


def again(file: Path) -> tuple[Any, Any, Any]:
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    config = AutoConfig.from_pretrained(**source)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    bits = GgufConfig(dequantize=True)
    return config, tokenizer, AutoModelForCausalLM.from_pretrained(**source, quantization_config=bits, dtype="float32")


def test_it_gives_the_same(file: Path) -> None:
    config, tokenizer, model = again(file)
    ours = load_llm(str(file), dtype=torch.float32)
    state = ours.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], weight) for name, weight in model.state_dict().items())
    words = load_tokenizer(str(file))
    assert words.get_vocab() == tokenizer.get_vocab() and words(SENTENCE) == tokenizer(SENTENCE)
    assert words.chat_template == tokenizer.chat_template and words.eos_token_id == tokenizer.eos_token_id
    with read_once():
        assert AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name).to_dict() == config.to_dict()


def test_entries_are_read_once_and_a_changed_file_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import modeling_gguf_pytorch_utils as legacy

    load, reads = legacy.load_gguf_checkpoint, []
    monkeypatch.setattr(legacy, "load_gguf_checkpoint", lambda *a, **k: reads.append(a) or load(*a, **k))
    own = (gguf.GGUFReader, gguf.get_tensor_name_map, legacy.load_gguf_checkpoint)
    for _ in range(2):
        with read_once():
            legacy.load_gguf_checkpoint(str(file))[
                "config"
            ].clear()  # what one caller changes, the next one does not get
            assert AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name).num_hidden_layers == 2
        assert (gguf.GGUFReader, gguf.get_tensor_name_map, legacy.load_gguf_checkpoint) == own
    assert len(reads) == 1
    file.touch()
    with read_once():
        legacy.load_gguf_checkpoint(str(file))
    assert len(reads) == 2


def test_threads_and_callers_within_each_other_take_turns(file: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def vocabulary(_: int) -> int:
        with read_once(), read_once():
            return len(AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name))

    own = (gguf.GGUFReader, gguf.get_tensor_name_map)
    with ThreadPoolExecutor(4) as threads:
        assert len(set(threads.map(vocabulary, range(8)))) == 1
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == own
