"""What a run learns from its model before anything is measured: how records share rows, and whether they may.

In: the `data` section of a config and the model. Out: the keys of it that the model decides, and what the model refuses
said in one sentence. The dry run asks the same without forwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mmit.errors import ConfigError, ModelError, located
from mmit.models.rules import check_vocabulary, read_rules
from mmit.train.probes import check_embeddings

if TYPE_CHECKING:
    from mmit.models.vlm import VLM
    from mmit.train.data_setup import Say


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


def settle_packing(data: Mapping[str, Any], vlm: VLM, tokenizer: Any, *, measure: bool, say: Say) -> dict[str, Any]:
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
        if measure:
            check_embeddings(vlm)
    update: dict[str, Any] = {"packing": False}
    if asked is not False:
        reason = rules.why_not_packed
        if reason is None and measure:
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
    if rules.rotary_limit and data["share_prefix"] and data["max_length"] > rules.rotary_limit:
        update["share_prefix"] = False
        say(
            f"data.share_prefix is false: records of more than {rules.rotary_limit} tokens turn their positions by "
            "other factors than shorter ones, so that they cannot share a beginning"
        )
    if found := list(rules.lines()):
        say("the language model's own rules: " + "; ".join(found))
    return update
