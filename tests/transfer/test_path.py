"""Which way KV takes: read where it lies, or repacked; and what has none."""

import msgspec
import pytest

from disaggd.errors import ConfigError
from disaggd.transfer.layout import KVDtype, KVGroup, KVSpec, PoolPlace, Span, in_fp8
from disaggd.transfer.messages import IsReady
from disaggd.transfer.path import Path, Paths, Repacking, RepackSettings, path_of
from disaggd.transfer.pool import Region
from disaggd.transfer.reshape import head_cuts
from disaggd.transfer.share import Share
from disaggd.transfer.source import InPlace
from disaggd.units import MAX_BLOCK_SIZE

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


@pytest.mark.parametrize("field", ["head_dim", "kv_heads", "num_layers", "block_size"])
def test_what_cannot_be_is_named(field: str) -> None:
    theirs = {
        "head_dim": msgspec.structs.replace(spec(), head_dim=32),
        "kv_heads": spec(kv_heads=4),
        "block_size": spec(block_size=MAX_BLOCK_SIZE + 1),
        "num_layers": msgspec.structs.replace(spec(), groups=(KVGroup(layers=3, kv_heads=8, head_bytes=HEAD_BYTES),)),
    }[field]
    cut = head_cuts(8, 1, 1)[0]
    with pytest.raises(ConfigError, match=field):
        path_of(Share(spec()), Share(theirs), cut, 0)


class NoRepacker:
    """Has room for many blocks of any size, and is not asked to make one."""

    region = Region(0, 2**30)

    def repack(self, offset: int, target: KVSpec, layers: range, heads: range, span: Span) -> IsReady:
        raise AssertionError


@pytest.mark.parametrize("theirs", [spec(block_size=64), spec(dtype="float16"), in_fp8(spec())], ids=["block size", "dtype", "fp8"])
def test_a_target_whose_blocks_are_not_what_its_geometry_says_is_not_written_to(theirs: KVSpec) -> None:
    """A frame may say so: what is made of blocks of a kind that cannot be would end the node."""
    repacking = Repacking(repacker=NoRepacker(), direct_slice_bytes=0, max_layers=2, max_tokens=64)
    paths = Paths(InPlace(Share(spec()), PoolPlace(0, 8)), repacking)
    [cut] = head_cuts(8, 1, 1)
    assert paths.of(cut, Share(theirs)).path == "repacked"
    for head_bytes in (1, theirs.groups[0].head_bytes - 1, 2 * theirs.groups[0].head_bytes):
        groups = (msgspec.structs.replace(theirs.groups[0], head_bytes=head_bytes),)
        with pytest.raises(ConfigError, match=f"head_bytes are {head_bytes}, "):
            paths.of(cut, Share(msgspec.structs.replace(theirs, groups=groups)))


def settings(staging_bytes: int, direct_slice_bytes: int = 0) -> RepackSettings:
    return RepackSettings(staging_bytes=staging_bytes, direct_slice_bytes=direct_slice_bytes, max_layers=1, max_tokens=100)


@pytest.mark.parametrize(("num_sources", "num_targets", "heads"), [(1, 1, 8), (2, 1, 4), (1, 4, 2), (4, 8, 1)])
def test_memory_that_holds_no_write_to_some_rank_is_named_with_the_least_that_does(num_sources: int, num_targets: int, heads: int) -> None:
    """A hundred tokens take two blocks of 64."""
    theirs = spec(block_size=64)
    theirs = msgspec.structs.replace(theirs, groups=(msgspec.structs.replace(theirs.groups[0], head_bytes=4 * HEAD_BYTES),))
    least = 2 * heads * 4 * HEAD_BYTES
    settings(least).check(spec(), num_sources, theirs, num_targets)
    with pytest.raises(ConfigError, match=rf"transfer.staging: {least - 1:,} bytes .* must have {least:,}$"):
        settings(least - 1).check(spec(), num_sources, theirs, num_targets)


def test_what_is_read_where_it_lies_needs_no_memory() -> None:
    settings(1).check(spec(), 4, spec(), 2)
    with pytest.raises(ConfigError, match=r"transfer\.staging"):
        settings(1, direct_slice_bytes=2**30).check(spec(), 2, spec(), 4)
