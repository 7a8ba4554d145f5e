"""Uploaded arguments are the batch's own, whatever moved them."""

from __future__ import annotations

import pytest
import torch

from mmit.train.data.batches import Upload

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))


@pytest.mark.parametrize("kind", ["cpu", CUDA])
def test_values_arrive_while_earlier_work_is_queued(kind):
    upload = Upload(torch.device(kind))
    busy = torch.ones(512, 512, device=kind)
    for i in range(20):
        nodes = torch.tensor([[0, 3, -1]])
        given = {"pixels": torch.full((64, 1024), i), "image_index": torch.zeros(0), "nodes": nodes, "image_tokens": 4}
        busy = busy @ busy / 512
        moved = upload(given)
        assert moved.keys() == given.keys() and moved["nodes"] is nodes and moved["image_tokens"] == 4
        assert moved["pixels"].device.type == kind
        total = moved["pixels"].sum()
        del given["pixels"], moved["pixels"]  # their memory is free for the next round
        assert int(total) == 64 * 1024 * i
