"""Arrays laid out in one stretch of bytes come back as they were."""

import numpy as np
import torch

from disaggd.engine.staging import Layout, download, upload

ARRAYS = [
    np.array([3, -1, 2**40]),
    np.array([[1, 2, 3], [4, 5, 6]], np.int32)[:, ::2],
    np.zeros(0, np.float32),
    np.array([0.5, 2.0, -1.0], np.float32),
]


def test_a_layout_gives_back_what_it_was_filled_with() -> None:
    layout = Layout(ARRAYS)
    stretch = torch.full((layout.num_bytes,), 0xAB, dtype=torch.uint8)
    layout.fill(stretch, ARRAYS)
    for view, array in zip(layout.views(stretch), ARRAYS, strict=True):
        assert view.dtype == torch.from_numpy(array.copy()).dtype
        assert view.tolist() == array.tolist()
        assert view.data_ptr() % 16 == stretch.data_ptr() % 16


def test_up_and_down_again() -> None:
    assert [tensor.tolist() for tensor in download(upload(ARRAYS, torch.device("cpu")))()] == [array.tolist() for array in ARRAYS]
