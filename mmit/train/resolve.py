"""What a config leaves open, resolved before anything is measured: paths, number format, how records share rows.

In: a config, the machine and the model. Out: the config with what they decide, and what they refuse said in one
sentence. The dry run asks the same without forwards.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from mmit import precision
from mmit.data.dataset import Choosing
from mmit.errors import ConfigError, ModelError, located
from mmit.models.intrinsic import OF_MODEL, read_facts
from mmit.models.llm import load_llm
from mmit.models.rules import check_vocabulary, read_rules
from mmit.models.tuning import method_of
from mmit.models.vlm import VLM
from mmit.train.checkpoint import model as checkpoint
from mmit.train.checks.probes import check_causal, check_embeddings
from mmit.train.data.setup import Encoding, open_data
from mmit.train.engines.zero import deepspeed_options, zero_stage
from mmit.train.objective import Method

if TYPE_CHECKING:
    from mmit.config import Config
    from mmit.data.chat import ChatFormat
    from mmit.data.dataset import InstructionData
    from mmit.data.preparation import ImagePreparation
    from mmit.train.data.setup import Say
    from mmit.train.engines.world import World


def check_divided(vlm: VLM) -> None:
    """Refuse an LLM whose weights ZeRO-3 cannot divide among ranks.

    DeepSpeed brings the weights of a module together when the module is called. Layers with a running state hand
    theirs to a kernel from outside, and with experts in one tensor its bookkeeping fails in the first step.

    Raises:
        ConfigError: naming what the model has.
    """
    rules = read_rules(vlm.llm)
    if rules.mixers or rules.experts:
        what = "layers with a running state or convolution" if rules.mixers else "experts that share a tensor"
        raise ConfigError(
            f"{type(vlm.llm).__name__} has {what}, whose weights ZeRO-3 does not bring together where they are read",
            where="engine.deepspeed",
            remedy="set engine.deepspeed=zero2, under which each rank holds the LLM whole",
        )


def check_zero3(config: Config, *, world: World) -> None:
    """Refuse what ZeRO-3 cannot do before any weight is read: `check_divided` of the LLM, 4-bit weights, benchmarks.

    Answers are written in inference mode, and weights that were gathered there could not be trained any more. Nothing
    to refuse without ZeRO-3, but a name that is none of DeepSpeed's. Raises ConfigError.
    """
    name = config.engine.deepspeed
    if not name.endswith(".json"):  # the path of a file need not be there for a run on one device
        deepspeed_options(name)
    if not world.deepspeed or zero_stage(deepspeed_options(config.engine.deepspeed)) != 3:
        return
    if config.train.eval_tasks:
        problem = "benchmarks cannot be asked while ranks divide the weights (ZeRO-3)"
        remedy = "set engine.deepspeed=zero2, or run mmit eval on the checkpoints"
        raise ConfigError(problem, where="train.eval_tasks", remedy=remedy)
    if method_of(config.tune.llm.mode).four_bit:
        problem = "ZeRO-3 divides weights among ranks, and cannot divide 4-bit ones"
        remedy = "set engine.deepspeed=zero2, or use mode lora"
        raise ConfigError(problem, where="tune.llm.mode", remedy=remedy)
    llm = config.model.llm
    if llm.random_init is None and Path(llm.name).is_absolute() and not Path(llm.name).exists():
        return  # its base is gone, and a checkpoint holds the LLM whole
    # Made without weights: only its modules are looked at.
    given: dict[str, Any] = {"revision": llm.revision, "random_init": llm.random_init}
    check_divided(VLM(load_llm(llm.name, **given, dtype=torch.float32, empty=True), vision=None, projector=None))


def objective_of(config: Config) -> Method:
    """The method that `train.objective` names. Raises ConfigError for settings that it has no place for."""
    given = config.train.objective.model_dump()
    method = Method(**{field.name: given[field.name] for field in fields(Method)})
    if not method.compares:
        return method
    # What the user asked for and a comparison has no place for must not be dropped in silence.
    loss, plain = config.data.loss.model_dump(), type(config.data.loss)().model_dump()
    for key in plain:
        if key != "sources" and loss[key] != plain[key]:
            problem = f"{method.kind} compares whole answers, of which every token counts alike"
            raise ConfigError(problem, where=f"data.loss.{key}", remedy=f"leave data.loss.{key} out")
    if config.data.split_turns:
        problem = f"{method.kind} compares the last answers of whole records"
        raise ConfigError(problem, where="data.split_turns", remedy="set data.split_turns=false")
    if config.train.router_loss is not None:
        problem = f"{method.kind} compares log-probabilities, to which the routers' loss would be added"
        raise ConfigError(problem, where="train.router_loss", remedy="set train.router_loss=null")
    return method


def choosing_of(config: Config) -> Choosing | None:
    """What `train.objective.kind=choices` asks of the data. Raises ConfigError for what does not go with it."""
    objective = config.train.objective
    if objective.kind != "choices":
        return None
    unfit = {"data.split_turns": config.data.split_turns, "train.router_loss": config.train.router_loss is not None}
    for key, asked in unfit.items():
        if asked:
            problem = "does not go with train.objective.kind=choices, which has one loss for each record"
            raise ConfigError(problem, where=key, remedy=f"Set {key}={'false' if key.startswith('data') else 'null'}.")
    return Choosing(lm=objective.lm, temperature=objective.temperature)


def open_records(
    config: Config,
    part: Literal["train", "eval"],
    chat: ChatFormat,
    tokenizer: Any,
    *,
    preparation: ImagePreparation | None,
    **reading: Any,
) -> InstructionData:
    """Open the sources of data.train or data.eval as this config asks.

    Args:
        part: which of the two lists.
        chat, tokenizer: how conversations become tokens.
        preparation: of images, None for a model of text.
        reading: cache, on_bad and say of `open_data`.
    """
    options = config.data
    return open_data(
        [source.model_dump() for source in getattr(options, part)],
        Encoding(chat, tokenizer, options.loss.model_dump()),
        key=f"data.{part}",
        preparation=preparation,
        max_length=options.max_length,
        capacity=options.pack_tokens,
        split_turns=options.split_turns,
        # Records in rows of their own have nothing to share.
        share_prefix=options.share_prefix and options.packing is not False,
        choosing=choosing_of(config),
        compares=objective_of(config).compares,
        **reading,
    )


def resolve_packing(data: Mapping[str, Any], vlm: VLM, tokenizer: Any, *, measure: bool, say: Say) -> dict[str, Any]:
    """Decide how records lie in rows, and check what can be known of the LLM before data are read.

    Args:
        data: the section, whose `packing` may be auto.
        vlm: loaded for packing unless `data.packing` is false; set to padded batches where it cannot pack.
        measure: run a few tokens through the model, which needs its weights in place.

    Returns:
        `packing`, and `share_prefix` where it cannot stay as it is.

    Raises:
        ModelError: packing is asked for and not exact, or the tokenizer has ids that the model has not.
    """
    rules, asked = read_rules(vlm.llm), data["packing"]
    with located("model.llm"):
        check_vocabulary(rules, tokenizer.get_vocab())
    update: dict[str, Any] = {"packing": False}
    if asked is not False:
        reason = rules.why_not_packed
        if reason is None and measure:
            # Measured, not looked up by the model's name: whether records in one row see each other shows in its
            # logits.
            try:
                vlm.check_isolation()
            except ModelError as error:
                reason = error.problem
        if reason is not None and asked is True:
            remedy = "set data.packing=auto or false: records then run side by side in padded batches"
            raise ModelError(f"{type(vlm.llm).__name__}: {reason}", where="data.packing", remedy=remedy)
        if reason is not None:
            say(f"data.packing is false for {type(vlm.llm).__name__}: {reason}; records run in padded batches")
            vlm.run_padded()
        update["packing"] = reason is None
    if measure:  # with the attention that the run will have
        with located("model.llm"):
            check_causal(vlm, check_embeddings(vlm))
    if rules.rotary_limit and data["share_prefix"] and data["max_length"] > rules.rotary_limit:
        update["share_prefix"] = False
        say(
            f"data.share_prefix is false: records of more than {rules.rotary_limit} tokens turn their positions by "
            "other factors than shorter ones, so that they cannot share a beginning"
        )
    if found := list(rules.lines()):
        say("the language model's own rules: " + "; ".join(found))
    return update


def resolved(config: Config, vlm: VLM, tokenizer: Any, *, measure: bool, say: Say) -> Config:
    """The config with what the model decides about its data, see `resolve_packing`.

    Args:
        config: of the run. vlm, tokenizer: built.
        measure: try whether records of a row stay apart; a dry run has no weights to try it with.
        say: is told the result.

    Raises:
        ConfigError: the config asks for packing, and the model cannot keep records apart.
    """
    update = resolve_packing(config.data.model_dump(), vlm, tokenizer, measure=measure, say=say)
    return config.model_copy(update={"data": config.data.model_copy(update=update)})


def resolve_precision(config: Config, begin: Path | None, *, world: World, say: Say) -> Config:
    """The config with bf16, fp32 or fp16 in place of `train.precision=auto`, the same on all ranks.

    Args:
        config: of the run.
        begin: the checkpoint that a run goes on from, which keeps the format it was begun in, on whatever machine.
        world: all ranks come here. say: is told the choice and its reason.
    """
    asked = config.train.precision
    if asked != "auto":
        if (slow := precision.warning(world.device, asked)) is not None:
            say(f"warning: train.precision: {slow}: set train.precision=auto")
        return config
    name, reason = precision.choose(world.device)
    # On nodes that differ one takes the other's: all ranks of a run train in one format.
    shared = world.most(name, ("bf16", "fp32"))
    if shared != name:
        reason = "another rank's device multiplies bf16 slower than fp32"
    # A machine that is faster in the other format must not make another run of it half-way.
    began = checkpoint.read_config(begin).train.precision if begin is not None else "auto"
    if began not in ("auto", shared):
        say(f"train.precision stays {began}, as this run was begun; a new run would take {shared} here: {reason}")
        shared = began
    else:
        say(f"train.precision is {shared}: {reason}")
    return config.model_copy(update={"train": config.train.model_copy(update={"precision": shared})})


def planned(config: Config, *, cuda: bool) -> Config:
    """The config with the number format that `train.precision=auto` takes on the devices of a forecast.

    Args:
        cuda: they are GPUs, all of which mmit knows have bf16 units; else CPUs like this machine's.
    """
    if config.train.precision != "auto":
        return config
    name = "bf16" if cuda else precision.choose(torch.device("cpu")).name
    return config.model_copy(update={"train": config.train.model_copy(update={"precision": name})})


def with_whole_paths(config: Config) -> Config:
    """The config with local folders of models as absolute paths, which its checkpoints refer to from anywhere."""
    model = config.model
    changed: dict[str, Any] = {"llm": model.llm.model_copy(update={"name": _whole(model.llm.name)})}
    if model.vision is not None:
        towers = [tower.model_copy(update={"name": _whole(tower.name)}) for tower in model.vision.towers]
        changed["vision"] = model.vision.model_copy(update={"name": _whole(model.vision.name), "towers": towers})
    whole = config.model_copy(update={"model": model.model_copy(update=changed)})
    return _with_subspace(whole) if config.tune.llm.mode == "intrinsic" else whole


def _with_subspace(config: Config) -> Config:
    """The config with the folder of its subspace as an absolute path. Raises ConfigError for one of another model."""
    plan = config.tune.llm
    folder = plan.options.get("subspace")
    if not isinstance(folder, str) or not folder:
        return config  # refused where the method is applied
    known, own = read_facts(Path(folder)).get("llm"), config.model.llm.model_dump()
    if known is not None and any(known.get(key) != own[key] for key in OF_MODEL):
        problem = f"{folder} is a space of soft prompts of {known.get('name')}, and model.llm is {own['name']}"
        remedy = "make one of soft prompts of this model, or set model.llm as there"
        raise ConfigError(problem, where="tune.llm.options.subspace", remedy=remedy)
    options = {**plan.options, "subspace": os.path.abspath(folder)}
    llm = plan.model_copy(update={"options": options})
    return config.model_copy(update={"tune": config.tune.model_copy(update={"llm": llm})})


def _whole(name: str) -> str:
    prefix = "local-dir:" if name.startswith("local-dir:") else ""
    path = Path(name.removeprefix(prefix)).expanduser()
    return f"{prefix}{path.absolute()}" if name and path.exists() else name
