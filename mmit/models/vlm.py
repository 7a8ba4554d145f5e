"""The composite: vision tower + projector + causal LM.

Owns the splice of image tokens into text embeddings and its alignment check, and the training forward over one
packed row. Takes tensors only; knows neither tokenizers nor chat formats. Refuses to guess: image tokens and image
positions that differ in number are an error that states both.

Dimensions: T tokens in the row, P image positions among them, S supervised targets, C crops that the tower sees (one
for each distinct picture, or its tiles), N vision tokens and M image tokens per crop, D_v / D widths of tower and LLM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn

from mmit.errors import ModelError
from mmit.models.attention import NAME, run_row
from mmit.models.calls import RowInputs
from mmit.models.deepstack import as_wide
from mmit.models.head import Split, check_rows, choice_losses, cross_entropy, split_head
from mmit.models.llm import input_device
from mmit.models.modes import evaluation_mode, training_mode
from mmit.models.padded import is_flat, run_padded
from mmit.models.partition import is_part, shape
from mmit.models.planning import repeats_prompt
from mmit.models.virtual import virtual_tokens, with_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from typing_extensions import Unpack

    from mmit.models.attention_plan import RowPlan
    from mmit.models.projector_base import Projector
    from mmit.models.routers import Routers
    from mmit.models.vision import VisionTower


# What the code of a model raises where it does not fit what it is given.
CANNOT_RUN = (TypeError, ValueError, AttributeError, LookupError, AssertionError, RuntimeError)
CHOOSING = ("choices", "shares", "questions", "lm", "temperature")  # arguments of `head.choice_losses`


class RowNeeds(TypedDict):
    """What `VLM.forward` needs of every row. `image_tokens` is M as the row was laid out; see `VLM.embed`."""

    input_ids: torch.Tensor  # (T,)
    positions: torch.Tensor  # (T,)
    nodes: torch.Tensor  # (K, 3), on the CPU; see `attention_plan.make_plan`
    predict_at: torch.Tensor  # (S,) positions whose next token is a target
    targets: torch.Tensor  # (S,)
    image_positions: torch.Tensor  # (P,)
    image_index: torch.Tensor  # (P,)
    image_tokens: int


class RowTensors(RowNeeds, total=False):
    """The keywords of `VLM.forward`: a packed row as the data loader makes it. Leave out, or None, what is not there.

    Pictures come as `pixels`, with `grids` for a tower of native resolution, or as `features` computed before.
    """

    pixels: torch.Tensor | None  # (C, 3, H, W) uint8
    grids: torch.Tensor | None  # (K, 2) rows and columns of units
    features: torch.Tensor | None  # (C, N, D_v)
    plan: RowPlan | None  # of its nodes, made before; see `planning.row_planner`
    records: torch.Tensor | None  # (S,) the record of each target, on the CPU; for the auxiliary loss of routers
    samples: torch.Tensor | None  # (S,) the sample of each target, where records are choices
    choices: torch.Tensor  # and the rest, see `head.choice_losses`
    shares: torch.Tensor
    questions: torch.Tensor
    lm: float
    temperature: float


class VLM(nn.Module):
    """A language model that can be handed pictures; text-only when `vision` is None."""

    def __init__(
        self,
        llm: PreTrainedModel | PeftModel,
        *,
        vision: VisionTower | None,
        projector: Projector | None,
        padded: bool = False,
    ) -> None:
        super().__init__()
        if (vision is None) != (projector is None):
            raise ModelError("a vision tower needs a projector and the other way round")
        self.llm: PreTrainedModel | PeftModel = llm
        self.vision, self.projector = vision, projector
        # Records of a row that share nothing run side by side as a padded batch, not in mmit's attention.
        self.padded = padded
        # In training every record's loss is raised by the auxiliary loss of these (`routers.read_routers`).
        self.routers: Routers | None = None
        # Per component the parameters that a tuning method chose or added, which a checkpoint keeps by name.
        self.tuned_names: dict[str, tuple[str, ...]] = {}
        # Components that checkpoints hold whole: every weight is trained, or they came whole out of a checkpoint, so
        # that no hub id leads to them.
        self.whole_parts: set[str] = set()
        # Found at the first loss, or before by whoever must not meet a forward of its own there (ZeRO-3).
        self._split: tuple[Split | None] | None = None

    @property
    def image_tokens(self) -> int:
        """M, the LLM tokens one crop becomes; 0 for a text-only model."""
        return self.projector.tokens if self.projector is not None else 0

    @property
    def image_grid(self) -> tuple[int, int] | None:
        """(rows, columns) of these tokens, None where they are no grid."""
        return self.projector.grid_out if self.projector is not None else None

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return input_device(self.llm)

    @property
    def word_embeddings(self) -> nn.Parameter:
        """(V, D) input embeddings of the LLM."""
        return self.llm.get_input_embeddings().weight  # type: ignore[return-value]

    def encode_images(self, pixels: torch.Tensor, grids: torch.Tensor | None = None) -> torch.Tensor:
        """Features of crops: (C, 3, H, W) uint8 -> (C, N, D_v); `grids` as for `VisionTower.forward`."""
        if self.vision is None:
            raise ModelError("this model has no vision tower", remedy="set model.vision, or send text only")
        return self.vision(pixels) if grids is None else self.vision(pixels, grids)

    def image_embeddings(self, features: torch.Tensor) -> torch.Tensor:
        """Image tokens for the LLM: (C, N, D_v) -> (C, M, D)."""
        assert self.projector is not None
        weight = next(self.projector.parameters())
        return self.projector(features.to(weight.device, weight.dtype))

    def embed(
        self,
        input_ids: torch.Tensor,
        *,
        image_positions: torch.Tensor,
        image_index: torch.Tensor,
        image_tokens: int,
        features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Text embeddings with image tokens spliced in.

        Args:
            input_ids: (T,) token ids; whatever stands under an image position is ignored.
            image_positions: (P,) where image tokens go, slot by slot.
            image_index: (P,) which of the C * M image tokens goes there, -1 for the vector that ends a line.
            image_tokens: M as the row was laid out.
            features: (C, N, D_v) of the crops, or None when there are none.

        Returns:
            (T, D), with a projector that has levels for DeepStack (T, (1 + levels) * D)

        Raises:
            ModelError: the image tokens do not fill the image positions exactly.
        """
        # A call of the table, not an index into its weight: ZeRO-3 gathers for calls, and some models scale what they
        # look up.
        embeddings = self.llm.get_input_embeddings()(input_ids)
        if features is None or len(image_index) == 0:
            if len(image_positions):
                raise ModelError(
                    f"{len(image_positions)} image positions but no image",
                    remedy="the record's images were not loaded; check its image parts",
                )
            return embeddings
        # Checked where text and vision meet and nowhere trusted: one token too few would move every later image by one.
        if len(image_index) != len(image_positions) or image_tokens != self.image_tokens:
            raise ModelError(
                f"{len(features)} images give {self.image_tokens} image tokens each, but the text was laid out for "
                f"{image_tokens}, with {len(image_positions)} image positions for {len(image_index)} tokens",
                remedy=f"the projector gives {self.image_tokens} tokens per image; rows must be built with that number",
            )
        assert self.projector is not None
        table = self.image_embeddings(features).flatten(0, 1)
        if self.projector.line_end is not None:
            # One row more at the end of the table, which every -1 points to; so one gather places images and line ends.
            table = torch.cat([table, self.projector.line_end[None].to(table)])
            image_index = torch.where(image_index < 0, len(table) - 1, image_index)
        images = table.index_select(0, image_index.to(table.device))
        embeddings = as_wide(embeddings, images)
        return embeddings.index_copy(0, image_positions, images.to(embeddings))

    def forward(self, **row: Unpack[RowTensors]) -> torch.Tensor:
        """Cross-entropy of one packed row, per supervised target; of choices one loss per record.

        Args:
            row: see `RowTensors`, by keyword: (T,) tokens, (P,) image positions, (C, 3, H, W) crops, (S,) targets.

        Returns:
            (S,) float32 losses, of G records with choices (G,). Logits exist only at the S positions.

        Raises:
            ModelError: images and image positions do not belong together, or the model cannot run such a row.
        """
        features, pixels = row.get("features"), row.get("pixels")
        if features is None and pixels is not None and len(pixels):
            features = self.encode_images(pixels, row.get("grids"))
        # Before the words are embedded, as with images: all ranks must call trained modules in one order.
        idle = self._unseen() if features is None and self._meets_others() else None
        embeddings = self.embed(
            row["input_ids"],
            image_positions=row["image_positions"],
            image_index=row["image_index"],
            image_tokens=row["image_tokens"],
            features=features,
        )
        if idle is not None:
            embeddings = embeddings + self._idle_projector(idle).to(embeddings)
        # An image position has no token: a layer that looks ids up again must not take the placeholder for one.
        ids = row["input_ids"].index_fill(0, row["image_positions"], -1)
        given: dict[str, Any] = {"positions": row["positions"], "nodes": row["nodes"], "at": row["predict_at"]}
        losses = self._routed_losses(embeddings, row, given | {"ids": ids})
        samples = row.get("samples")
        if samples is None:
            return losses
        chosen: dict[str, Any] = {key: row[key] for key in CHOOSING if key in row}  # type: ignore[literal-required]
        return choice_losses(losses, samples, **chosen)

    def _routed_losses(self, embeddings: torch.Tensor, row: RowTensors, given: dict[str, Any]) -> torch.Tensor:
        """(S,) losses of a row, raised by the auxiliary loss of routers where that is trained."""
        records = row.get("records")
        learned: dict[str, Any] = {"targets": row["targets"], "plan": row.get("plan")}
        if self.routers is None or records is None or not self.training:
            return self.row_losses(embeddings, **learned, **given)
        with self.routers.watched() as seen:
            losses = self.row_losses(embeddings, **learned, **given)
        # The hooks have seen tokens as they ran.
        ran, at = self._row(embeddings, **given)  # as it ran, with a soft prompt in front
        return losses + self.routers.losses(seen, nodes=ran.nodes, at=at, records=records, padded=self.padded)

    def _idle_projector(self, idle: torch.Tensor) -> torch.Tensor:
        """() zero that hangs on every parameter of the projector, from the features of `_unseen`."""
        assert self.projector is not None
        nothing = self.image_embeddings(idle).sum() * 0
        if self.projector.line_end is not None:
            nothing = nothing + self.projector.line_end.sum().to(nothing) * 0
        return nothing

    def split(self) -> Split | None:
        """Body and head of the LLM, or None where they cannot be told apart; asked once."""
        if self._split is None:
            with evaluation_mode(self.llm):
                self._split = (split_head(self.llm),)
        return self._split[0]

    def row_losses(
        self,
        embeddings: torch.Tensor,
        *,
        positions: torch.Tensor,
        nodes: torch.Tensor,
        at: torch.Tensor,
        targets: torch.Tensor,
        ids: torch.Tensor | None = None,
        plan: RowPlan | None = None,
    ) -> torch.Tensor:
        """Cross-entropy of a packed row, as `row_logits` would give it, without ever holding all logits.

        Args:
            embeddings: (T, D). positions: (T,) of each token on its record's path.
            nodes: (K, 3) first token, length and parent of each.
            at: (S,) positions in the row whose next token is learned. targets: (S,) ids of those tokens.
            ids: (T,) of the tokens, negative for pictures; for models whose layers ask for them.
            plan: of the row's nodes, made before; None, or one of other nodes, for one that is made here.

        Returns:
            (S,) float32

        Raises:
            ModelError: the row has several nodes and the model cannot keep them apart.
        """
        parts = self.split()
        if parts is None:
            logits = self.row_logits(embeddings, positions=positions, nodes=nodes, at=at, ids=ids, plan=plan)
            return F.cross_entropy(logits.float(), targets, reduction="none")
        body, head = parts
        inputs, at = self._row(embeddings, positions, nodes, at, ids)
        if self.padded and is_flat(nodes):
            hidden = run_padded(body, inputs)
        else:
            hidden = run_row(body, inputs, plan=plan).last_hidden_state[0]
        return cross_entropy(hidden.index_select(0, at), head, targets)

    def row_logits(
        self,
        embeddings: torch.Tensor,
        *,
        positions: torch.Tensor,
        nodes: torch.Tensor,
        at: torch.Tensor,
        ids: torch.Tensor | None = None,
        plan: RowPlan | None = None,
    ) -> torch.Tensor:
        """Logits of a packed row.

        A row of one node is ordinary causal attention and needs nothing of the model; more nodes need mmit's
        attention function, or `padded`.

        Args:
            embeddings: (T, D). positions: (T,) of each token on its record's path.
            nodes: (K, 3) first token, length and parent of each.
            at: (S,) positions in the row.
            ids: (T,) of the tokens, negative for pictures; see `calls.call`.
            plan: see `row_losses`.

        Returns:
            (S, V)

        Raises:
            ModelError: the row has several nodes and the model cannot keep them apart.
        """
        check_rows(len(at))
        inputs, at = self._row(embeddings, positions, nodes, at, ids)
        if self.padded and is_flat(nodes):
            return run_padded(self.llm, inputs, at=at)
        return run_row(self.llm, inputs, at=at, plan=plan).logits[0]

    def _row(
        self,
        embeddings: torch.Tensor,
        positions: torch.Tensor,
        nodes: torch.Tensor,
        at: torch.Tensor,
        ids: torch.Tensor | None,
    ) -> tuple[RowInputs, torch.Tensor]:
        """The row with the soft prompt in its place, and where logits are wanted."""
        # Ids do not fit a row that a soft prompt stands in front of: they are then found out from the embeddings.
        prompt = virtual_tokens(self.llm) > 0
        alone = prompt and is_flat(nodes) and repeats_prompt(self.llm, padded=self.padded)
        embeddings, positions, nodes, at = with_prompt(self.llm, embeddings, positions, nodes, at, repeated=alone)
        return RowInputs(embeddings, positions, nodes, None if prompt else ids), at

    def run_padded(self) -> None:
        """From now on records of a row run side by side as a padded batch, with the model's own attention."""
        self.padded = True
        model: Any = self.llm.get_base_model() if isinstance(self.llm, PeftModel) else self.llm
        # mmit's attention knows rows and no padding; the batch takes what the model itself would use.
        if model.config._attn_implementation == NAME:
            model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")

    def check_isolation(self) -> None:
        """See for this very model that records of one row do not meet; takes five forwards of a few tokens.

        Convolutions, running states or attention of their own can mix neighbours behind the attention function's
        back. Two records share a row. The gradient of either one's logits with respect to the other's embeddings must
        be exactly zero, and changing one record must leave the logits of the other as they are, up to rounding. (Up to
        rounding, because a mixture of experts multiplies the tokens of all records together, and how many there are
        decides how a product rounds.) The logits of the second must be its logits alone. Dropout is off, except for
        one forward in train mode, in which attention refuses what it does not compute.

        Raises:
            ModelError: they meet, or the model cannot run packed rows.
        """
        words = self.llm.get_input_embeddings()  # called, not indexed: ZeRO-3 then brings the weights
        weight = self.word_embeddings
        vocabulary = shape(weight)[0]
        # From all over it: the first ids are often control tokens, with which a model does little and rounds much.
        ids = torch.arange(1, 13, device=weight.device) * max(vocabulary // 13, 1) % vocabulary
        other_first = torch.cat([ids[:6].flip(0), ids[6:]])
        other_second = torch.cat([ids[:6], ids[6:].flip(0)])
        nodes, at = torch.tensor([[0, 6, -1], [6, 6, -1]]), torch.arange(12, device=weight.device)
        positions = torch.arange(12, device=weight.device) % 6
        devices = [weight.device] if weight.device.type == "cuda" else []
        try:
            with training_mode(self), torch.no_grad(), torch.random.fork_rng(devices=devices):
                self.row_logits(words(ids), positions=positions, nodes=nodes, at=at)
            with evaluation_mode(self):
                with torch.no_grad():
                    changed_first, changed_second = (
                        self.row_logits(words(row), positions=positions, nodes=nodes, at=at)
                        for row in (other_first, other_second)
                    )
                    alone = self.row_logits(words(ids[6:]), positions=positions[:6], nodes=nodes[:1], at=at[:6])
                with torch.enable_grad():
                    embeddings = words(ids).detach().requires_grad_()
                    both = self.row_logits(embeddings, positions=positions, nodes=nodes, at=at)
                    apart = _apart(both, embeddings, border=6)
                both = both.detach()
        except torch.OutOfMemoryError:
            raise
        except CANNOT_RUN as error:
            raise ModelError(
                f"{type(self.llm).__name__} cannot run packed rows: {type(error).__name__}: {str(error)[:200]}",
                remedy="set data.packing=false",
            ) from error
        untouched = same_logits(changed_second[:6], both[:6]) and same_logits(changed_first[6:], both[6:])
        if not (apart and untouched):
            raise ModelError(
                f"records packed into one row of {type(self.llm).__name__} see each other",
                remedy="set data.packing=false for this architecture",
            )
        if not same_logits(both[6:], alone, typical=True):
            raise ModelError(
                f"{type(self.llm).__name__} answers a record differently in a packed row than alone: the positions it "
                "counts are not those of the record",
                remedy="set data.packing=false for this architecture",
            )

    def _meets_others(self) -> bool:
        """Whether the projector must run in every row: where it learns, and where ranks divide it, also without
        gradients."""
        if self.projector is None:
            return False
        return self.projector.training or any(map(is_part, self.projector.parameters()))

    def _unseen(self) -> torch.Tensor:
        """(1, N, D_v) features of nothing, which a row without pictures multiplies by zero.

        All ranks must touch every trained module, and in the same order: ZeRO sums gradients as they appear, and
        ZeRO-3 gathers weights as modules are called. A rank without pictures would wait for others than the rest.
        """
        assert self.projector is not None and self.vision is not None
        weight = next(self.projector.parameters())
        if any(p.requires_grad for p in self.vision.parameters()):
            return self.encode_images(
                torch.zeros(1, 3, *self.vision.image_size, dtype=torch.uint8, device=weight.device)
            )
        return torch.zeros(1, self.vision.tokens, self.vision.dim, dtype=weight.dtype, device=weight.device)


def same_logits(a: torch.Tensor, b: torch.Tensor, *, typical: bool = False) -> bool:
    """Whether two (S, V) tensors of logits differ by rounding alone.

    Root mean square as a share of the logits' spread. In bf16 SmolLM2 with one method or another was seen to round by
    up to 0.12; wrong positions differ by 0.9 and more.

    Args:
        typical: in fewer bits than 32 ask the middle token in place of the mean. For what would change all tokens:
            after a LoRA is merged, the second token of a record alone, which all others attend to, rounds by up to 1.
    """
    squares = (a - b).float().pow(2).mean(-1)
    whole = a.dtype == torch.float32
    found = squares.median() if typical and not whole else squares.mean()
    return bool(found.sqrt() <= (1e-3 if whole else 0.2) * b.float().std() + 1e-6)


def _apart(logits: torch.Tensor, embeddings: torch.Tensor, *, border: int) -> bool:
    """Whether nothing flows between the two records that meet at `border`: (T, V) logits of (T, D) embeddings.

    The factors differ from entry to entry, because the logits of a softmax-like head may have a gradient that sums to
    zero.
    """
    factors = torch.linspace(0.5, 1.5, logits.numel(), device=logits.device).view_as(logits).to(logits)
    scaled = logits * factors
    (of_first,) = torch.autograd.grad(scaled[:border].sum(), embeddings, retain_graph=True)
    (of_second,) = torch.autograd.grad(scaled[border:].sum(), embeddings)
    return not (of_first[border:].count_nonzero() or of_second[:border].count_nonzero())
