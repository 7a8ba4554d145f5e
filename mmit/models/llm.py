"""The language model: any Hugging Face causal LM and its tokenizer, by hub id, local folder or `.gguf` file.

Owns loading and the choice of attention function. Refuses remote code: a repository that needs its own modelling
code is an error, not an execution.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from mmit.errors import ConfigError, ModelError, nearest
from mmit.models import attention
from mmit.models.config_keys import config_keys
from mmit.models.files import resolve_file
from mmit.models.gguf_once import read_once
from mmit.models.partition import partitioned
from mmit.models.per_record import run_per_record
from mmit.models.row_state import checkpoint_contexts
from mmit.models.rules import DROPOUT_KEYS, chosen_keys, takes_attention
from mmit.models.virtual import virtual_tokens
from mmit.models.words import scale_words

if not sys.stderr.isatty():  # a progress bar in a log file is noise
    disable_progress_bar()

BNB_ON_CPU = (0, 50)  # the first release whose 4-bit layers were trained on a CPU
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _source(name: str) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a hub id, a folder, a `.gguf` path or a `package:` file."""
    if name.startswith("package:") or name.endswith(".gguf"):
        path = resolve_file(name)
        if path.suffix == ".gguf":
            return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        return {"pretrained_model_name_or_path": str(path)}
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().exists():
        raise ModelError("no such folder", where=name, remedy="give a hub id, an existing folder or a .gguf file")
    return {"pretrained_model_name_or_path": str(Path(name).expanduser()) if name.startswith("~") else name}


def _reading(name: str) -> AbstractContextManager[None]:
    return read_once() if name.endswith(".gguf") else nullcontext()


def _explain(name: str, error: Exception) -> ModelError:
    lines = str(error).split("\n\n")[0].split("\n")
    # These say only in their second line what is wrong.
    text = " ".join(map(str.strip, lines[: 2 if isinstance(error, StrictDataclassError) else 1]))
    return ModelError(
        f"cannot be loaded: {text[:300] or type(error).__name__}",
        where=name,
        remedy="check the id or folder, the network, and that the model is a causal LM transformers supports "
        "without remote code",
    )


def load_tokenizer(name: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to the model `name` (see `load_llm`). Raises ModelError."""
    try:
        with _reading(name):
            return AutoTokenizer.from_pretrained(**_source(name), revision=revision, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise _explain(name, error) from error


@dataclass(frozen=True)
class Placement:
    """Where the weights of an LLM go and in what form they are kept; the further options of `load_llm`.

    Attributes:
        device_map: passed to transformers (accelerate) for models larger than one device.
        offload: folder for what the device map puts on disk.
        quantization: {"quant": "nf4" or "fp4", "double_quant": bool} loads linear layers in 4 bits (QLoRA); see
            `fewer_bits` for those that only answer.
        empty: shapes alone, on torch's meta device; reads the configuration and no weights.
        partition: a complete DeepSpeed config of stage 3, whose number format is that of the weights: each rank keeps
            its part of every weight as it is read from the files. Not for random weights, `.gguf` files and 4-bit
            loading, all of which are made whole on every rank.
    """

    device_map: str | dict[str, Any] | None = None
    offload: str | None = None
    quantization: Mapping[str, Any] | None = None
    empty: bool = False
    partition: Mapping[str, Any] | None = None

    def arguments(self) -> dict[str, Any]:
        """Arguments of `from_pretrained` that say where weights go."""
        device_map = self.device_map
        # bitsandbytes packs weights while they are loaded, so they must go at once to where they are used.
        if device_map is None and self.quantization is not None:
            device_map = {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}
        return {"device_map": device_map} | ({} if self.offload is None else {"offload_folder": self.offload})


def load_llm(
    name: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    random_init: dict[str, Any] | None = None,
    packed: bool = True,
    attention_dropout: float | None = None,
    **place: Any,
) -> PreTrainedModel:
    """Load a causal LM, ready for packed rows.

    Args:
        name: hub id, local folder, `.gguf` file (dequantised on loading) or `package:module/file`.
        revision: branch, tag or commit on the hub.
        dtype: of the weights.
        random_init: a model config (with `model_type`) to build with random weights instead of loading any.
        packed: use mmit's attention function, which runs packed rows, where the architecture takes another one;
            off leaves the model's own.
        attention_dropout: of attention weights in training, in the place of what the model's config says.
        place: fields of `Placement`.

    Raises:
        ModelError: it cannot be found, read or built, or this machine cannot run 4-bit weights.
    """
    where = Placement(**place)
    if where.quantization is not None and random_init is not None:
        raise ModelError(
            "a model with random weights cannot be loaded in 4 or 8 bits",
            remedy="set random_init: null, or use mode lora",
        )
    try:
        if random_init is not None:
            config = _with_dropout(_described(random_init), attention_dropout)
            implementation = _attention_of(config, packed)
            if where.empty:
                return _empty(config, dtype, implementation)
            made = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False, **implementation)
            return ready(made)
        with _reading(name):
            source = _source(name)
            config = AutoConfig.from_pretrained(**source, revision=revision, trust_remote_code=False)
            config = _with_dropout(config, attention_dropout)
            implementation = _attention_of(config, packed)
            if where.empty:
                return _empty(config, dtype, implementation)
            if attention_dropout is not None:
                source["config"] = config
            options = {"revision": revision, "dtype": dtype, **implementation}
            model = _from_files(name, source, where, options)
    except (OSError, ValueError, ImportError, KeyError, TypeError, StrictDataclassError) as error:
        raise _explain(name, error) from error
    return ready(model)


def _from_files(name: str, source: dict[str, Any], where: Placement, options: Mapping[str, Any]) -> PreTrainedModel:
    """Read the weights. `source` says what is read, `options` are further arguments of `from_pretrained`."""
    gguf = "gguf_file" in source
    if gguf and where.quantization is not None:
        raise ModelError("a .gguf file cannot be loaded in 4 or 8 bits", where=name, remedy="use the original weights")
    if gguf:  # packed GGUF weights are slow and cannot be trained
        source["quantization_config"] = GgufConfig(dequantize=True)
    elif where.quantization is not None:
        source["quantization_config"] = bits_config(where.quantization, options["dtype"])
    with partitioned(None if "quantization_config" in source else where.partition):
        given = {**source, **options, **where.arguments()}
        model = AutoModelForCausalLM.from_pretrained(**given, trust_remote_code=False)
    if gguf:
        _forget_quantization(model)
    for module in model.modules():
        # bitsandbytes packs 4-bit weights in place at the first forward in evaluation mode on some CPUs: scales become
        # bf16, layers of other than a multiple of 32 outputs fail, and training goes on with other weights.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return model


def _empty(config: Any, dtype: torch.dtype, implementation: Mapping[str, Any]) -> PreTrainedModel:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False, **implementation)
    _forget_quantization(model)
    return ready(model)


def _described(options: Mapping[str, Any]) -> Any:
    """A model config from plain data. transformers would keep a misspelt key as an attribute that nothing reads."""
    where = "model.llm.random_init"
    kind = options.get("model_type", "llama")
    if kind not in CONFIG_MAPPING:
        close = difflib.get_close_matches(str(kind), list(CONFIG_MAPPING), n=3) or ["llama", "qwen2"]
        raise ModelError(f"unknown model_type '{kind}'", where=where, remedy=f"e.g. {', '.join(close)}")
    # Keys of every version and of published files: a config that works elsewhere must not be refused for its age.
    names = config_keys(kind)
    for key in options:
        if key not in names:
            raise ModelError(f"unknown key '{key}' for a {kind} model", where=where, remedy=nearest(key, names))
    return AutoConfig.for_model(kind, **{k: _numbers(v) for k, v in options.items() if k != "model_type"})


def _numbers(value: Any) -> Any:
    """A value of a config.json, in which infinity is written {"__float__": "Infinity"}."""
    if isinstance(value, Mapping):
        infinite = value.keys() == {"__float__"}
        return float(value["__float__"]) if infinite else {k: _numbers(v) for k, v in value.items()}
    return [_numbers(v) for v in value] if isinstance(value, list) else value


def recompute_activations(llm: Any) -> None:
    """Keep no activations inside decoder layers; the backward pass computes them again.

    Raises:
        ModelError: the architecture cannot.
    """
    # transformers 5.2x renamed it; the old name warns there.
    new = getattr(llm, "activation_checkpointing_enable", None)
    given = {"use_reentrant": False, "context_fn": checkpoint_contexts}
    try:
        if new is not None:
            new(activation_checkpointing_kwargs=given)
        else:
            llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=given)
    except ValueError as error:
        raise ModelError(str(error), where="train.checkpointing", remedy="set train.checkpointing=none") from error


def why_not_4bit() -> str | None:
    """What keeps this machine from running 4-bit weights, or None."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return "4-bit weights need bitsandbytes, which is not installed"
    if torch.cuda.is_available():
        return None
    found = version("bitsandbytes")
    if tuple(int(n) for n in found.split(".")[:2]) < BNB_ON_CPU:
        wanted = ".".join(map(str, BNB_ON_CPU))
        return f"4-bit weights without a CUDA device need bitsandbytes {wanted} or newer, {found} is installed"
    return None


def fewer_bits(*, load_in_8bit: bool, load_in_4bit: bool) -> dict[str, Any] | None:
    """Arguments `quantization` of a model that only answers, on whatever device; None for neither.

    Raises ModelError for both, and without bitsandbytes.
    """
    if not (load_in_8bit or load_in_4bit):
        return None
    if load_in_8bit and load_in_4bit:
        raise ModelError("load_in_8bit and load_in_4bit are both set", remedy="set one of them")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            "weights of 4 or 8 bits need bitsandbytes, which is not installed",
            where="load_in_8bit" if load_in_8bit else "load_in_4bit",
            remedy="pip install 'mmit-tune[qlora]', or leave it out",
        )
    return {"bits": 8} if load_in_8bit else {"bits": 4, "quant": "nf4", "double_quant": False}


def bits_config(options: Mapping[str, Any], dtype: torch.dtype) -> BitsAndBytesConfig:
    """Settings of bitsandbytes: NF4 and double quantisation of QLoRA (arXiv:2305.14314), or LLM.int8 (2208.07339)."""
    if options.get("bits") == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    if "bits" not in options and (reason := why_not_4bit()) is not None:
        remedy = "run: pip install --upgrade 'mmit-tune[qlora]', or use mode lora"
        raise ModelError(reason, where="tune.llm.mode", remedy=remedy)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=options["quant"],
        bnb_4bit_use_double_quant=options["double_quant"],
        bnb_4bit_compute_dtype=dtype,
    )


def usable_device(name: str) -> torch.device:
    """Return the device, tried out before anything is loaded.

    Args:
        name: auto, cpu, cuda or cuda:N. A process of a launcher takes the GPU of its LOCAL_RANK for auto and cuda.

    Raises:
        ConfigError: torch cannot compute there.
    """
    if name == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    if name in ("auto", "cuda") and (rank := os.environ.get("LOCAL_RANK")) is not None and torch.cuda.is_available():
        device = torch.device("cuda", int(rank) % torch.cuda.device_count())
        torch.cuda.set_device(device)  # libraries that place tensors themselves (bitsandbytes) use the current one
        return device
    try:
        return torch.empty(0, device="cuda" if name == "auto" else name).device
    except (RuntimeError, AssertionError) as error:
        problem = f"torch cannot compute on '{name}': {str(error).splitlines()[0]}"
        raise ConfigError(problem, where="device", remedy="Give auto, cpu, cuda or cuda:N.") from error


def input_device(model: Any) -> torch.device:
    """Where inputs of a language model go."""
    embeddings = model.get_input_embeddings()
    if embeddings.weight.is_meta:  # offloaded: accelerate fetches the weights when they are needed
        hook = embeddings._hf_hook
        return torch.device(getattr(hook, "hooks", [hook])[0].execution_device)
    return embeddings.weight.device


def bring_adapters(model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put the adapters of an offloaded model where its weights are fetched to when they are needed.

    peft leaves them where the weights are, which is nowhere. `tensors` are the adapters' under peft's names.
    """
    for name, module in model.named_modules():
        base = getattr(module, "base_layer", None)
        device = getattr(getattr(base, "_hf_hook", None), "execution_device", None)
        if device is None:
            continue
        for own, parameter in list(module.named_parameters()):
            value = tensors.get(f"{name}.{own.replace('.default', '')}")
            if not own.startswith("base_layer.") and (value is not None or not parameter.is_meta):
                set_module_tensor_to_device(module, own, device, value=value)


def _with_dropout(config: Any, dropout: float | None) -> Any:
    text = config.get_text_config()
    for key in DROPOUT_KEYS:
        if dropout is not None and getattr(text, key, None) is not None:
            setattr(text, key, dropout)
    return config


def ready(model: PreTrainedModel) -> PreTrainedModel:
    """Change what a loaded model does to embeddings and rows: see `per_record` and `words`."""
    run_per_record(model)
    scale_words(model)
    return model


def _attention_of(config: Any, packed: bool) -> dict[str, str]:
    """Arguments that choose the attention function; none for a model that has its own."""
    kind: Any = AutoModelForCausalLM._model_mapping.get(type(config), None)
    kind = kind[0] if isinstance(kind, (tuple, list)) else kind
    # Its own attention stays where mmit's would not be asked, or where layers choose keys over the whole row: records
    # then run as a padded batch.
    if not packed or kind is None or not takes_attention(kind) or chosen_keys(config.get_text_config()):
        return {}
    return {"attn_implementation": attention.NAME}


def _forget_quantization(model: PreTrainedModel) -> None:
    """A dequantised model is a plain one: without this, saving and tuning would treat it as quantised."""
    # transformers asks both the config and the model whether weights are quantised.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized = False  # type: ignore[assignment]
    model.hf_quantizer = None  # type: ignore[assignment]


def multiplied_out(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The same weights without their quantisation."""
    model = model.dequantize(dtype=dtype)
    _forget_quantization(model)
    return model.to(dtype)  # type: ignore[arg-type]


def context_length(model: Any) -> int | None:
    """Tokens the model was built for, or None where its config does not say."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if limit is None else limit - virtual_tokens(model)
