"""Load an exported folder in a process of its own and answer a question: python -m tests.train.load_elsewhere FOLDER.

A llava-hf folder is read by transformers alone, without anything of mmit; any other by `mmit.load`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def by_transformers(folder: Path) -> str:
    """Greedy answer of LlavaForConditionalGeneration."""
    import PIL.Image
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    picture = PIL.Image.new("RGB", (24, 20), (200, 30, 30))
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What color is it?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=[picture], text=text, return_tensors="pt")
    logits = model(**inputs).logits
    assert torch.isfinite(logits).all() and float(logits.std().detach()) > 0
    ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :])


def by_mmit(folder: Path) -> str:
    """Greedy answer of the loaded checkpoint."""
    import PIL.Image
    import yaml

    import mmit
    from mmit.records import Image, Record, Text, Turn

    asked: tuple[Image | Text, ...] = (Image(PIL.Image.new("RGB", (24, 20), (200, 30, 30))),)
    if yaml.safe_load((folder / "config.yaml").read_text())["model"]["chat"]["format"] != "plain":  # which takes none
        asked += (Text("What color is it?"),)
    record = Record((Turn("user", asked), Turn("assistant", (Text("red"),))))
    return mmit.load(folder, device="cpu").generate([record], max_new_tokens=3)[0]


if __name__ == "__main__":
    place = Path(sys.argv[1])
    foreign = (place / "config.json").exists()
    said = {"by": "transformers" if foreign else "mmit", "answer": (by_transformers if foreign else by_mmit)(place)}
    sys.stdout.write(json.dumps(said) + "\n")
    assert not foreign or not any(name.split(".")[0] == "mmit" for name in sys.modules)
