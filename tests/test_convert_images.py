from __future__ import annotations

import torch

from sepconv.convert.images import CalibrationImages

CPU = torch.device("cpu")


def test_images_are_cut_into_batches_that_fit() -> None:
    images = CalibrationImages(torch.randn(20, 3, 600, 600), CPU, torch.float32)
    assert [len(batch) for batch in images.batches()] == [8, 8, 4]
    assert [len(batch) for batch in images.batches(10)] == [8, 2]
    small = CalibrationImages(iter([torch.randn(200, 1, 4, 4), (torch.randn(100, 1, 4, 4), None)]), CPU, torch.float64)
    assert [len(batch) for batch in small.batches()] == [128, 128, 44]
    assert next(small.batches()).tensors[0].dtype == torch.float64
    assert small.count == 300


def test_images_of_several_sizes_stay_apart() -> None:
    images = CalibrationImages([torch.randn(3, 1, 4, 4), torch.randn(5, 1, 6, 6)], CPU, torch.float32)
    assert [tuple(batch.tensors[0].shape) for batch in images.batches()] == [(3, 1, 4, 4), (5, 1, 6, 6)]
    assert [len(batch) for batch in images.batches(4)] == [3, 1]
