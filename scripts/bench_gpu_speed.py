"""The section of bench_gpu.py that times steps and answers, and looks at memory, kernels and waits of a step."""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from bench_gpu_models import Bench, Finding, Micro, answers, make_micro, make_vlm, needed_flops, tune, verdict
from torch.profiler import ProfilerActivity, profile

from mmit.models.llm_layers import compile_layers, set_recompute, why_not_compile
from mmit.train.data.batches import Upload
from mmit.train.engines.torch_engine import TorchEngine
from mmit.train.memory.step_bytes import measure_bytes

GIB = 2**30
CALLS = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx", "cudaStreamSynchronize", "cudaMemcpyAsync")


def time_step(bench: Bench, engine: Any, micros: Sequence[Micro], steps: int) -> float:
    """Median seconds of a step of all micro-batches."""
    upload, total, seconds = Upload(bench.device), sum(len(m.row.targets) for m in micros), []
    for _ in range(steps):
        bench.wait()
        begin = time.perf_counter()
        for i, micro in enumerate(micros):
            engine.forward_backward(upload(micro.tensors), scale=1 / total, last=i == len(micros) - 1)
        engine.step(1.0)
        bench.wait()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def timed(
    bench: Bench, micros: Sequence[Micro], *, recompute: str = "none", compiled: bool = False, **options: Any
) -> tuple[TorchEngine, str]:
    """An engine that has made some steps, and what they took."""
    vlm = make_vlm(bench.sizes, bench.sizes.big, device=bench.device)
    groups = tune(vlm, "lora", r=bench.sizes.rank, alpha=2 * bench.sizes.rank, **options)
    set_recompute(vlm, recompute)
    vlm.split()
    if compiled:
        compile_layers(vlm.llm, device=bench.device.type)
    engine = bench.engine(vlm, groups)
    first = time_step(bench, engine, micros[:1], 1)
    if bench.cuda:
        torch.cuda.reset_peak_memory_stats()
    step = time_step(bench, engine, micros, 3)
    flops = needed_flops(bench.sizes, micros, "lora", r=bench.sizes.rank)
    tokens = sum(len(m.row.input_ids) for m in micros)
    records = sum(len(set(m.row.records)) for m in micros)
    told = f"{step:.3f} s a step, {tokens / step:.0f} tokens/s, {records / step:.1f} samples/s, first {first:.1f} s"
    if bench.cuda:
        told += f", MFU {100 * flops / step / bench.peak:.1f} %, peak {torch.cuda.max_memory_allocated() / GIB:.1f} GiB"
    return engine, told


def measure_step(bench: Bench) -> Iterator[Finding]:
    """Step time, MFU, tokens/s; of the first arm memory against the forecast, a profile, and syncs."""
    micros = [make_micro(bench.sizes, seed=i) for i in range(bench.sizes.rows)]
    engine, told = timed(bench, micros)
    yield Finding("LoRA", "INFO", told, "MFU >= 50 %")
    yield compare_memory(bench, micros)
    yield from profiled(bench, engine, micros[0])
    yield count_syncs(bench, engine, micros)
    for count in bench.sizes.batches:
        row = make_micro(bench.sizes, count, text=80, answer=8, one=True, seed=count)
        made, before, after = answers(engine.model, row, bench.sizes.new, bench.device)  # type: ignore[arg-type]
        speed = sum(map(len, made)) / after
        told = f"prefill {1e3 * before:.0f} ms, {speed:.0f} new tokens/s, {1e3 * after / bench.sizes.new:.1f} ms a step"
        yield Finding(f"answers, batch {count}", "INFO", told, "reading 13.5 GB of weights takes 4 ms on an H100")
    del engine
    same = [make_micro(bench.sizes, 10, one=True, seed=i) for i in range(2)]
    arms: dict[str, tuple[Sequence[Micro], dict[str, Any]]] = {
        "LoRA, dropout 0.05": (micros, {"dropout": 0.05}),
        "LoRA, everything recomputed": (micros, {"recompute": "full"}),
        "LoRA, ten questions of one picture a row": (same, {}),
        "LoRA, train.compile": (micros, {"compiled": True}),
    }
    for name, (rows, options) in arms.items():
        reason = why_not_compile(bench.device.type) if bench.cuda else "needs CUDA: a minute of compiling tells nothing"
        if "compiled" in options and reason is not None:
            yield Finding(name, "SKIP", reason)
            continue
        clear(bench)
        yield Finding(name, "INFO", timed(bench, rows, **options)[1])


def compare_memory(bench: Bench, micros: Sequence[Micro]) -> Finding:
    """The peak of the steps just timed against the forecast from shapes."""
    vlm = make_vlm(bench.sizes, bench.sizes.big, device=bench.device, empty=True)
    groups = tune(vlm, "lora", r=bench.sizes.rank, alpha=2 * bench.sizes.rank)
    largest = max(micros, key=lambda m: len(m.row.input_ids))
    told = measure_bytes(vlm, groups, [largest.tensors], precision="bf16", accumulate=True, flash=True).total / GIB
    if not bench.cuda:
        return Finding("memory", "SKIP", f"forecast {told:.3f} GiB; the measurement needs CUDA's allocator", "")
    peak, reserved = torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB
    numbers = f"measured {peak:.2f} GiB, forecast {told:.2f}, reserved {reserved:.2f}"
    return Finding("memory", verdict(abs(peak / told - 1) < 0.05), numbers, "within 5 %")


def profiled(bench: Bench, engine: Any, micro: Micro) -> Iterator[Finding]:
    """The ten operations (on CUDA: kernels) that take longest in a micro-batch and a step."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.cuda else [])]
    with profile(activities=kinds) as seen:
        time_step(bench, engine, [micro], 1)
    events: Any = seen.key_averages()
    spent = {
        e.key: (e.self_device_time_total if bench.cuda else e.self_cpu_time_total, e.count)
        for e in events
        if not bench.cuda or str(e.device_type).endswith("CUDA")
    }
    total = sum(t for t, _ in spent.values()) or 1
    for name, (micros, count) in sorted(spent.items(), key=lambda item: -item[1][0])[:10]:
        yield Finding(
            f"profile: {name[:50]}", "INFO", f"{100 * micros / total:.1f} %, {micros / 1e3:.1f} ms, {count} calls"
        )
    calls = {e.key: e.count for e in events if e.key in CALLS}
    yield Finding(
        "profile: calls of CUDA's runtime", "INFO" if bench.cuda else "SKIP", str(calls) if bench.cuda else "needs CUDA"
    )


def count_syncs(bench: Bench, engine: Any, micros: Sequence[Micro]) -> Finding:
    """Where the host waits for the device within a step."""
    if not bench.cuda:
        return Finding("syncs", "SKIP", "needs CUDA; tests/fake_cuda counts them on fake tensors")
    upload = Upload(bench.device)
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for micro in micros:
            engine.forward_backward(upload(micro.tensors), scale=1.0, last=micro is micros[-1])
        engine.step(1.0)
    torch.cuda.set_sync_debug_mode("default")
    places = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in seen if "ynchron" in str(w.message))
    return Finding("syncs", verdict(places.total() <= 1), f"{places.total()} a step: {dict(places)}", "1")


def clear(bench: Bench) -> None:
    """Give memory of what was measured before back."""
    gc.collect()
    if bench.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
