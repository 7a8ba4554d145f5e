"""vLLM's own classes read an exported llava-hf folder, and compute what mmit computes.

Needs vLLM (`pip install vllm`, 0.33), no GPU: its processor expands the prompt, its loader fills its modules, and its
tower, projector and LLM run by the PyTorch code that vLLM keeps beside each of its kernels. Its wheel has no kernels
for a CPU, so its attention over a paged cache is replaced by torch's, and neither its scheduler nor its server runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

import mmit
from mmit.interop.export import Companions, export_llava_hf
from tests.interop.llava_models import SIDE, make_llava_hf

pytestmark = pytest.mark.long
QUESTIONS = ["What is it?", "Which colour is it?", "Hello"]
TOKENS = 8


def part(name: str) -> Any:
    return import_module(f"vllm.{name}")


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("VLLM_NO_USAGE_STATS", "HF_HUB_OFFLINE"):
            patch.setenv(name, "1")
        patch.setenv("VLLM_TARGET_DEVICE", "cpu")
        pytest.importorskip("vllm", reason="vLLM is not installed")
        # What its classes look up when they are made; none of it is called.
        kernels = torch.library.Library("_C", "FRAGMENT")
        if not hasattr(torch.ops._C, "gelu_quick"):
            kernels.define("gelu_quick(Tensor! out, Tensor input) -> ()")
        kernel = part("model_executor.custom_op").CustomOp
        patch.setattr(kernel, "dispatch_forward", lambda op, *_, **__: op.forward_native)
        patch.setattr(part("model_executor.layers.attention.attention").Attention, "forward", attention)
        place = tmp_path_factory.mktemp("group") / "init"
        distributed = part("distributed")
        config = part("config")
        with config.set_current_vllm_config(config.VllmConfig()):
            distributed.init_distributed_environment(1, 0, f"file://{place}", 0, backend="gloo")
            distributed.initialize_model_parallel(1, 1)
        yield
        part("distributed.parallel_state").cleanup_dist_env_and_memory()


def attention(layer: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> torch.Tensor:
    """Causal attention of one sequence, all of it at once: (tokens, heads * size)."""
    heads = (layer.num_heads, layer.num_kv_heads, layer.num_kv_heads)
    split = [x.view(1, len(x), n, -1).transpose(1, 2) for x, n in zip((query, key, value), heads, strict=True)]
    found = torch.nn.functional.scaled_dot_product_attention(*split, is_causal=True, enable_gqa=True)
    return found.transpose(1, 2).reshape(len(query), -1)


def loaded(folder: Path) -> tuple[Callable[[str, Any], Any], Callable[[Any, list[int]], torch.Tensor]]:
    """vLLM's processor, and a function that gives its model's logits (vocabulary) of the next token."""
    options = {"dtype": "float32", "enforce_eager": True, "load_format": "safetensors", "max_model_len": 256}
    config = part("engine.arg_utils").EngineArgs(model=str(folder), **options).create_engine_config()
    with part("config").set_current_vllm_config(config):
        model = part("model_executor.model_loader").get_model(vllm_config=config)
    registry = part("multimodal").MULTIMODAL_REGISTRY
    processor = registry.create_processor(config.model_config)

    def process(prompt: str, picture: Any) -> Any:
        return processor(prompt, processor.info.parse_mm_data({"image": picture} if picture else {}))

    @torch.inference_mode()
    def logits(made: Any, answer: list[int]) -> torch.Tensor:
        ids = torch.tensor([*made["prompt_token_ids"], *answer])
        seen, mask = [], torch.zeros(len(ids), dtype=torch.bool)
        with (
            part("config").set_current_vllm_config(config),
            part("forward_context").set_forward_context(None, config),
        ):
            pictures = (made[name].get("image", []) for name in ("mm_kwargs", "mm_placeholders"))
            for item, span in zip(*pictures, strict=True):
                pixels = {name: field.data[None] for name, field in item.items()}
                seen += list(model.embed_multimodal(**pixels))
                mask[span.offset : span.offset + span.length] = True
            inputs = model.embed_input_ids(ids, seen, is_multimodal=mask) if seen else model.embed_input_ids(ids)
            hidden = model.forward(None, torch.arange(len(ids)), inputs_embeds=inputs)
            return model.compute_logits(hidden[-1:])[0]

    return process, logits


@pytest.mark.parametrize("tiled", [False, True], ids=["llava", "llava-next"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_its_answers_are_those_of_mmit(vllm: None, tmp_path: Path, tower: str, tiled: bool) -> None:
    make_llava_hf(tmp_path / "in", tower=tower, tokens="llama", tiled=tiled)
    model = mmit.load(tmp_path / "in", device="cpu")
    out = tmp_path / "out"
    out.mkdir()
    export_llava_hf(out, model.vlm, Companions(model.tokenizer, model.chat_format, model.image, model.end_ids))
    process, logits = loaded(out)  # refuses a folder that leaves a parameter unfilled, or fills one it has not
    template = import_module("transformers").AutoProcessor.from_pretrained(out)
    answers = set()
    for number, question in enumerate(QUESTIONS * 2):
        draw = torch.Generator().manual_seed(number)
        noise = torch.randint(0, 256, (SIDE, SIDE, 3), dtype=torch.uint8, generator=draw)
        picture = None if question == "Hello" else PIL.Image.fromarray(noise.numpy())
        shown = [{"type": "image"}] if picture else []
        messages = [{"role": "user", "content": [*shown, {"type": "text", "text": question}]}]
        made = process(template.apply_chat_template(messages, add_generation_prompt=True), picture)
        answer: list[int] = []
        while len(answer) < TOKENS:
            token = int(logits(made, answer).argmax())
            if token in model.end_ids:
                break
            answer.append(token)
        told = model.tokenizer.decode(answer, skip_special_tokens=True).strip()
        assert told == model.chat(picture, question, max_new_tokens=TOKENS, temperature=0)
        answers.add(told)
    assert len(answers) >= 4, "pictures and questions make a difference"
