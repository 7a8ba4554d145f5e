"""What a language model's generation_config.json says: which ids end an answer, and how its tokens are drawn.

In: a loaded LLM, or the folder of another project's model. Out: `GenerationFacts`. What mmit does not do with a stated
setting is named in `notes`, never passed over in silence.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import GenerationConfig

from mmit.models.sampling import Sampling

# transformers' own default where a file asks for sampling and says nothing of top_k.
TOP_K = 50
# Settings that change which token is chosen and that mmit does not have; None, these values and 0 mean "off".
NOT_DONE = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "num_beams": 1,
    "penalty_alpha": 0.0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "guidance_scale": 1.0,
}


@dataclass(frozen=True, slots=True)
class GenerationFacts:
    """How a model's authors generate with it.

    Attributes:
        end_ids: ids that end an answer.
        sampling: greedy where the file does not ask for sampling.
        notes: stated settings that mmit does not apply.
    """

    end_ids: tuple[int, ...] = ()
    sampling: Sampling = Sampling()
    notes: tuple[str, ...] = ()

    def told(self) -> str:
        """One line on how tokens are drawn, "" for greedy decoding with nothing left out."""
        parts = []
        if self.sampling.temperature:
            s = self.sampling
            parts.append(f"sampled as generation_config.json says: temperature {s.temperature}, top_p {s.top_p}, ")
            parts[0] += f"top_k {s.top_k}"
        if self.notes:
            parts.append(f"not applied of generation_config.json: {', '.join(self.notes)}")
        return "; ".join(parts)


def generation_facts(llm: Any) -> GenerationFacts:
    """Read the generation config that a language model carries."""
    base = llm.get_base_model() if isinstance(llm, PeftModel) else llm
    config = getattr(base, "generation_config", None)
    if config is None:
        return GenerationFacts()
    # One id, a list of them, or nothing: published files have all three.
    ends = config.eos_token_id
    listed = tuple(ends) if isinstance(ends, (list, tuple)) else () if ends is None else (ends,)
    notes = [
        f"{name} {value}"
        for name, off in NOT_DONE.items()
        if (value := getattr(config, name, None)) not in (None, off, [], 0)
    ]
    # A file may state a temperature and yet ask for greedy decoding; transformers then leaves it out, and so does mmit.
    if not config.do_sample:
        return GenerationFacts(listed, notes=tuple(notes))
    top_k = TOP_K if config.top_k is None else int(config.top_k)
    sampling = Sampling(_number(config.temperature, 1.0), _number(config.top_p, 1.0), top_k)
    return GenerationFacts(listed, sampling, tuple(notes))


def read_generation(llm: Any, folder: Path) -> None:
    """Give a language model the generation_config.json of the folder that it was read from, if there is one."""
    if (folder / "generation_config.json").is_file():
        base = llm.get_base_model() if isinstance(llm, PeftModel) else llm
        base.generation_config = GenerationConfig.from_pretrained(folder)


def end_ids(chat_end: Iterable[int], tokenizer: Any, llm: Any) -> tuple[int, ...]:
    """Ids that end an answer: the last of the chat format's ending, the tokenizer's EOS, and the model's own list."""
    # Only the last id of the format's ending: those before it (a newline, say) stand inside answers too.
    found = (*tuple(chat_end)[-1:], tokenizer.eos_token_id, *generation_facts(llm).end_ids)
    return tuple(dict.fromkeys(i for i in found if i is not None))


def _number(value: Any, default: float) -> float:
    return default if value is None else float(value)
