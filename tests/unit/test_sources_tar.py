import io
import random
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.sources.tar import TarMember, tar_members
from tests.images import tar_bytes

MEMBERS = [("a.jpg", b"x" * 700), ("dir/b.cls", b"3"), ("c.png", b""), ("d.jpg", b"y" * 512)]


def members(data: bytes, start: int = 0, end: int | None = None) -> list[TarMember]:
    return list(tar_members(io.BytesIO(data), start, len(data) if end is None else end))


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_ranges_agree_with_tarfile(format: int) -> None:
    names = ["plain.jpg", "./dotted.jpg", "d" * 90 + "/" + "n" * 90 + ".jpg", "mit/Größe.jpg", "empty.jpg"]
    if format != tarfile.USTAR_FORMAT:
        names.append("far/" * 60 + "long.jpg")
    contents = {name: name.encode() * i for i, name in enumerate(reversed(names))}
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if format == tarfile.PAX_FORMAT:
                info.mtime = 1.5  # as webdataset's writer does: every member gets a pax header
            tar.addfile(info, io.BytesIO(content))
    with tarfile.open(fileobj=io.BytesIO(file.getvalue())) as tar:
        expected = [TarMember(i.name.removeprefix("./"), i.offset_data, i.size) for i in tar]
    assert members(file.getvalue()) == expected
    assert [m.name for m in expected] == [name.removeprefix("./") for name in contents]


def test_only_regular_files_are_members() -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo(f"{kind!r}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("real.jpg")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    assert [(m.name, m.problem) for m in members(file.getvalue())] == [("real.jpg", None)]


def test_a_tar_within_a_file_keeps_to_its_range() -> None:
    inner = tar_bytes(MEMBERS)
    data = b"before" * 100 + inner + tar_bytes([("other.jpg", b"z")])
    found = members(data, 600, 600 + len(inner))
    assert [(m.name, data[m.offset : m.offset + m.nbytes]) for m in found] == MEMBERS


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_cut_is_reported_wherever_it_is(format: int) -> None:
    members_in = [*MEMBERS, ("ü" * 80 + ".jpg", b"long name, pax header" * 30)]
    data = tar_bytes(members_in, format)
    complete = members(data)
    assert all(member.problem is None for member in complete)
    end_of_last = complete[-1].offset + -(-complete[-1].nbytes // 512) * 512
    for cut in range(0, end_of_last + 512, 7):
        *before, last = members(data[:cut])
        assert before == complete[: len(before)]
        assert all(member.offset + member.nbytes <= cut for member in before)
        assert len(before) >= sum(m.offset + -(-m.nbytes // 512) * 512 <= cut for m in complete)
        assert last.problem is not None, f"the cut at {cut} passed silently"


def test_a_cut_member_is_named() -> None:
    data = tar_bytes(MEMBERS)
    assert members(data[:1000]) == [
        TarMember("a.jpg", 512, 488, "the tar is cut: this member ends at byte 1,212, the tar at 1,000")
    ]


def test_a_damaged_header_ends_the_tar_with_a_report() -> None:
    data = bytearray(tar_bytes(MEMBERS))
    data[512 + 1024 + 10] ^= 1
    first, last = members(bytes(data))
    assert (first.name, first.problem) == ("a.jpg", None)
    assert (last.name, last.offset) == ("", 1536)
    assert last.problem == "the tar is damaged at byte 1,536: no header, no end mark"


@pytest.mark.parametrize("data", [b"", b"<html>not found</html>", bytes(100), b"x" * 5000])
def test_what_is_no_tar_is_reported(data: bytes) -> None:
    (only,) = members(data)
    assert only.problem is not None


def test_an_empty_tar_is_complete() -> None:
    assert members(tar_bytes([])) == []


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32), flips=st.integers(1, 20), fix_checksum=st.booleans())
def test_hostile_headers_end(seed: int, flips: int, fix_checksum: bool) -> None:
    rng = random.Random(seed)
    data = bytearray(tar_bytes([*MEMBERS, ("ü" * 80 + ".jpg", b"pax")]))
    header = rng.choice([0, 1536, 2560, 3072])
    for _ in range(flips):
        data[header + rng.choice([rng.randrange(512), rng.randrange(124, 136), 156])] = rng.randrange(256)
    if fix_checksum:
        block = data[header : header + 512]
        block[148:156] = b"        "
        data[header + 148 : header + 156] = b"%06o\0 " % sum(block)
    found = members(bytes(data))
    assert len(found) <= len(data) // 512
    for member in found:
        assert 0 <= member.offset <= member.offset + member.nbytes
        assert member.problem is not None or member.offset + member.nbytes <= len(data)
