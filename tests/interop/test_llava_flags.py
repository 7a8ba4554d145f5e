"""LLaVA's command lines become configs that mmit accepts."""

from __future__ import annotations

from typing import Any

import pytest

from mmit.config import Config
from mmit.errors import ConfigError
from mmit.interop.llava_flags import config_from_flags

# As in LLaVA's scripts/v1_5/finetune_lora.sh and pretrain.sh.
COMMON = (
    "--deepspeed ./scripts/zero3.json --model_name_or_path lmsys/vicuna-7b-v1.5 "
    "--data_path data.json --image_folder images --vision_tower openai/clip-vit-large-patch14-336 "
    "--mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 --mm_use_im_start_end False "
    "--mm_use_im_patch_token False --bf16 True --output_dir out --num_train_epochs 1 "
    "--per_device_train_batch_size 16 --gradient_accumulation_steps 2 --save_strategy steps --save_steps 50000 "
    "--save_total_limit 1 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1 "
    "--tf32 True --model_max_length 2048 --gradient_checkpointing True --dataloader_num_workers 4 "
    "--lazy_preprocess True --report_to wandb "
)
LORA = COMMON + (
    "--lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 --version v1 "
    "--image_aspect_ratio pad --group_by_modality_length True --learning_rate 2e-4"
)
PRETRAIN = COMMON + "--tune_mm_mlp_adapter True --version plain --learning_rate 1e-3"


def config(text: str, **options: Any) -> Config:
    return Config.from_dict(config_from_flags(text.split(), **options)[0])


def test_lora_stage() -> None:
    found = config(LORA, ranks=8)
    assert found.tune.llm.mode == "lora" and found.tune.llm.lr == 2e-4
    assert found.tune.llm.options == {"r": 128, "alpha": 256, "dropout": 0.05}
    assert found.tune.projector.lr == 2e-5 and found.tune.vision.mode == "frozen"
    assert found.train.rows_per_step == 16 * 2 * 8 and not found.data.packing
    assert found.data.group and not config(PRETRAIN).data.group
    assert found.model.vision is not None
    assert (found.model.vision.fit, found.model.vision.layer) == ("pad", -2)
    assert found.model.chat.format == "vicuna_v1"
    assert found.model.projector.options == {"depth": 2}
    assert found.train.warmup == 0.03 and found.train.precision == "bf16" and found.train.keep_last == 1


def test_first_stage() -> None:
    found = config(PRETRAIN)
    assert found.tune.llm.mode == "frozen" and found.tune.projector.lr == 1e-3
    assert found.model.chat.format == "plain"
    assert found.model.vision is not None and found.model.vision.fit == "crop"


def test_flags_without_effect_are_told() -> None:
    _, notes = config_from_flags([*LORA.split(), "--lazy_preprocess", "True"])
    assert any("--deepspeed" in note for note in notes) and any("--lazy_preprocess" in note for note in notes)
    assert not any("--group_by_modality_length" in note for note in notes)


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        ("--lora_rr 4", "unknown flag --lora_rr"),
        ("--pretrain_mm_mlp_adapter mm_projector.bin", "cannot be honoured"),
        ("--image_aspect_ratio anyres", "cannot be honoured"),
        ("--bits 8", "cannot be honoured"),
        ("--mm_use_im_patch_token True", "cannot be honoured"),
        ("--num_train_epochs many", "invalid float value"),
        ("--bf16 maybe", "neither True nor False"),
    ],
)
def test_what_cannot_be_honoured_is_an_error(extra: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        config_from_flags(f"{LORA} {extra}".split())
