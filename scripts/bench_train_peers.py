"""The peers of bench_train.py: TRL's SFTTrainer and a plain transformers Trainer with a LLaVA collator.

Both are stepped as their own `train()` steps them: the trainer's collator, `training_step`, gradient clipping and
optimizer, with the number of supervised tokens handed in. Packages that are missing raise ImportError.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from bench_train_arms import BATCH, LAYERS, LR, RANK, Arm, Case, start_alike

ADAPTED = rf".*language_model\.layers\.\d+\..*\.({'|'.join(LAYERS)})"


def _model(case: Case, *, bf16: bool) -> tuple[Any, Any]:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    dtype = torch.bfloat16 if bf16 else torch.float32
    loader: Any = LlavaForConditionalGeneration
    model = loader.from_pretrained(case.weights, dtype=dtype, trust_remote_code=False)
    return model, AutoProcessor.from_pretrained(case.weights, backend="pil", trust_remote_code=False)


def _lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=ADAPTED,
        modules_to_save=["multi_modal_projector"],
        task_type="CAUSAL_LM",
    )


def _arguments(folder: Path, *, bf16: bool, checkpointing: bool) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH,
        "learning_rate": LR,
        "bf16": bf16,
        "gradient_checkpointing": checkpointing,
        "use_cpu": not torch.cuda.is_available(),
        "report_to": "none",
        "disable_tqdm": True,
        "optim": "adamw_torch_fused",
    }


def _driven(trainer: Any, examples: Any, case: Case, *, checkpointing: bool) -> Arm:
    start_alike(trainer.model, case.adapter)
    if checkpointing:
        trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trainer.create_optimizer()
    trainer.model.train()
    model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.model_wrapped = model

    def batch(i: int) -> tuple[Any, int]:
        chosen = [dict(examples[j]) for j in range(i * BATCH, (i + 1) * BATCH)]  # collators write into them
        inputs = trainer.data_collator(chosen)
        return inputs, int((inputs["labels"][:, 1:] != -100).sum())

    def step(i: int) -> float:
        inputs, targets = batch(i)
        loss = trainer.training_step(model, inputs, torch.tensor(targets))
        trainer.accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.zero_grad()
        return float(loss)

    @torch.no_grad()
    def loss(i: int) -> tuple[float, int, int]:
        inputs, targets = batch(i)
        size = inputs["input_ids"].numel()
        return float(trainer.compute_loss(model, inputs, num_items_in_batch=torch.tensor(targets))), targets, size

    return Arm(trainer.model, lambda: trainer.optimizer, step, loss)


def trl_arm(case: Case, *, bf16: bool = True, checkpointing: bool) -> Arm:
    """TRL's SFTTrainer with its own collator; images cannot be packed there."""
    from datasets import Dataset, Features, Image, Value
    from trl import SFTConfig, SFTTrainer

    model, processor = _model(case, bf16=bf16)
    rows = [
        {
            "images": [s["image"]],
            "prompt": [{"role": "user", "content": s["question"]}],
            "completion": [{"role": "assistant", "content": s["answer"]}],
        }
        for s in case.samples
    ]
    talk = [{"role": Value("string"), "content": Value("string")}]
    kinds = Features({"images": [Image()], "prompt": talk, "completion": talk})
    data = Dataset.from_list(rows, features=kinds)
    arguments = _arguments(case.weights.parent / "trl", bf16=bf16, checkpointing=checkpointing)
    trainer = SFTTrainer(
        model,
        args=SFTConfig(**arguments),
        train_dataset=data,
        processing_class=processor,
        peft_config=_lora(),
    )
    return _driven(trainer, data, case, checkpointing=checkpointing)


def trainer_arm(case: Case, *, bf16: bool = True, checkpointing: bool = False) -> Arm:
    """transformers' Trainer; the collator pads, opens pictures, and masks all but answers."""
    from peft import get_peft_model
    from PIL import Image
    from transformers import Trainer, TrainingArguments

    model, processor = _model(case, bf16=bf16)
    processor.tokenizer.padding_side = "right"

    def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
        talks = [
            [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": e["question"]}]},
                {"role": "assistant", "content": [{"type": "text", "text": e["answer"]}]},
            ]
            for e in examples
        ]
        texts = processor.apply_chat_template(talks, tokenize=False)
        batch = processor(
            images=[Image.open(e["image"]).convert("RGB") for e in examples],
            text=texts,
            padding=True,
            return_tensors="pt",
            add_special_tokens=False,
        )
        labels = torch.full_like(batch["input_ids"], -100)
        for row, example in enumerate(examples):
            answer = processor.tokenizer(example["answer"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
            end = int(batch["attention_mask"][row].sum())
            labels[row, end - len(answer) : end] = torch.tensor(answer)
        return {**batch, "labels": labels}

    trainer = Trainer(
        get_peft_model(model, _lora()),
        TrainingArguments(
            **_arguments(case.weights.parent / "trainer", bf16=bf16, checkpointing=checkpointing),
            remove_unused_columns=False,
        ),
        data_collator=collate,
        train_dataset=case.samples,  # type: ignore[arg-type]
    )
    return _driven(trainer, case.samples, case, checkpointing=checkpointing)
