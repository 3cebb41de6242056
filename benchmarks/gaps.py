"""How long the GPU is idle between the kernels of one call, measured by torch.profiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

MIN_GAP_US = 10.0


def launch_gaps(call: Callable[[], object]) -> dict[str, Any]:
    """Kernels and copies of one call, from the start of the first to the end of the last. Calls once for warm-up."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    events = profiler.events() or []
    spans = [(event.time_range.start, event.time_range.end) for event in events if event.device_type == DeviceType.CUDA]
    return summarize(spans)


def summarize(spans: list[tuple[float, float]]) -> dict[str, Any]:
    """`spans`: start and end of each kernel in microseconds; kernels of several streams may overlap."""
    spans = sorted(spans)
    gaps: list[float] = []
    end = spans[0][0]
    for start, stop in spans:
        if start > end:
            gaps.append(start - end)
        end = max(end, stop)
    span = end - spans[0][0]
    return {
        "num_kernels": len(spans),
        "span_ms": round(span / 1e3, 3),
        "busy": f"{1 - sum(gaps) / span:.1%}",
        "num_gaps": sum(gap >= MIN_GAP_US for gap in gaps),
        "longest_us": round(max(gaps, default=0.0), 1),
    }
