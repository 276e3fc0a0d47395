import io
import random
import tarfile
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teachercache.pipeline.sources.tar import TarMember, tar_members
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


def link(kind: bytes, name: str, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def plain(name: str, nbytes: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = nbytes
    return info


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_links_have_the_bytes_of_what_they_lead_to(format: int) -> None:
    hard, soft, long = (
        tarfile.LNKTYPE,
        tarfile.SYMTYPE,
        "far/" * (20 if format == tarfile.USTAR_FORMAT else 60),
    )
    headers = [
        *[link(soft, "early.jpg", "d/a.jpg"), plain("./d/a.jpg", 3), link(hard, "d/b.jpg", "./d/a.jpg")],
        *[link(soft, "d/c.jpg", "b.jpg"), link(soft, "e/d.jpg", "../d/c.jpg"), plain("d/a.jpg", 5)],
        *[
            link(hard, "f.jpg", "d/a.jpg"),
            link(soft, "g.jpg", "/etc/passwd"),
            link(soft, "up.jpg", "../up.jpg"),
        ],
        *[link(soft, "h.jpg", "i.jpg"), link(soft, "i.jpg", "h.jpg"), link(hard, "late.jpg", "z.jpg")],
        *[plain("z.jpg", 7), link(hard, "z.jpg", "z.jpg"), plain(f"{long}x.jpg", 9)],
        *[link(hard, "x.jpg", f"{long}x.jpg"), link(soft, "folder", "d"), link(soft, "cut.jpg", "end.jpg")],
        plain("end.jpg", 600),
    ]
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for header in headers:
            tar.addfile(header, io.BytesIO(bytes(header.size)) if header.isreg() else None)
    end = file.getvalue().index(b"end.jpg", file.getvalue().rindex(b"ustar") - 257) + 512 + 100
    left_out = Counter[str]()
    found = list(tar_members(io.BytesIO(file.getvalue()[:end]), 0, end, left_out))
    (cut,) = (member for member in found if member.problem is not None)
    assert cut.name == "end.jpg"
    assert [(m.name, m.nbytes) for m in found if m.problem is None] == [
        *[("early.jpg", 5), ("d/a.jpg", 3), ("d/b.jpg", 3), ("d/c.jpg", 3), ("e/d.jpg", 3), ("d/a.jpg", 5)],
        *[("f.jpg", 5), ("z.jpg", 7), (f"{long}x.jpg", 9), ("x.jpg", 9)],
    ]
    assert left_out == {"link that leads to no file": 7}
    inner = 5 * b"outer" + file.getvalue()
    moved = list(tar_members(io.BytesIO(inner), 25, 25 + end))
    assert [(m.name, m.offset - 25, m.nbytes) for m in moved] == [(m.name, m.offset, m.nbytes) for m in found]


def test_a_sparse_file_is_counted() -> None:
    info = tarfile.TarInfo("holes.jpg")
    info.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,1"}
    info.pax_headers |= {"GNU.sparse.size": "4096", "GNU.sparse.numblocks": "1"}
    info.size = 1
    file, left_out = io.BytesIO(), Counter[str]()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(b"x"))
        tar.addfile(plain("a.jpg", 1), io.BytesIO(b"y"))
    found = list(tar_members(file, 0, len(file.getvalue()), left_out))
    assert [member.name for member in found] == ["a.jpg"]
    assert left_out == {"sparse file": 1}
