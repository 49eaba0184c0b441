"""Finding slides and reading label tables."""

import shutil
import struct

import pytest

from wavepath.data.slide_lists import dicom_series, find_slides, read_labels
from wavepath.errors import DatasetError, SlideError


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def ids(folder):
    return [ref.id for ref in find_slides(folder)]


def test_ids_are_relative_paths_without_suffix_sorted(tmp_path, capsys):
    touch(tmp_path, "b.svs", "a/x 1.ome.tiff", "a/ü.SVS", "c/b.svs", "case.1.2.ndpi")
    touch(tmp_path, "notes.txt", ".hidden.svs", ".git/d.svs", "labels.csv", "Thumbs.db")
    assert ids(tmp_path) == ["a/x 1", "a/ü", "b", "c/b", "case.1.2"]
    assert "3 files of other types are passed over (.csv 1, .db 1, .txt 1)" in capsys.readouterr().err
    refs = find_slides(tmp_path)
    assert all(ref.path.is_file() for ref in refs) and refs[2].path == tmp_path / "b.svs"


def test_one_file_is_one_slide(tmp_path):
    touch(tmp_path, "deep er/one.ome.tif")
    (ref,) = find_slides(tmp_path / "deep er" / "one.ome.tif")
    assert ref.id == "one"


def test_equal_ids_keep_their_suffixes_and_that_is_said(tmp_path, capsys):
    touch(tmp_path, "a.svs", "a.tiff", "b.svs")
    assert ids(tmp_path) == ["a.svs", "a.tiff", "b"]
    assert capsys.readouterr().err.count("keeps its suffix") == 2
    touch(tmp_path, "a.svs.tiff")
    assert ids(tmp_path) == ["a.svs", "a.svs.tiff", "a.tiff", "b"]


def test_parts_of_other_slides_do_not_count(tmp_path):
    touch(tmp_path, "m.mrxs", "m/Data0001.dat", "m/Slidedat.ini", "m/preview.png", "v/v.vms", "v/v-1.jpg", "other/photo.jpg")
    assert ids(tmp_path) == ["m", "other/photo", "v/v"]


def test_thumbnails_of_prepared_slides_are_no_slides(tmp_path):
    touch(tmp_path, "a.svs", "tiles/slides/a/thumbnail.jpg", "tiles/slides/a/regions.csv", "tiles/slides/a/tissue.npz", "tiles/slides/a/b/c.svs")
    assert ids(tmp_path) == ["a", "tiles/slides/a/b/c"]


def test_nothing_found_is_an_error_with_a_reason(tmp_path):
    with pytest.raises(SlideError, match="no such file or folder"):
        find_slides(tmp_path / "none")
    touch(tmp_path, "readme.txt")
    with pytest.raises(SlideError, match="no slides in .*reads .*\\.svs"):
        find_slides(tmp_path)


def test_links_are_followed_once(tmp_path):
    touch(tmp_path, "real/a.svs")
    root = tmp_path / "root"
    root.mkdir()
    (root / "linked").symlink_to(tmp_path / "real")
    (root / "again").symlink_to(root)
    (root / "file.svs").symlink_to(tmp_path / "real" / "a.svs")
    assert ids(root) == ["file", "linked/a"]


def test_a_dicom_series_is_one_slide(shared_data, tmp_path):
    source = shared_data / "slides" / "cmu-1-dicom"
    assert [ref.id for ref in find_slides(shared_data / "slides")] == ["CMU-1-Small-Region", "TCGA-CR-7395-01A-01-TS1", "cmu-1-dicom"]
    (ref,) = find_slides(source)
    assert ref.id == "cmu-1-dicom" and ref.path.name == "level-0-frames-0-30.dcm"
    for name in ("level-0-frames-0-30.dcm", "level-1-frames-0-9.dcm"):
        shutil.copy(source / name, tmp_path / name.removesuffix(".dcm"))
    assert len(find_slides(tmp_path)) == 1
    assert dicom_series(source / "level-3-frames-0-1.dcm") == "1.2.276.0.7230010.3.1.3.2425734838.4124713.1626788322.499658"


def element(group, number, kind, value, undefined=False):
    if kind in (b"SQ", b"OB"):
        return struct.pack("<HH2sHI", group, number, kind, 0, 0xFFFFFFFF if undefined else len(value)) + value
    return struct.pack("<HH2sH", group, number, kind, len(value)) + value


def item(value):
    return struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF) + value + struct.pack("<HHI", 0xFFFE, 0xE00D, 0)


END = struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)


def test_dicom_series_is_not_that_of_a_referenced_image(tmp_path):
    other = element(0x0020, 0x000E, b"UI", b"9.9.9\0")
    inner = element(0x0008, 0x1199, b"SQ", item(other) + END, undefined=True)
    body = (
        element(0x0002, 0x0010, b"UI", b"1.2.840.10008.1.2.1\0")
        + element(0x0008, 0x1115, b"SQ", item(inner + other) + END, undefined=True)
        + element(0x0008, 0x1140, b"SQ", item(other) + END)
        + element(0x0020, 0x000D, b"UI", b"1.1\0")
    )
    for uid, name in ((b"1.2.3\0", "a.dcm"), (b"1.2.4\0", "b.dcm")):
        (tmp_path / name).write_bytes(b"\0" * 128 + b"DICM" + body + element(0x0020, 0x000E, b"UI", uid))
    assert dicom_series(tmp_path / "a.dcm") == "1.2.3"
    assert ids(tmp_path) == ["a", "b"]


def test_labels_are_read_in_order(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("\ufeffcase_id,slide_id,label\np1, a/s1 ,LUAD\n\np1,s2,LUAD\n,s3,LUSC\n", encoding="utf-8")
    assert [tuple(row) for row in read_labels(path)] == [("p1", "a/s1", "LUAD"), ("p1", "s2", "LUAD"), ("s3", "s3", "LUSC")]


@pytest.mark.parametrize(
    ("text", "reason"),
    [("a,b\n1,2\n", "columns case_id,slide_id,label"), ("", "no rows"), ("slide_id,label\ns,\n", "line 2"), ("slide_id,label\ns,1\ns,2\n", "twice")],
)
def test_bad_label_tables(tmp_path, text, reason):
    path = tmp_path / "labels.csv"
    path.write_text(text)
    with pytest.raises(DatasetError, match=reason):
        read_labels(path)
    with pytest.raises(DatasetError, match="cannot read the label table"):
        read_labels(tmp_path / "none.csv")
