"""Which way KV takes: read where it lies, or repacked; and what has none."""

import msgspec
import pytest

from disaggd.errors import ConfigError
from disaggd.transfer.layout import KVDtype, KVGroup, KVSpec, in_fp8
from disaggd.transfer.path import Path, path_of
from disaggd.transfer.reshape import head_cuts
from disaggd.transfer.share import Share

HEAD_BYTES = 2 * 16 * 64 * 2


def spec(block_size: int = 16, dtype: KVDtype = "bfloat16", kv_heads: int = 8) -> KVSpec:
    group = KVGroup(layers=2, kv_heads=kv_heads, head_bytes=2 * block_size * 64 * 2)
    return KVSpec(dtype=dtype, block_size=block_size, head_dim=64, groups=(group,))


def paths(ours: KVSpec, theirs: KVSpec, num_sources: int, num_targets: int, direct_slice_bytes: int) -> set[Path]:
    return {
        path_of(Share(ours, cut.source_rank, num_sources), Share(theirs, cut.target_rank, num_targets), cut, direct_slice_bytes)
        for cut in head_cuts(8, num_sources, num_targets)
    }


@pytest.mark.parametrize("theirs", [spec(block_size=64), spec(dtype="float16"), in_fp8(spec())], ids=["block size", "dtype", "fp8"])
def test_blocks_that_are_not_alike_are_repacked_however_long_they_are(theirs: KVSpec) -> None:
    assert paths(spec(), theirs, 1, 1, direct_slice_bytes=0) == {"repacked"}


def test_short_slices_of_a_sources_block_that_are_the_targets_whole_block_are_repacked() -> None:
    assert paths(spec(), spec(), 1, 4, direct_slice_bytes=2 * HEAD_BYTES + 1) == {"repacked"}
    assert paths(spec(), spec(), 1, 4, direct_slice_bytes=2 * HEAD_BYTES) == {"direct"}


def test_repacking_saves_no_writes_where_the_target_has_other_heads_too_or_the_source_has_not() -> None:
    assert paths(spec(), spec(), 4, 1, direct_slice_bytes=2**30) == {"direct"}
    assert paths(spec(), spec(), 2, 2, direct_slice_bytes=2**30) == {"direct"}


@pytest.mark.parametrize("field", ["head_dim", "kv_heads", "num_layers"])
def test_what_cannot_be_is_named(field: str) -> None:
    theirs = {
        "head_dim": msgspec.structs.replace(spec(), head_dim=32),
        "kv_heads": spec(kv_heads=4),
        "num_layers": msgspec.structs.replace(spec(), groups=(KVGroup(layers=3, kv_heads=8, head_bytes=HEAD_BYTES),)),
    }[field]
    cut = head_cuts(8, 1, 1)[0]
    with pytest.raises(ConfigError, match=field):
        path_of(Share(spec()), Share(theirs), cut, 0)
