"""Which OME-TIFF files show one field, and stand on one side: those of one <Image>, and no others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tifffile
from segment_runs import config

from raypipe.errors import InputError
from raypipe.segment import ome_sets
from raypipe.segment import prepare as prepare_module
from raypipe.segment.ome_sets import sets_of
from raypipe.segment.prepare import prepare

H, W = 20, 30
Where = tuple[str, str]  # file name and UUID of a plane; "" where nothing says it


def block(planes: Sequence[Where], prefix: str = "") -> str:
    """An <Image> with a plane in each of these."""

    def place(name: str, uuid: str) -> str:
        named = f' FileName="{name}"' if name else ""
        return f"<{prefix}UUID{named}>{uuid}</{prefix}UUID>" if uuid else ""

    where = "".join(
        f'<{prefix}TiffData FirstT="{t}" IFD="0" PlaneCount="1">{place(*one)}</{prefix}TiffData>'
        for t, one in enumerate(planes)
    )
    return (
        f'<{prefix}Image ID="Image:0"><{prefix}Pixels ID="Pixels:0" SizeX="{W}" SizeY="{H}" SizeZ="1"'
        f' SizeC="1" SizeT="{len(planes)}" DimensionOrder="XYCZT" Type="uint16">{where}'
        f"</{prefix}Pixels></{prefix}Image>"
    )


def xml(inner: str, own: str = "", prefix: str = "") -> str:
    uuid = f' UUID="{own}"' if own else ""
    return (
        f'<?xml version="1.0" encoding="UTF-8"?><{prefix}OME xmlns="x"{uuid}>{inner}</{prefix}OME>'
    )


def binary(master: str, own: str) -> str:
    return xml(f'<BinaryOnly MetadataFile="{master}" UUID="urn:master"/>', own)


def plate(*fields: Sequence[str]) -> str:
    """All <Image>s, each of these files."""
    return "".join(block([(name, f"urn:{name}") for name in names]) for names in fields)


def save(folder: Path, name: str, text: str | None) -> Path:
    """A picture and its mask; ``text`` is its description."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "masks").mkdir(exist_ok=True)
    pixels = np.random.default_rng(len(name)).integers(0, 999, (H, W)).astype(np.uint16)
    path = folder / "images" / name
    tifffile.imwrite(path, pixels, metadata=None, description=text)
    tifffile.imwrite(folder / "masks" / name, pixels % 2, metadata=None)
    return path


def fields(folder: Path, names: Sequence[str], listed: str) -> list[Path]:
    return [save(folder, name, xml(listed, f"urn:{name}")) for name in names]


def names_of(sets: dict[Path, Path]) -> dict[str, str]:
    return {path.name: first.name for path, first in sets.items()}


NAMES = ["f0.ome.tif", "f1.ome.tif", "f2.ome.tif", "f3.ome.tif"]


def test_fields_of_a_plate_are_divided(tmp_path: Path) -> None:
    found = fields(tmp_path, NAMES, plate(*([name] for name in NAMES)))
    assert sets_of(found) == {}
    ready = prepare(config(tmp_path, tmp_path / "run"))
    assert {p.split for p in ready.pictures} == {"train", "val"}


def test_fields_of_a_plate_may_be_put_on_sides(tmp_path: Path) -> None:
    """By folders, and by a table, though each file names all."""
    listed = plate(*([name] for name in NAMES))
    data = tmp_path / "data"
    fields(data / "train", NAMES[:3], listed)
    fields(data / "val", NAMES[3:], listed)
    sides = [p.split for p in prepare(config(data, tmp_path / "run")).pictures]
    assert sides == ["train"] * 3 + ["val"]
    fields(tmp_path, NAMES, listed)
    rows = [f"images/{n},masks/{n},{s}" for n, s in zip(NAMES, sides, strict=True)]
    (tmp_path / "t.csv").write_text("\n".join(["image,mask,split", *rows]))
    told = prepare(config(tmp_path / "t.csv", tmp_path / "run")).pictures
    assert [p.split for p in told] == sides


def test_planes_of_each_field_are_one(tmp_path: Path) -> None:
    found = fields(tmp_path, NAMES, plate(NAMES[:2], NAMES[2:]))
    a, b, c, d = NAMES
    assert names_of(sets_of(found)) == {a: a, b: a, c: c, d: c}
    sides = {p.image.name: p.split for p in prepare(config(tmp_path, tmp_path / "run")).pictures}
    assert sides[a] == sides[b] != sides[c] == sides[d]


def test_planes_of_one_field_in_two_folders_are_refused(tmp_path: Path) -> None:
    """The UUID tells it; the names are looked for in each file's own folder."""
    listed = plate(NAMES[:2], NAMES[2:])
    fields(tmp_path / "train", [NAMES[0], *NAMES[2:]], listed)
    fields(tmp_path / "val", NAMES[1:2], listed)
    said = r"f0.ome.tif stands in train .* f1.ome.tif of its OME-TIFF set in val"
    with pytest.raises(InputError, match=said):
        prepare(config(tmp_path, tmp_path / "run"))


@pytest.mark.parametrize("master", ["plate.companion.ome", "f0.ome.tif"])
def test_files_without_metadata_are_looked_up_in_their_master(tmp_path: Path, master: str) -> None:
    """By name, or by UUID where that name is not listed: f3 was renamed since."""
    listed = plate(NAMES[:1], [NAMES[1], "old.ome.tif"], NAMES[2:3])
    uuids = [f"urn:{name}" for name in (*NAMES[:3], "old.ome.tif")]
    texts = [binary(master, uuid) for uuid in uuids]
    if master == NAMES[0]:
        texts[0] = xml(listed, uuids[0])
    found = [save(tmp_path, name, text) for name, text in zip(NAMES, texts, strict=True)]
    if master != NAMES[0]:
        assert sets_of(found) == {}, "nothing says what belongs together"
        (tmp_path / "images" / master).write_text(xml(listed))
    assert names_of(sets_of(found)) == {NAMES[1]: NAMES[1], NAMES[3]: NAMES[1]}


@pytest.mark.parametrize("prefix", ["", "OME:"])
@pytest.mark.parametrize(
    ("blocks", "own", "expected"),
    [
        ([[("a.tif", "1"), ("b.tif", "2")]], "123", ["ab"]),
        ([[("a.tif", "1"), ("a.tif", "1")], [("b.tif", "2")]], "123", []),
        ([[("", "1"), ("", "2")], [("", "3")]], "123", ["ab"]),  # UUIDs alone
        ([[("x.tif", "1"), ("y.tif", "2")]], "129", ["ab"]),  # renamed
        ([[("a.tif", "1"), ("b.tif", "1")], [("c.tif", "1")]], "111", ["ab"]),  # all the same
        ([[("a.tif", "1")], [("b.tif", "1")], [("c.tif", "1")]], "111", []),
        ([[("", ""), ("b.tif", "2")]], "-2-", ["abc"]),  # without a UUID: in the very file
        ([[("", "")]], "123", []),
        ([[("sub/../a.tif", "1"), ("./c.tif", "3")]], "123", ["ac"]),
        ([], "111", []),
    ],
)  # fmt: skip
def test_what_images_list(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    prefix: str,
    blocks: list[list[Where]],
    own: str,
    expected: list[str],
) -> None:
    inner = "".join(block(planes, prefix) for planes in blocks)
    uuid = dict(zip("abc", own, strict=True))
    monkeypatch.setattr(ome_sets, "_description", lambda p: xml(inner, uuid[p.stem], prefix))
    sets = sets_of(tmp_path / f"{stem}.tif" for stem in "abc")
    groups: dict[str, str] = {}
    for path, first in sets.items():
        groups[first.stem] = groups.get(first.stem, "") + path.stem
    assert sorted(groups.values()) == expected


def counted(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> list[object]:
    """What ``owner.name`` is called with from now on."""
    calls: list[object] = []
    real: Callable[..., object] = getattr(owner, name)

    def counting(*args: object, **options: object) -> object:
        calls.append(args)
        return real(*args, **options)

    monkeypatch.setattr(owner, name, counting)
    return calls


def test_a_list_that_all_files_have_is_read_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = [f"p{n}.ome.tif" for n in range(300)]
    listed = plate(*(names[n : n + 2] for n in range(0, 300, 2)))
    monkeypatch.setattr(ome_sets, "_description", lambda p: xml(listed, f"urn:{p.name}"))
    resolved = counted(monkeypatch, Path, "resolve")
    placed = counted(monkeypatch, ome_sets, "_at")
    sets = sets_of(tmp_path / name for name in names)
    assert len(set(sets.values())) == 150 and len(sets) == 300
    assert len(resolved) <= 1
    assert len(placed) <= 4 * 300


def test_no_metadata_are_read_where_sides_are_named_and_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fields(tmp_path, NAMES, plate(NAMES))
    looked = counted(monkeypatch, prepare_module, "sets_of")

    def sides(train: str, val: str) -> None:
        rows = [f"images/{n},masks/{n},{train}\nimages/{n},masks/{n},{val}" for n in NAMES]
        (tmp_path / "t.csv").write_text("\n".join(["image,mask,split,cols", *rows]))
        prepare(config(tmp_path / "t.csv", tmp_path / "run"))

    sides("train,:15", "val,15:")
    assert not looked
    with pytest.raises(InputError, match="on the same pixels"):
        sides("train,:16", "val,15:")
    assert len(looked) == 1
