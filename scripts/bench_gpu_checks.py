"""The sections of bench_gpu.py that say whether mmit is right on a device; each yields lines of its table."""

from __future__ import annotations

import copy
import importlib.util
import os
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_gpu_models import (
    BF16,
    CPU,
    Bench,
    Finding,
    Micro,
    answers,
    make_llm,
    make_micro,
    make_vlm,
    run_steps,
    tune,
    verdict,
)

from mmit.models import varlen
from mmit.models.attention import forest_attention
from mmit.models.attention_plan import make_plan
from mmit.models.llm import load_llm, why_not_4bit
from mmit.models.vlm import VLM
from mmit.train.checkpoint.saving import CpuCopy
from mmit.train.data.batches import Upload
from mmit.train.determinism import deterministic


def states_of(micro: Micro, heads: tuple[int, int, int]) -> list[torch.Tensor]:
    """Queries, keys and values in bf16 numbers, on the CPU in float64: (1, H or KV, T, D)."""
    draw = torch.Generator().manual_seed(0)
    h, kv, size = heads
    shapes = [(1, n, len(micro.row.input_ids), size) for n in (h, kv, kv)]
    return [torch.randn(shape, dtype=torch.float64, generator=draw).to(BF16).double() for shape in shapes]


def attend(bench: Bench, micro: Micro, states: list[torch.Tensor], to: tuple[torch.device, torch.dtype]) -> list[Any]:
    """Output and gradients on a device in a type."""
    leaves = [x.to(*to).requires_grad_() for x in states]
    out = forest_attention(*leaves, make_plan(micro.row.nodes).to(to[0]), states[0].shape[-1] ** -0.5)
    up = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).to(BF16)
    return [out.detach(), *torch.autograd.grad(out, leaves, up.to(*to))]


def check_kernel(bench: Bench) -> Iterator[Finding]:
    """The variable-length kernel in half precision and the buckets in float32, against float64 on the CPU."""
    for name, one in (("flat", False), ("shared", True)):
        micro = make_micro(bench.sizes, 6, text=160, pictures=one, one=one, share=one)
        for heads in ((8, 8, 64), (8, 2, 128), (4, 4, 256), (4, 4, 80)):
            states = states_of(micro, heads)
            want = attend(bench, micro, states, (CPU, torch.float64))
            for dtype, bound in ((BF16, 0.03), (torch.float16, 0.03), (torch.float32, 1e-4)):
                got = attend(bench, micro, states, (bench.device, dtype))
                errors = [
                    float((a.double().cpu() - b).abs().max() / b.abs().max()) for a, b in zip(got, want, strict=True)
                ]
                used = "kernel" if varlen.usable(states[0].to(bench.device, dtype)) else "buckets"
                label = f"{name}, {heads[0]}/{heads[1]} heads of {heads[2]}, {str(dtype)[6:]}"
                told = f"{used}: errors of out, dq, dk, dv " + " ".join(f"{e:.1e}" for e in errors)
                yield Finding(label, verdict(max(errors) < bound), told, f"< {bound}")


def check_isolation(bench: Bench) -> Iterator[Finding]:
    """Nothing of a record reaches another."""
    micro = make_micro(bench.sizes, 4, pictures=False, share=False)
    cut = int(micro.row.nodes[1, 0])
    q, k, v = (x.to(bench.device, BF16).requires_grad_() for x in states_of(micro, (8, 8, 64)))
    plan = make_plan(micro.row.nodes).to(bench.device)
    out = forest_attention(q, k, v, plan, 0.125)
    worst = max(float(g[:, :, cut:].abs().max()) for g in torch.autograd.grad(out[:, :cut].sum(), (q, k, v)))
    for x in (k, v):
        x.data[:, :, cut:].normal_()
    same = torch.equal(forest_attention(q, k, v, plan, 0.125)[:, :cut], out[:, :cut])
    yield Finding(
        "attention", verdict(worst == 0 and same), f"largest gradient {worst}, output unchanged {same}", "0.0, True"
    )
    for dtype in (BF16, torch.float32):
        vlm = bench.model(pictures=False).to(dtype).eval()
        vlm.check_isolation()  # raises
        yield Finding(f"model, grouped keys, {str(dtype)[6:]}", "OK")


def check_parity(bench: Bench) -> Iterator[Finding]:
    """Losses and a gradient of a packed row with pictures, against the CPU in float32."""
    micro = make_micro(bench.sizes)
    start = make_vlm(bench.sizes, bench.sizes.mid, device=CPU, dtype=torch.float32)
    tune(start, r=8)

    def run(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        vlm = copy.deepcopy(start).to(device, dtype)
        losses = vlm(**Upload(device)(micro.tensors))
        losses.mean().backward()
        grad = next(p.grad for p in vlm.projector.parameters())  # type: ignore[union-attr]
        return losses.detach().double().cpu(), grad.double().cpu().flatten()  # type: ignore[union-attr]

    losses, grad = run(CPU, torch.float32)
    for dtype, bound in ((torch.float32, 2e-3), (BF16, 0.05)):
        mine, other = run(bench.device, dtype)
        mean, token = float((mine.mean() - losses.mean()).abs()), float((mine - losses).abs().max())
        cosine = float(F.cosine_similarity(other, grad, dim=0))
        told = f"mean loss differs by {mean:.1e}, a token's by {token:.1e}; cosine of the gradient {cosine:.5f}"
        yield Finding(str(dtype)[6:], verdict(mean < bound and cosine > 0.98), told, f"< {bound}, > 0.98")


def check_upload(bench: Bench) -> Iterator[Finding]:
    """Page-locked copies on a stream of their own, while the device is busy and memory is used again."""
    if not bench.cuda:
        yield Finding("side stream", "SKIP", "needs CUDA: a CPU has no streams")
        return
    upload, busy, wrong, shape = Upload(bench.device), torch.randn(2048, 2048, device=bench.device), 0, (64, 1 << 14)
    for i in range(60):
        given = {"pixels": torch.full(shape, i, dtype=torch.int32), "nodes": torch.tensor([[0, 3, -1]])}
        for _ in range(3):
            busy = torch.tanh(busy @ busy)
        moved = upload(given)
        total = moved["pixels"].sum()
        del given, moved
        junk = torch.full(shape, -1, dtype=torch.int32, device=bench.device)  # takes memory that is freed too early
        wrong += int(total) != shape[0] * shape[1] * i
        del junk
    yield Finding("side stream", verdict(wrong == 0), f"{wrong} of 60 wrong", "0")


def check_determinism(bench: Bench) -> Iterator[Finding]:
    """Gradients of three runs, with `train.deterministic` and without, and what it costs."""
    for one in (False, True):
        micro = make_micro(bench.sizes, one=one)
        for on in (False, True):
            grads, seconds = [], []
            for _ in range(3):
                vlm = bench.model()
                groups = tune(vlm, r=16)
                given = bench.sent(micro)
                bench.wait()
                begin = time.perf_counter()
                with deterministic(on):
                    vlm(**given).sum().backward()
                bench.wait()
                seconds.append(time.perf_counter() - begin)
                grads.append([p.grad.clone() for g in groups for _, p in g.parameters if p.grad is not None])
            same = all(torch.equal(a, b) for g in grads[1:] for a, b in zip(grads[0], g, strict=True))
            label = f"{'one picture' if one else 'a picture each'}, {'on' if on else 'off'}"
            told = f"same bits {same}, {1e3 * min(seconds):.0f} ms"
            yield Finding(label, "OK" if same else verdict(not on), told, "True" if on else "")


def check_resume(bench: Bench) -> Iterator[Finding]:
    """Four steps against two, a save, a load and two more; and a background save while training goes on."""
    micros = [make_micro(bench.sizes, seed=i) for i in range(4)]
    for on in (False, True):
        with deterministic(on), tempfile.TemporaryDirectory() as folder:
            whole = bench.model()
            run_steps(bench, bench.engine(whole, tune(whole, r=8)), micros)
            half = bench.model()
            engine = bench.engine(half, tune(half, r=8))
            run_steps(bench, engine, micros[:2])
            engine.save_state(Path(folder))
            again = bench.model()
            groups = tune(again, r=8)
            again.load_state_dict(half.state_dict())
            engine = bench.engine(again, groups)
            engine.load_state(Path(folder))
            run_steps(bench, engine, micros[2:])
        pairs = zip(whole.state_dict().values(), again.state_dict().values(), strict=True)
        same = all(torch.equal(a, b) for a, b in pairs)
        label, numbers = f"resume, deterministic {'on' if on else 'off'}", f"same bits {same}"
        yield Finding(label, "OK" if same else verdict(not on), numbers, "True" if on else "")
    copied = CpuCopy(again)
    begin = time.perf_counter()
    kept = copied.take().state_dict()
    took = time.perf_counter() - begin
    now = {k: v.detach().cpu().clone() for k, v in again.state_dict().items()}
    run_steps(bench, engine, micros[:1])
    fine = all(torch.equal(kept[k].cpu(), v) for k, v in now.items())
    yield Finding("background save", verdict(fine), f"the copy stays that of its step {fine}, taken in {took:.3f} s")


def check_zero(bench: Bench) -> Iterator[Finding]:
    """DeepSpeed on one rank: losses as the torch engine's, and a step after a load."""
    if importlib.util.find_spec("deepspeed") is None:
        yield Finding("stages 1 to 3", "SKIP", "deepspeed is not installed")
        return
    if not bench.cuda:
        os.environ["DS_ACCELERATOR"] = "cpu"
    from mmit.train.engines.deepspeed_engine import DeepSpeedEngine, join_deepspeed
    from mmit.train.engines.zero import deepspeed_options

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    join_deepspeed(cuda=bench.cuda)
    micros = [make_micro(bench.sizes, 3, seed=i) for i in range(3)]
    plain = bench.model()
    want = run_steps(bench, bench.engine(plain, tune(plain, r=8)), micros)
    for stage in (1, 2, 3):

        def make(stage: int = stage) -> Any:
            vlm, options = bench.model(), deepspeed_options(f"zero{stage}")
            given: dict[str, Any] = {"device": bench.device, "precision": "bf16", "replicated": ["vision"]}
            return DeepSpeedEngine(vlm, tune(vlm, r=8), config=options, **given)

        engine = make()
        got = run_steps(bench, engine, micros)
        apart = max(abs(a - b) for a, b in zip(want, got, strict=True))
        yield Finding(f"stage {stage}", verdict(apart < 0.03), f"losses differ by {apart:.4f}", "< 0.03")
        with tempfile.TemporaryDirectory() as folder:
            engine.save_state(Path(folder))
            engine = make()
            engine.load_state(Path(folder))
            run_steps(bench, engine, micros[:1])
        yield Finding(f"stage {stage}, a step after a load", "OK")


def check_qlora(bench: Bench) -> Iterator[Finding]:
    """LoRA on weights in 4 bits learns a row by heart."""
    if (reason := why_not_4bit()) is not None:
        yield Finding("nf4", "SKIP", reason)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_llm(bench.sizes.mid, device=bench.device).save_pretrained(folder)
        llm = load_llm(folder, dtype=BF16, quantization={"quant": "nf4", "double_quant": True})
    vlm = VLM(llm, vision=None, projector=None)
    groups = tune(vlm, "qlora", r=16)
    vlm.check_isolation()
    losses = run_steps(bench, bench.engine(vlm, groups), [make_micro(bench.sizes, 4, pictures=False)] * 6)
    kinds = Counter(type(m).__name__ for m in vlm.modules() if "4bit" in type(m).__name__)
    told = f"loss {losses[0]:.3f} to {losses[-1]:.3f} in 6 steps; {dict(kinds)}"
    yield Finding("nf4", verdict(losses[-1] < losses[0] and bool(kinds)), told, "falls")


def check_generation(bench: Bench) -> Iterator[Finding]:
    """Greedy answers in float32: as on the CPU, and together as one by one."""
    cpu = make_vlm(bench.sizes, bench.sizes.mid, device=CPU, dtype=torch.float32, pictures=False)
    mine = copy.deepcopy(cpu).to(bench.device)
    whole = make_micro(bench.sizes, 5, text=64, pictures=False)
    apart = make_micro(bench.sizes, 5, text=64, pictures=False, share=False)
    here, there, split = (
        answers(vlm, micro, 24 // bench.sizes.shorter, device)[0]
        for vlm, micro, device in ((mine, whole, bench.device), (cpu, whole, CPU), (mine, apart, bench.device))
    )
    told = f"as on the CPU {here == there}, shared as not shared {here == split}"
    yield Finding("float32", "OK" if here == there == split else "INFO", told, "True, but for near ties")
