"""What a format can hold of a model: asked from the config, before anything is trained or written.

In: a format, the sections `model` and `tune`, and a few facts of the LLM's class. Out: nothing, or the one ModelError
that says why not and what to do. The checks after an export compare numbers; they are not where a user learns this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModel

from mmit.errors import ModelError, nearest
from mmit.models.calls import reads_ngrams
from mmit.models.interop.hf_parts import LLAVA_CLASSES
from mmit.models.interop.llava_names import why_not_found
from mmit.models.llm import load_llm
from mmit.models.rules import LOGIT_KEYS, changed_logits
from mmit.models.words import ScaledWords

FORMATS = ("llava-hf", "gguf", "llava", "peft", "mmit")
# Methods that leave something no plain weight can express; as `tuning.merge` refuses them.
NOT_MERGED = {
    "houlsby": "bottleneck adapters are not linear",
    "soft_prompt": "a soft prompt is input, not weights",
    "intrinsic": "a soft prompt is input, not weights",
    "prefix": "a prefix is keys and values, not weights",
}
AFTER_HEAD = "it changes its logits after the head"


@dataclass(frozen=True, slots=True)
class TextFacts:
    """What decides whether another class can stand around a language model.

    Attributes:
        kind: model_type. body: attribute of the class that holds all but the head. plain: the body gives its word
            embeddings when asked, and a linear head without bias is under `lm_head`. tied: the head is the embeddings.
        logits: (key, value) of the config that changes logits after the head, with what value.
        extra: what else the class does that a body and a head alone do not.
    """

    kind: str
    body: str
    plain: bool
    tied: bool
    logits: tuple[str, Any] | None = None
    extra: str | None = None


def text_facts(llm: Mapping[str, Any]) -> TextFacts:
    """Read the facts of a `model.llm` section from the model's shapes; no weights are read."""
    given: dict[str, Any] = {"revision": llm.get("revision"), "random_init": llm.get("random_init")}
    # On the meta device: shapes alone, and nothing is downloaded but the config.
    model: Any = load_llm(llm["name"], **given, dtype=torch.float32, empty=True)
    config = model.config
    head = model.get_output_embeddings()
    body = getattr(model, model.base_model_prefix, None)
    own_head: Any = getattr(model, "lm_head", None)
    try:  # LLaVA's classes ask the body
        words = body is not None and body.get_input_embeddings() is model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        # Some bodies have no such method, or one that raises.
        words = False
    plain = words and own_head is not None and head is own_head and own_head.bias is None
    tied = bool(getattr(config, "tie_word_embeddings", False))
    lost = why_not_found(model) if plain else None
    extra = beyond_body_and_head(model) if plain else None
    if extra == AFTER_HEAD and any(hasattr(config, key) for key in LOGIT_KEYS):
        extra = None  # the keys say what is changed, and whether it is
    return TextFacts(config.model_type, model.base_model_prefix, plain, tied, changed_logits(config), extra or lost)


class _Stub:
    """Output of a body that was not run; whatever else is asked for is not there."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, place: Any) -> Any:
        return self.last_hidden_state if place in (0, "last_hidden_state") else None

    def __getattr__(self, name: str) -> None:
        return None


def beyond_body_and_head(model: Any) -> str | None:
    """What the class around body and head computes itself, or None: seen in a forward without weights or layers.

    Args:
        model: an empty causal LM, which is used up.
    """
    config, body, head = model.config, model.base_model, model.get_output_embeddings()
    if getattr(config, "hidden_size_per_layer_input", None):
        return "its layers take the embeddings of the token ids themselves"
    if reads_ngrams(model):
        return "its layers look up n-grams of the token ids themselves"
    if isinstance(model.get_input_embeddings(), ScaledWords) and model.get_input_embeddings().embed_scale != 1:
        return "its body scales only the embeddings that it looks up itself"
    built: Any = AutoModel._model_mapping.get(type(config), None)
    if built not in type(body).__mro__:
        return f"transformers builds another body for its config than {type(body).__name__}"
    embeddings = torch.empty(1, 2, config.hidden_size, dtype=torch.float32, device="meta")
    # No numbers are needed: whether the class hands on the very tensor that it was given is a question of identity.
    hidden = torch.empty_like(embeddings)
    # The class's own forward is run once with the body replaced: reading its source would be guessing.
    seen: dict[str, Any] = {}

    def forward(*arguments: Any, **named: Any) -> _Stub:
        seen.update(named)
        return _Stub(hidden)

    body.forward = forward
    head.register_forward_hook(lambda _, given, made: seen.update(given=given[0], made=made))
    try:
        with torch.no_grad():
            logits = model(inputs_embeds=embeddings).logits
    except RuntimeError:  # layers that ran after all, without numbers
        if "inputs_embeds" in seen:
            raise
    if "inputs_embeds" not in seen:
        return "it does not call its body as a whole"
    if seen["inputs_embeds"] is not embeddings:
        return "it changes embeddings before its body"
    given = seen.get("given")
    # A view counts as the tensor itself: classes cut out the positions whose logits are wanted.
    if given is None or (given is not hidden and given._base is not hidden):
        return "it changes hidden states between body and head"
    return None if seen["made"] is logits else AFTER_HEAD


def check_export(
    format: str,
    model: Mapping[str, Any],
    tune: Mapping[str, Any],
    facts: TextFacts | None,
    *,
    llm_only: bool = False,
) -> None:
    """Raise ModelError if a format cannot hold what these sections describe.

    Args:
        format: a key of FORMATS. model, tune: sections of a config as plain data.
        facts: of the LLM; None leaves out what follows from its class.
        llm_only: pictures are left out (gguf).
    """
    if format not in FORMATS:
        raise ModelError(f"unknown export format '{format}'", where="export", remedy=nearest(format, FORMATS))
    if format == "gguf":
        return _gguf(model, tune, llm_only=llm_only)
    checks = {"llava-hf": _llava_hf, "llava": _llava, "peft": _peft, "mmit": _mmit}
    checks[format](model, tune, facts)


def _refuse(format: str, problem: str, *, where: str, remedy: str) -> None:
    raise ModelError(f"{format} cannot hold this model: {problem}", where=where, remedy=remedy)


def _mmit(model: Mapping[str, Any], tune: Mapping[str, Any], facts: TextFacts | None) -> None:
    plan = tune["llm"]
    if plan["mode"] in ("lora", "qlora") and plan["options"].get("init") in ("pissa", "olora"):
        problem = "the base of a PiSSA or OLoRA adapter would lose the adapter twice"
        _refuse("mmit", problem, where="tune.llm.options.init", remedy="use llava-hf, or train with init: true")


def _peft(model: Mapping[str, Any], tune: Mapping[str, Any], facts: TextFacts | None) -> None:
    mode = tune["llm"]["mode"]
    if mode not in ("lora", "qlora", "ia3"):
        remedy = "use --format mmit, or train with mode lora, qlora or ia3"
        _refuse("peft", f"mode {mode} leaves no adapter of peft's", where="tune.llm.mode", remedy=remedy)


def _merged(format: str, tune: Mapping[str, Any], facts: TextFacts | None) -> None:
    """What holds for every format whose LLM is one of plain weights."""
    plan = tune["llm"]
    reason = NOT_MERGED.get(plan["mode"])
    if plan["mode"] == "bitfit" and plan["options"].get("insert_biases"):
        reason = "the architecture has no place for the inserted biases"
    if reason:
        _refuse(format, f"cannot be merged: {reason}", where="tune.llm.mode", remedy="export with --format mmit")
    targets = plan["options"].get("targets") or ()
    named = [targets] if isinstance(targets, str) else list(targets)
    both = [name for name in named if str(name).split(".")[-1] in ("lm_head", "embed_tokens")]
    if facts is not None and facts.tied and both and plan["mode"] in ("lora", "qlora"):
        problem = f"the adapter changes {both[0]} alone, which is one table with the other end of the model"
        remedy = "leave it out of the targets, set tie_word_embeddings: false in the base, or use --format mmit"
        _refuse(format, problem, where="tune.llm.options.targets", remedy=remedy)


def _pictures(
    format: str, model: Mapping[str, Any], kinds: tuple[str, ...], fits: tuple[str, ...]
) -> Mapping[str, Any]:
    vision = model["vision"]
    if vision is None:
        _refuse(format, "it is text-only", where="model.vision", remedy="export with --format peft, gguf or mmit")
    if vision["kind"] not in kinds:
        remedy = "export with --format mmit, or train with such a tower"
        told = f"a tower of kind {vision['kind']}; it holds {', '.join(kinds)}"
        _refuse(format, told, where="model.vision.kind", remedy=remedy)
    if vision["fit"] not in fits:
        remedy = f"export with --format mmit, or train with fit {' or '.join(fits)}"
        _refuse(format, f"pictures with fit {vision['fit']}", where="model.vision.fit", remedy=remedy)
    return vision


def _llava_hf(model: Mapping[str, Any], tune: Mapping[str, Any], facts: TextFacts | None) -> None:
    fits = ("resize", "pad", "crop", "any_resolution")
    vision = _pictures("llava-hf", model, ("hf", "open_clip", "timm"), fits)
    off = [name for name in ("thumbnail", "unpad", "line_ends") if not vision["tiles"].get(name, True)]
    if off:
        remedy = "export with --format mmit, or train with the defaults of any_resolution"
        _refuse("llava-hf", f"tiles with {off[0]}: false", where="model.vision.tiles", remedy=remedy)
    kind, options = model["projector"]["kind"], model["projector"]["options"]
    if kind != "mlp" or options.get("depth", 2) != 2 or options.get("norm"):
        told = ", ".join([kind, *(f"{key} {value}" for key, value in options.items())])
        problem = f"a projector there is two linear layers with GELU between them, and this one is {told}"
        remedy = "train with projector kind mlp, depth 2 and no norm; or export with --format mmit"
        _refuse("llava-hf", problem, where="model.projector", remedy=remedy)
    _merged("llava-hf", tune, facts)
    if facts is None:
        return
    remedy = "export with --format mmit, or with --format peft where the LLM has an adapter"
    if facts.logits is not None:
        key, value = facts.logits
        problem = f"a {facts.kind} LLM changes its logits ({key} {value}), which the classes of LLaVA leave out"
        _refuse("llava-hf", problem, where="model.llm", remedy=remedy)
    if facts.body != "model" or not facts.plain:
        problem = f"a {facts.kind} LLM is not a body 'model' with its own word embeddings under a plain head 'lm_head'"
        _refuse("llava-hf", problem, where="model.llm", remedy=remedy)
    if facts.extra is not None:
        problem = f"around a {facts.kind} LLM stand the classes of LLaVA instead of its own, and {facts.extra}"
        _refuse("llava-hf", problem, where="model.llm", remedy=remedy)


def _gguf(model: Mapping[str, Any], tune: Mapping[str, Any], *, llm_only: bool) -> None:
    """What follows from the sections; the parts are asked by `interop.gguf.check_gguf`."""
    _merged("gguf", tune, None)
    vision, kind = model["vision"], model["projector"]["kind"]
    if vision is None or llm_only:
        return
    other = "export the LLM alone with --llm-only, or all of it with --format mmit"
    if vision["kind"] not in ("hf", "open_clip", "timm"):
        problem = f"llama.cpp has no tower of kind {vision['kind']}; it has SigLIP's vision transformer"
        _refuse("gguf", problem, where="model.vision.kind", remedy=f"train with such a tower, or {other}")
    if vision["fit"] != "pad":
        problem = f"llama.cpp pads pictures to a square, and this model was trained with fit {vision['fit']}"
        _refuse("gguf", problem, where="model.vision.fit", remedy=f"train with fit pad, or {other}")
    if kind != "mlp" or model["projector"]["options"].get("depth", 2) != 2 or model["projector"]["options"].get("norm"):
        problem = "llama.cpp's projector around such a tower is two linear layers with GELU between them"
        _refuse("gguf", problem, where="model.projector", remedy=f"train with projector kind mlp, depth 2, or {other}")


def _llava(model: Mapping[str, Any], tune: Mapping[str, Any], facts: TextFacts | None) -> None:
    vision = _pictures("llava", model, ("hf",), ("pad", "crop"))
    if not isinstance(vision["layer"] or -2, int):
        _refuse("llava", "several layers", where="model.vision.layer", remedy="use --format llava-hf or --format mmit")
    if tune["vision"]["mode"] != "frozen":
        problem = "its files name the vision tower and do not hold a trained one"
        _refuse("llava", problem, where="tune.vision.mode", remedy="use --format llava-hf or --format mmit")
    kind, options = model["projector"]["kind"], model["projector"]["options"]
    if kind not in ("linear", "mlp") or options.get("norm"):
        problem = "it has the projectors linear and mlpNx_gelu"
        _refuse("llava", problem, where="model.projector", remedy="use --format mmit, or train with linear or mlp")
    _merged("llava", tune, facts)
    if facts is not None and facts.kind not in LLAVA_CLASSES:
        problem = f"LLaVA's code has no class for a '{facts.kind}' model; it has {', '.join(LLAVA_CLASSES)}"
        _refuse("llava", problem, where="model.llm", remedy="use --format llava-hf")
