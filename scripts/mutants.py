"""Plant one fault at a time in a copy of the tree and see whether the tests that should find it do.

    python scripts/mutants.py [--only WORD] [--jobs N] [--results FILE] [--again]

Each mutant is an exact replacement of source that must stand in its file once, so that code which moved on fails
loudly, and names the tests that have to fail. Prints a table, and ends with 1 if a mutant survives. Results are kept
in FILE by the mutant and the content of its file and tests: a run that was interrupted goes on, `--again` begins anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("mmit", "tests", "configs", "assets", "scripts", "pyproject.toml", "README.md", "LICENSE")


class Mutant(NamedTuple):
    """One planted fault: in `file`, `old` becomes `new`; `tests` are those that have to fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str


ATTENTION, PLAN = "mmit/models/attention.py", "mmit/models/attention_plan.py"
PACKING, WALK = "mmit/data/packing.py", "mmit/data/row_order.py"
MIXTURE = "mmit/data/mixture.py"
RESUME, FOLDERS = "mmit/train/checkpoint/resume.py", "mmit/train/checkpoint/folders.py"
LOOP, SETUP, READER = "mmit/train/loop.py", "mmit/train/data/setup.py", "mmit/data/shards/reader.py"
LORA, TILES, FUSED = "mmit/models/tuning/lora.py", "mmit/data/tiles.py", "mmit/models/tuning/fused_lora.py"
T_ATTENTION, T_PACKING, T_WALK = (
    "tests/models/test_attention.py",
    "tests/data/test_packing.py",
    "tests/data/test_row_order.py",
)
T_MIXTURE, T_STATE, T_FOLDERS = (
    "tests/data/test_mixture.py",
    "tests/train/checkpoint/test_resume.py",
    "tests/train/checkpoint/test_folders.py",
)
T_LIFE, T_SHARDS, T_TILES = (
    "tests/train/test_lifetimes.py",
    "tests/data/shards/test_reader.py",
    "tests/data/test_tiles.py",
)
MEASURE, MARKS = "mmit/data/measure.py", "mmit/data/marks.py"
PICTURE_FILES = "mmit/data/picture_files.py"
T_MEASURE, T_MARKS = "tests/data/test_measure.py", "tests/data/test_marks.py"
KEYS = "mmit/data/formats/keys.py"
IDENTITY, T_IDENTITY = "mmit/train/checks/identity.py", "tests/train/checks/test_identity.py"
T_OBJECTIVE = "tests/train/test_objective.py"
T_KEYS, T_MEMBERS = "tests/data/formats/test_keys.py", "tests/data/shards/test_records.py"
T_FUSED, T_METRICS = "tests/models/tuning/test_fused_lora.py", "tests/eval/metrics"

MUTANTS = [
    # the mask of a packed row
    Mutant(
        "mask: one key too many",
        PLAN,
        "<= limit[:, :, None])[:, None]",
        "<= limit[:, :, None] + 1)[:, None]",
        T_ATTENTION,
    ),
    Mutant(
        "tree: log-sums of the node alone",
        "mmit/models/prefix_tree.py",
        "            level.queries.put(sums, total)\n",
        "",
        "tests/models/test_varlen.py",
    ),
    Mutant(
        "tree: gradient of the last part alone",
        "mmit/models/prefix_tree.py",
        "block.put(total, block.pick(total) + part)",
        "block.put(total, part)",
        "tests/models/test_varlen.py",
    ),
    Mutant(
        "mask: own token unseen",
        PLAN,
        "<= limit[:, :, None])[:, None]",
        "< limit[:, :, None])[:, None]",
        T_ATTENTION,
    ),
    Mutant(
        "mask: ancestors forgotten",
        PLAN,
        "paths.append(np.concatenate([paths[parent], np.arange(start, start + length)]))",
        "paths.append(np.arange(start, start + length))",
        T_ATTENTION,
    ),
    Mutant(
        "mask: parent's last token unseen",
        PLAN,
        "np.arange(start, start + length)]))",
        "np.arange(start, start + length - 1)]))",
        T_ATTENTION,
    ),
    Mutant(
        "mask: none for a long node with ancestors",
        PLAN,
        "or longest_q <= LONE,",
        "and longest_q <= LONE,",
        T_ATTENTION,
    ),
    Mutant(
        "plan: that of other nodes",
        ATTENTION,
        "if plan is None or (plan.nodes, plan.known) != (table, known):",
        "if plan is None:",
        "tests/models/test_planning.py",
    ),
    Mutant(
        "plan: without the soft prompt",
        "mmit/models/planning.py",
        "prompt=virtual_tokens(vlm.llm),",
        "prompt=0,",
        "tests/models/test_planning.py",
    ),
    # packing
    Mutant(
        "packing: positions from the row's start",
        PACKING,
        "positions.extend(range(depth, depth + length))",
        "positions.extend(range(start, start + length))",
        f"{T_PACKING} {T_ATTENTION}",
    ),
    Mutant(
        "packing: target of the token itself",
        PACKING,
        "targets.append(s.ids[i])",
        "targets.append(s.ids[i - 1])",
        f"{T_PACKING} {T_ATTENTION}",
    ),
    Mutant(
        "packing: predicted from the wrong place",
        PACKING,
        "node, j = path[i - 1]",
        "node, j = path[max(i - 2, 0)]",
        f"{T_PACKING} {T_ATTENTION}",
    ),
    Mutant(
        "packing: unsupervised tokens learnt",
        PACKING,
        "            if s.weights[i] > 0:\n                node, j",
        "            if s.weights[i] >= 0 and s.ids[i] >= 0 and i <= len(path):\n                node, j",
        f"{T_PACKING} {T_ATTENTION}",
    ),
    Mutant(
        "packing: rows may overflow", PACKING, "room = capacity - shared", "room = capacity - shared + 1", T_PACKING
    ),
    Mutant("packing: different pictures are shared", PACKING, "return -width, image", "return -width, None", T_PACKING),
    Mutant(
        "packing: a row in another order", PACKING, "for p in sorted(row)])", "for p in row])", f"{T_PACKING} {T_WALK}"
    ),
    # order
    Mutant(
        "order: epoch forgotten",
        MIXTURE,
        "    rng = np.random.Generator(np.random.PCG64([seed, epoch]))\n    pairs",
        "    rng = np.random.Generator(np.random.PCG64([seed, 0]))\n    pairs",
        T_MIXTURE,
    ),
    Mutant(
        "order: seed forgotten",
        MIXTURE,
        "    rng = np.random.Generator(np.random.PCG64([seed, epoch]))\n    pairs",
        "    rng = np.random.Generator(np.random.PCG64([0, epoch]))\n    pairs",
        T_MIXTURE,
    ),
    Mutant(
        "order: a fraction repeats units",
        MIXTURE,
        "replace=False) if size else 0",
        "replace=True) if size else 0",
        T_MIXTURE,
    ),
    Mutant("order: not shuffled", MIXTURE, "    rng.shuffle(order)\n    return order", "    return order", T_MIXTURE),
    Mutant(
        "order: ranks take the same rows",
        WALK,
        "range(first + rank, first + self.rows_per_step, world)",
        "range(first, first + self.rows_per_step, world)",
        T_WALK,
    ),
    Mutant("order: a resumed walk is one row on", WALK, '"first_row": first,', '"first_row": first + 1,', T_WALK),
    Mutant(
        "order: the end is one row late",
        WALK,
        "if position >= self.total_rows:\n            return None",
        "if position > self.total_rows:\n            return None",
        T_WALK,
    ),
    # resume
    Mutant("resume: random state not restored", RESUME, 'torch.set_rng_state(state["cpu"])', "pass", T_STATE),
    Mutant(
        "resume: random state of rank 0 everywhere",
        RESUME,
        'load_file(trainer / f"rng-{engine.rank}.safetensors")',
        'load_file(trainer / "rng-0.safetensors")',
        T_STATE,
    ),
    Mutant(
        "resume: optimizer not restored",
        RESUME,
        'engine.load_state(folder / "trainer")',
        "pass",
        "tests/train/test_run.py -k resume",
    ),
    Mutant(
        "resume: later checkpoints stay",
        RESUME,
        "        if folders.step_of(folder) > step:\n            name",
        "        if False:\n            name",
        T_STATE,
    ),
    Mutant(
        "resume: the present one set aside too",
        RESUME,
        "        if folders.step_of(folder) > step:\n            name",
        "        if folders.step_of(folder) >= step:\n            name",
        T_STATE,
    ),
    Mutant(
        "resume: the best is pruned",
        RESUME,
        "        if folders.step_of(old) == best:\n            continue",
        "        if False:\n            continue",
        T_STATE,
    ),
    Mutant(
        "resume: one too few kept",
        RESUME,
        "folders.checkpoints(run_dir)[:-keep]",
        "folders.checkpoints(run_dir)[: 1 - keep or None]",
        T_STATE,
    ),
    # checkpoints
    Mutant("checkpoint: hash not compared", FOLDERS, "if _hash(path) != sha256:", "if False:", T_FOLDERS),
    Mutant(
        "checkpoint: size not compared",
        FOLDERS,
        "if path.stat().st_size != size:",
        "if False:",
        "tests/train/checkpoint/test_verify.py",
    ),
    Mutant(
        "checkpoint: unlisted files pass",
        FOLDERS,
        "not in files:  # DeepSpeed",
        "in ():  # DeepSpeed",
        "tests/train/checkpoint/test_verify.py",
    ),
    Mutant(
        "checkpoint: draft left on a full disk",
        FOLDERS,
        "            shutil.rmtree(draft, ignore_errors=True)\n        if failure",
        "            pass\n        if failure",
        f"{T_FOLDERS} {T_LIFE}",
    ),
    Mutant(
        "checkpoint: the oldest whole one is taken",
        FOLDERS,
        "for folder in reversed(checkpoints(run_dir)):",
        "for folder in checkpoints(run_dir):",
        "tests/train/checkpoint/test_verify.py",
    ),
    # bad records
    Mutant(
        "bad records: ceiling plus one",
        LOOP,
        "if len(progress.bad) > data.max_bad:",
        "if len(progress.bad) > data.max_bad + 1:",
        T_LIFE,
    ),
    Mutant(
        "bad records: ceiling doubled at start",
        SETUP,
        "if len(scan.bad) > most_bad(self.max_fraction, scan.records):",
        "if len(scan.bad) > 2 * most_bad(self.max_fraction, scan.records):",
        T_LIFE,
    ),
    Mutant(
        "bad records: every encounter counts",
        LOOP,
        "new = [number for number in met if number not in known]",
        "new = list(met)",
        T_LIFE,
    ),
    Mutant(
        "bad records: ranks do not agree",
        LOOP,
        "found = map(int, engine.all_sum(table))",
        "found = map(int, new)",
        T_LIFE,
    ),
    # shards
    Mutant("shards: crc32 not compared", READER, "if zlib.crc32(piece) != m[_CRC]:", "if False:", T_SHARDS),
    Mutant(
        "shards: crc32 skipped from 8 KiB on",
        READER,
        "if zlib.crc32(piece) != m[_CRC]:",
        "if len(piece) < 8192 and zlib.crc32(piece) != m[_CRC]:",
        T_SHARDS,
    ),
    Mutant("shards: cut members pass", READER, "if len(piece) < end - begin:", "if False:", T_SHARDS),
    Mutant(
        "shards: an archive's end is not verified",
        READER,
        'if (crc, length) != (shard["crc32"], shard["size"]):',
        'if length > shard["size"]:',
        T_SHARDS,
    ),
    # what tells pictures and answers from others
    Mutant(
        "pictures: a constant stamp",
        PICTURE_FILES,
        "return ((found.st_mtime_ns * 1_000_003) ^ found.st_size) & (2**62 - 1) | 2**62",
        "return 2**62",
        T_MEASURE,
    ),
    Mutant(
        "pictures: size left out of the stamp",
        PICTURE_FILES,
        "((found.st_mtime_ns * 1_000_003) ^ found.st_size)",
        "(found.st_mtime_ns * 1_000_003)",
        T_MEASURE,
    ),
    Mutant(
        "pictures: a file that changed is known",
        PICTURE_FILES,
        ' or self._known["stamps"][at] != now',
        "",
        T_MEASURE,
    ),
    Mutant(
        "boxes: a user's letters become tokens",
        "mmit/data/chat_turns.py",
        "if part.token else before.marks",
        "if part.text.startswith('<|') else before.marks",
        "tests/data/test_box_tokens.py",
    ),
    Mutant(
        "pictures: one mark for all",
        MARKS,
        'return hashlib.blake2b(b"%d " % size + ends, digest_size=16).digest()',
        'return b"x" * 16',
        T_MARKS,
    ),
    Mutant("pictures: size left out of the mark", MARKS, 'b"%d " % size + ends', "ends", T_MARKS),
    Mutant("pictures: the end is not looked at", MARKS, "ends += file.read(ENDS)", "pass", T_MARKS),
    Mutant(
        "thoughts: one that does not end is an answer",
        "mmit/data/formats/thoughts.py",
        "    if not end:",
        "    if False:",
        "tests/data/formats/test_thoughts.py",
    ),
    Mutant(
        "thoughts: the mark of a question is read",
        "mmit/data/formats/thoughts.py",
        'if turn.role == "assistant" else turn',
        "",
        "tests/data/formats/test_thoughts.py",
    ),
    Mutant(
        "pictures: those of a record do not count",
        MARKS,
        "digest.update(mark)",
        "pass",
        T_MARKS,
    ),
    Mutant(
        "answers: number format not compared",
        "mmit/eval/answers.py",
        "if NUMBERS not in found and NUMBERS in changed:",
        "if NUMBERS in changed:",
        "tests/eval/test_runner.py",
    ),
    # LoRA
    Mutant("LoRA: scale forgotten", FUSED, "addmm_(inner, b.t(), alpha=scale)", "addmm_(inner, b.t())", T_FUSED),
    Mutant("LoRA: slope of A without scale", FUSED, "slope = (grad @ b).mul_(ctx.scale)", "slope = grad @ b", T_FUSED),
    Mutant(
        "LoRA: slope of B without scale",
        FUSED,
        "(grad.t() @ inner).mul_(ctx.scale) if needs[4]",
        "(grad.t() @ inner) if needs[4]",
        T_FUSED,
    ),
    Mutant(
        "LoRA: nothing reaches below",
        FUSED,
        "(grad @ weight).addmm_(slope, a) if needs[0]",
        "(grad @ weight) if needs[0]",
        T_FUSED,
    ),
    Mutant(
        "LoRA: dropout skipped in training",
        FUSED,
        "type(dropout) is nn.Dropout and not dropout.training",
        "type(dropout) is nn.Dropout",
        T_FUSED,
    ),
    Mutant(
        "LoRA: a continued adapter stays frozen",
        LORA,
        "parameter.requires_grad_(prefix in name)",
        "parameter.requires_grad_(False)",
        "tests/models/test_tuning.py",
    ),
    # tiles
    Mutant(
        "tiles: rows and columns swapped",
        TILES,
        "for y in range(rows) for x in range(columns)]",
        "for x in range(columns) for y in range(rows)]",
        T_TILES,
    ),
    Mutant(
        "tiles: thumbnail at the other end",
        TILES,
        'return [whole, *out] if tiling.thumbnail == "first" else [*out, whole]',
        'return [whole, *out] if tiling.thumbnail == "last" else [*out, whole]',
        T_TILES,
    ),
    Mutant("tiles: line ends not counted", TILES, "kept[2] * (kept[3] + line_ends)", "kept[2] * kept[3]", T_TILES),
    Mutant("tiles: the larger of equal grids", TILES, "0.5 * tile * tile", "0.0 * tile * tile", T_TILES),
    Mutant("tiles: rounded down", TILES, "math.ceil(picture.width * scale)", "int(picture.width * scale)", T_TILES),
    # metrics and schedule
    Mutant(
        "metrics: Wilson without continuity of its centre",
        "mmit/eval/metrics/intervals.py",
        "centre = (p + z2 / (2 * n))",
        "centre = (p + z2 / n)",
        T_METRICS + "/test_intervals.py",
    ),
    Mutant(
        "metrics: articles kept",
        "mmit/eval/metrics/vqa.py",
        "for word in words if word not in _ARTICLES)",
        "for word in words)",
        T_METRICS + "/test_vqa.py",
    ),
    Mutant(
        "metrics: all references must be equal",
        "mmit/eval/metrics/text.py",
        "else any(p == expect(x) for x in options_of(",
        "else all(p == expect(x) for x in options_of(",
        T_METRICS + "/test_exact.py",
    ),
    Mutant(
        "schedule: warm-up one step late",
        "mmit/train/schedule.py",
        "return (step + 1) / warm",
        "return step / warm",
        "tests/train/test_schedule.py",
    ),
    Mutant(
        "loss: summed into the wrong source",
        "mmit/train/data/batches.py",
        "torch.tensor(starts[1:], dtype=torch.int64), right=True)",
        "torch.tensor(starts[1:], dtype=torch.int64), right=False)",
        "tests/train/monitor/test_watching.py",
    ),
    Mutant(
        "own code: a checkpoint is not asked about",
        "mmit/train/checkpoint/model.py",
        "refuse_own_code(own_code(config, meta), where=str(path), allowed=allow_code)",
        "refuse_own_code({}, where=str(path), allowed=allow_code)",
        "tests/test_plugins.py",
    ),
    Mutant(
        "own code: what is kept of data hangs on the name alone",
        "mmit/data/sources.py",
        "([] if native else [format_code(format)])",
        "([] if native else [format])",
        "tests/test_plugins.py",
    ),
    Mutant(
        "decoding: keys from before the switch of longrope stay",
        "mmit/models/decoding.py",
        "- 1 == state.turn:",
        "- 1 == -5:",
        "tests/models/test_decoding.py",
    ),
    # serving
    Mutant(
        "serve: a prompt's last token is taken for known",
        "mmit/models/prefix_cache.py",
        "for start in range(0, len(tokens) - BLOCK, BLOCK):",
        "for start in range(0, len(tokens) - BLOCK + 1, BLOCK):",
        "tests/models/test_prefix_cache.py",
    ),
    Mutant(
        "serve: the text of a growing answer is kept up to the middle of a character",
        "mmit/data/answers.py",
        'if head.strip() and not head.endswith("\\ufffd"):',
        "if head.strip():",
        "tests/data/test_answers.py",
    ),
    Mutant(
        "serve: what is decoded of a growing answer begins a text of its own",
        "mmit/data/answers.py",
        "self._decode([*self._before, *new])[len(self._head) :]",
        "self._decode(new)",
        "tests/data/test_answers.py",
    ),
    Mutant(
        "serve: a node hangs below what is known of its parent, not below all of it",
        "mmit/models/prefix_cache.py",
        "above = last[n] if held and not wanted else",
        "above = last[n] if last[n] >= 0 else",
        "tests/models/test_prefix_cache.py",
    ),
    Mutant(
        "serve: queries of known tokens are not counted off",
        PLAN,
        "queries[g, :length] = own - known",
        "queries[g, :length] = own",
        "tests/models/test_prefix_cache.py",
    ),
    Mutant(
        "serve: who moves into a place brings no keys",
        "mmit/models/batch_cache.py",
        "window.index_copy_(0, target, window.index_select(0, source))",
        "pass",
        "tests/serve/test_engine.py",
    ),
    Mutant(
        "serve: every answer draws with the first one's numbers",
        "mmit/serve/engine.py",
        "sampling.generator(n), limit)",
        "sampling.generator(0), limit)",
        "tests/serve/test_engine.py",
    ),
    Mutant(
        "serve: one public address of a host lets all of them in",
        "mmit/serve/fetch.py",
        "not all(is_public(address) for address in addresses)",
        "not any(is_public(address) for address in addresses)",
        "tests/serve/test_fetch.py",
    ),
    Mutant(
        "serve: a host is looked up again when it is connected to",
        "mmit/serve/fetch.py",
        "socket.create_connection((address, target.port)",
        "socket.create_connection((target.host, target.port)",
        "tests/serve/test_fetch.py",
    ),
    Mutant(
        "serve: an image is decoded before its size is looked at",
        "mmit/serve/images.py",
        "        if width * height > self.pixels:",
        "        load_fast(Image(content))\n        if width * height > self.pixels:",
        "tests/serve/test_app.py",
    ),
    Mutant(
        "serve: an uploaded file is everybody's",
        "mmit/serve/images.py",
        "found is None or found.owner != owner",
        "found is None",
        "tests/serve/test_app.py",
    ),
    Mutant(
        "serve: who leaves is answered to the end",
        "mmit/serve/live.py",
        "            self.answering.cancel()",
        "            pass",
        "tests/serve/test_app.py",
    ),
    Mutant(
        "serve: pages of every site may ask",
        "mmit/serve/app.py",
        'if foreign and not {origin, "*"}',
        'if foreign and origin == "" and not {origin, "*"}',
        "tests/serve/test_app.py",
    ),
    Mutant(
        "serve: a body is held whatever its size",
        "mmit/serve/app.py",
        "        if size > most:\n            headers",
        "        if size < 0:\n            headers",
        "tests/serve/test_app.py",
    ),
    Mutant(
        "serve: the token that ends a stop text is told",
        "mmit/serve/answering.py",
        'return "stop"  # the token\'s',
        "pass  # the token's",
        "tests/serve/test_engine.py",
    ),
    Mutant(
        "serve: a step is run with the adapter that worked last",
        "mmit/serve/engine.py",
        "lane.model.activate()",
        "pass",
        "tests/serve/test_adapters.py",
    ),
    Mutant(
        "serve: an answer is remembered under one token too many",
        "mmit/generate/runner.py",
        "[range(width - length, width)]",
        "[range(width - length - 1, width - 1)]",
        "tests/models/test_prefix_cache.py",
    ),
    # keys with a meaning
    Mutant(
        "keys: a thought of a turn is not read",
        KEYS,
        '("reasoning_content", "reasoning", "thinking", "thought"), "thinking")',
        '("reasoning_content", "reasoning", "thinking"), "thinking")',
        T_KEYS,
    ),
    Mutant(
        "keys: any role may have tool calls and thoughts",
        KEYS,
        'owner = "tool" if meaning in ("name", "tool_call_id") else "assistant"',
        "owner = role",
        T_KEYS,
    ),
    Mutant(
        "keys: a list that is refused is kept",
        KEYS,
        "if key in REFUSED and not _empty(value) and value is not False:",
        "if key in REFUSED and isinstance(value, str) and value:",
        T_KEYS,
    ),
    Mutant(
        "keys: the weight of a row is checked and forgotten",
        KEYS,
        "return replace(record, weight=record.weight * _weight(value, f\"'{key}'\"))",
        "return replace(record, weight=record.weight * _weight(value, f\"'{key}'\") ** 0)",
        T_KEYS,
    ),
    Mutant(
        "keys: those of turns are not reported",
        KEYS,
        'kept.update(f"turns: {key}" for key in names)',
        "kept.update(())",
        T_KEYS,
    ),
    Mutant(
        "keys: a mark of a bad answer is kept",
        KEYS,
        "no = value is False or",
        "no = value is None or",
        T_KEYS,
    ),
    Mutant(
        "keys: conversations in shards go past the table",
        "mmit/data/shards/records.py",
        'record = read_keys(CONVERSATIONS[format].row(row, image_root=""))',
        'record = CONVERSATIONS[format].row(row, image_root="")',
        T_MEMBERS,
    ),
    Mutant(
        "keys: interleaved documents go past the table",
        "mmit/data/shards/records.py",
        "record = _placed(lambda: read_keys(record), where)",
        "record = _placed(lambda: record, where)",
        T_MEMBERS,
    ),
    # preferences
    Mutant(
        "preferences: a bad answer is learnt as a good one",
        "mmit/train/objective.py",
        "sign = torch.where(items.good, 1.0, -1.0)",
        "sign = torch.where(items.good, 1.0, 1.0)",
        T_OBJECTIVE,
    ),
    Mutant(
        "preferences: a model counts as not having moved",
        "mmit/train/objective.py",
        "return Shared(moved=max(moved / (count or 1.0), 0.0))",
        "return Shared(moved=0.0)",
        T_OBJECTIVE,
    ),
    Mutant(
        "preferences: the turns before the answer are learnt too",
        "mmit/data/preference.py",
        "prompt = tuple(weighed(turn, 0.0) for turn in record.turns[:-1])",
        "prompt = record.turns[:-1]",
        T_OBJECTIVE,
    ),
    Mutant(
        "preferences: a resumed run measures its reference with trained weights",
        "mmit/train/reference.py",
        "if begin is not None:",
        "if begin is not None and not method.referenced:",
        T_OBJECTIVE,
    ),
    # what a language model does beyond body and head
    Mutant(
        "router loss: places of another record in a padded batch",
        "mmit/models/routers.py",
        "row * nodes[:, 1].max()",
        "row * nodes[:, 1].min()",
        "tests/models/test_routers.py",
    ),
    Mutant(
        "router loss: of a record's first target alone",
        "mmit/models/routers.py",
        "if len(path) > len(ends.get(record, ())):",
        "if record not in ends:",
        "tests/models/test_routers.py",
    ),
    Mutant(
        "DeepStack: added to the last layers",
        "mmit/models/deepstack.py",
        "return list(lists[0])[:levels]",
        "return list(lists[0])[-levels:]",
        "tests/models/test_deepstack.py",
    ),
    Mutant(
        "DeepStack: the first layer read gives the image tokens",
        "mmit/models/projectors.py",
        "*inner, last = features.chunk",
        "last, *inner = features.chunk",
        "tests/models/test_deepstack.py",
    ),
    Mutant(
        "Falcon-H1: embeddings without their factor",
        "mmit/models/words.py",
        "table.embed_scale = float(getattr(body, key))",
        "table.embed_scale = 1.0",
        "tests/models/test_families.py",
    ),
    Mutant(
        "export: a change of logits without a known key is not seen",
        "mmit/models/interop/holds.py",
        'return None if seen["made"] is logits else AFTER_HEAD',
        "return None",
        "tests/interop/test_holds.py",
    ),
    # building data with teachers
    Mutant(
        "build: a budget that never ends",
        "mmit/teachers/desk.py",
        "                if spent := self._spent():\n                    return\n",
        "",
        "tests/teachers/test_endpoint.py",
    ),
    Mutant(
        "build: always five captions",
        "mmit/build/conversations.py",
        "    count = len(scene.captions)\n",
        "    count = 5\n",
        "tests/build/test_conversations.py",
    ),
    Mutant(
        "build: sources let through",
        "mmit/build/conversations.py",
        "    if not reason and any(SOURCES.search(turn.text) for turn in turns):",
        "    if not reason and any(SOURCES.search(turn.text) for turn in turns[:0]):",
        "tests/build/test_conversations.py",
    ),
    Mutant(
        "build: denials read as claims",
        "mmit/build/facts.py",
        "found.append((name, match[1].lower(), not denied))",
        "found.append((name, match[1].lower(), True))",
        "tests/build/test_conversations.py",
    ),
    Mutant(
        "build: one question about two images is one",
        "mmit/build/select.py",
        '    return "|".join(image_name(image) for image in record.images)',
        '    return ""',
        "tests/build/test_select.py",
    ),
    Mutant(
        "build: a control larger than the selection",
        "mmit/build/select.py",
        ".sample(usable, min(count, len(usable)))",
        ".sample(usable, len(usable))",
        "tests/build/test_select.py",
    ),
    Mutant(
        "build: questions that need no image kept",
        "mmit/build/self_instruct.py",
        "same_words(reply.text, other.text)",
        "not other.text",
        "tests/build/test_self_instruct.py",
    ),
    Mutant(
        "build: numbers of a list may repeat",
        "mmit/build/parsers.py",
        '        reason = "" if value > last else "the list\'s numbers repeat"\n',
        '        reason = ""\n',
        "tests/build/test_parsers.py",
    ),
    Mutant(
        "build: thoughts left in answers",
        "mmit/teachers/desk.py",
        "        return replace(entry.reply, text=answer, thought=thought) if thought or not answer else entry.reply",
        "        return entry.reply",
        "tests/build/test_outputs.py",
    ),
    Mutant(
        "build: what is not recorded is journalled",
        "mmit/teachers/desk.py",
        '            if reply.finish == "unrecorded":',
        '            if reply.finish == "never":',
        "tests/cli/test_build_teachers.py",
    ),
    Mutant(
        "build: batches are sent after an error",
        "mmit/build/executor.py",
        "while failed is None and (taken",
        "while (taken",
        "tests/build/test_executor.py",
    ),
    Mutant(
        "evaluated endpoint: a refused question counts as a wrong answer",
        "mmit/eval/endpoint.py",
        'if reply.finish == "refused" or',
        'if reply.finish == "never" or',
        "tests/eval/test_judges.py",
    ),
    Mutant(
        "judge: a reply without a score is asked for with the same seed and taken as nothing",
        "mmit/eval/judges.py",
        "if len(done) == len(prompts):",
        "if attempt:",
        "tests/eval/test_judges.py",
    ),
    Mutant(
        "devices: every process of a launcher takes the first GPU",
        "mmit/models/llm.py",
        'torch.device("cuda", int(rank) % torch.cuda.device_count())',
        'torch.device("cuda", 0)',
        "tests/models/test_llm.py",
    ),
    Mutant(
        "help leaves out a tuning method",
        "mmit/kinds.py",
        '        "houlsby": "bottleneck adapters",\n',
        "",
        "tests/test_kinds.py",
    ),
    Mutant(
        "ROUGE-L: two texts without words are alike",
        "mmit/data/diversity.py",
        "values: np.ndarray = 2 * common / lengths",
        "values: np.ndarray = (2 * common + (lengths == 1)) / lengths",
        "tests/data/test_diversity.py",
    ),
    Mutant(
        "pages: a title is HTML",
        "mmit/pages/page.html",
        "<title>{{ title }}</title>",
        "<title>{{ title | safe }}</title>",
        "tests/data/test_viewer.py",
    ),
    # the same run, or another
    Mutant(
        "identity: changed code of an own part goes on",
        IDENTITY,
        "if key in new and old[key] != new[key]",
        "if key in new and old[key] != old[key]",
        T_IDENTITY,
    ),
    Mutant(
        "identity: a changed DeepSpeed JSON is not said",
        IDENTITY,
        'then["name"] != now["name"]',
        'then["name"] == now["name"]',
        T_IDENTITY,
    ),
    Mutant(
        "identity: what differs is allowed without a word",
        IDENTITY,
        'elif kind != "silent":',
        'elif kind not in ("silent", "free"):',
        T_IDENTITY,
    ),
    Mutant(
        "identity: alpha counts as changing rounding alone",
        IDENTITY,
        '"train.micro_rows", "train.checkpointing",',
        '"train.micro_rows", "tune.*.options.alpha", "train.checkpointing",',
        T_IDENTITY,
    ),
    Mutant(
        "best: one by another metric stays",
        RESUME,
        'metric not in (None, progress.best["metric"])',
        "metric in ()",
        "tests/train/monitor/test_watching.py",
    ),
    Mutant(
        "pictures: the middle of a BMP is not read",
        MARKS,
        'ends.startswith(b"BM")',
        'ends.startswith(b"--")',
        T_MARKS,
    ),
    # builds
    Mutant(
        "build: two at a time in one folder",
        "mmit/build/write.py",
        "lock = nullcontext() if resumed else",
        "lock = nullcontext() if out.name else",
        "tests/build/test_build_lifetimes.py",
    ),
    Mutant(
        "build: a draft of a killed one stays",
        "mmit/build/write.py",
        "shutil.rmtree(draft, ignore_errors=True)  # of a build that was killed",
        "draft = draft.with_name(f'{draft.name}{os.getpid()}')",
        "tests/build/test_build_lifetimes.py",
    ),
    Mutant(
        "text: a data card as it came",
        "mmit/build/write.py",
        "plain(_card(counts, stated.config))",
        "str(_card(counts, stated.config))",
        "tests/test_text.py",
    ),
    Mutant(
        "tests: a folder called build is not collected",
        "pyproject.toml",
        'norecursedirs = [".*", ',
        'norecursedirs = [".*", "build", ',
        "tests/test_hygiene.py",
    ),
    Mutant(
        "hold-out: an image is known by its file's name",
        "mmit/build/holdout.py",
        "hashlib.sha256(Path(source).read_bytes()).hexdigest()",
        "hashlib.sha256(Path(source).name.encode()).hexdigest()",
        "tests/build/test_holdout.py",
    ),
    Mutant(
        "annotated: an image is set aside by where it lies",
        "mmit/build/annotated.py",
        "name = os.path.basename(next(iter(_image_names(row)), str(number)))",
        "name = next(iter(_image_names(row)), str(number))",
        "tests/build/test_holdout.py",
    ),
    Mutant(
        "workers: those that ignore SIGTERM cannot be ended",
        "mmit/processes.py",
        "            self.kill()",
        "            super().terminate()",
        "tests/test_processes.py",
    ),
    Mutant(
        "isolation: methods of one's own are not asked",
        "mmit/train/parts.py",
        "apart=method_of(config.tune.llm.mode).by_token",
        "apart=True",
        "tests/test_plugins.py",
    ),
    Mutant(
        "report: a damaged line is taken for a row",
        "mmit/train/monitor/run_files.py",
        "if missing := [name for name in needed if name not in row]:",
        "if missing := [name for name in needed if name == row]:",
        "tests/train/monitor/test_run_files.py",
    ),
    # models of others
    Mutant(
        "layers that choose their keys: run by packed attention",
        "mmit/models/llm.py",
        " or chosen_keys(config.get_text_config()):",
        ":",
        "tests/models/test_families.py",
    ),
    Mutant(
        "fused towers: all with the constants of the first",
        "mmit/train/checkpoint/portable.py",
        '"mean": encoder.mean, "std": encoder.std',
        '"mean": vision.mean, "std": vision.std',
        "tests/interop/test_read_prismatic_fused.py",
    ),
    Mutant(
        "Pixtral: smaller pictures are enlarged",
        "mmit/data/native.py",
        "    if ratio > 1:",
        "    if ratio != 1:",
        "tests/data/test_native.py",
    ),
]


def main() -> int:
    """Run the mutants that are asked for; 1 if one survives, 2 if one cannot be planted or a test fails without it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a word in the name or the file")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at once")
    parser.add_argument("--results", type=Path, default=Path(tempfile.gettempdir()) / "mmit-mutants.jsonl")
    parser.add_argument("--again", action="store_true", help="forget the results that are on file")
    given = parser.parse_args()
    wanted = [m for m in MUTANTS if given.only in m.name or given.only in m.file]
    lost = [f"{m.name}: its anchor stands {count(m)} times in {m.file}" for m in wanted if count(m) != 1]
    if lost:
        print("\n".join(lost), file=sys.stderr)
        return 2
    if given.again:
        given.results.unlink(missing_ok=True)
    rows = given.results.read_text().splitlines() if given.results.exists() else []
    known = {row["key"]: row for row in map(json.loads, rows)}
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(given.jobs) as pool:
        found = list(pool.map(lambda m: known.get(key(m)) or noted(run(m, Path(scratch)), given.results), wanted))
        print(f"{'mutant':<52} {'outcome':<10} {'seconds':>7}  found by")
        for row in found:
            print(f"{row['name']:<52} {row['outcome']:<10} {row['seconds']:>7.1f}  {row['by']}")
    left = [row["name"] for row in found if row["outcome"] == "survived"]
    broken = [row["name"] for row in found if row["outcome"] == "broken"]
    print(f"{len(found) - len(left) - len(broken)} of {len(found)} found, {len(left)} survive, {len(broken)} broken")
    return 2 if broken else 1 if left else 0


def count(mutant: Mutant) -> int:
    """How often the anchor stands in the file."""
    path = ROOT / mutant.file
    return path.read_text(encoding="utf-8").count(mutant.old) if path.exists() else 0


def key(mutant: Mutant) -> str:
    """What decides a result: the mutant, its file and its tests."""
    digest = hashlib.sha256(repr(mutant).encode() + (ROOT / mutant.file).read_bytes())
    for word in mutant.tests.split():
        path = ROOT / word
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path] if path.is_file() else []:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def run(mutant: Mutant, scratch: Path) -> dict[str, object]:
    """Plant a mutant in a copy and run its tests there."""
    copy = Path(tempfile.mkdtemp(dir=scratch))
    for name in COPIED:
        source = ROOT / name
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, copy / name, ignore=skip) if source.is_dir() else shutil.copy(source, copy / name)
    path = copy / mutant.file
    path.write_text(path.read_text(encoding="utf-8").replace(mutant.old, mutant.new), encoding="utf-8")
    began = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    words = [word for word in mutant.tests.split()]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "--basetemp",
        str(copy / "tmp"),
        *words,
    ]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=1800)
    seconds = time.monotonic() - began
    failed = next((line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))), "")
    by = failed.partition(" - ")[0].removeprefix("FAILED ")
    # 1: a test failed. Anything else, such as no test or an error of collection, shows nothing.
    outcome = {0: "survived", 1: "found"}.get(done.returncode, "broken")
    if outcome == "broken":
        by = (done.stdout + done.stderr)[-300:].replace("\n", " ")
    shutil.rmtree(copy, ignore_errors=True)
    return {"key": key(mutant), "name": mutant.name, "outcome": outcome, "seconds": seconds, "by": by}


def noted(row: dict[str, object], results: Path) -> dict[str, object]:
    """Keep a result at once."""
    with open(results, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    return row


if __name__ == "__main__":
    sys.exit(main())
