"""The preview: orientation, size and content, for scans of all shapes."""

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from totalfast.cli.main import main
from totalfast.errors import InputError
from totalfast.files.read import read_image
from totalfast.geometry import Grid
from totalfast.preview.page import draw_preview
from totalfast.preview.palette import is_translucent, short_name, structure_colours
from totalfast.preview.slices import enlarge_labels
from totalfast.preview.volume import LabelledVolume
from totalfast.upstream import CLASS_MAPS, label_table_xml

LIVER, SPLEEN = 5, 1


def scene(shape=(60, 50, 40), spacing=(2.0, 2.0, 2.0), affine=None):
    """A CT-like box with the liver on the patient's right and the spleen on their left."""
    affine = np.diag([*spacing, 1.0]) if affine is None else affine
    ct = np.full(shape, -1000, np.int16)
    x, y, z = (n // 6 for n in shape)
    ct[x:-x, y:-y, :] = 40
    labels = np.zeros(shape, np.uint8)
    labels[shape[0] // 2 + 2 : -x, y:-y, z : max(shape[2] - z, z + 1)] = LIVER
    labels[x : shape[0] // 2 - 2, y : 2 * y, z : max(shape[2] - z, z + 1)] = SPLEEN
    return nib.Nifti1Image(ct, affine), nib.Nifti1Image(labels, affine)


def draw(ct, labels, names=CLASS_MAPS["total"]):
    grid = Grid(shape=labels.shape, affine=labels.affine)
    return draw_preview(read_image(ct), np.asarray(labels.dataobj), grid, names, title="title")


def share_of(picture, label, region):
    """Share of a region's pixels that have the hue of a label."""
    colour = np.array(structure_colours(CLASS_MAPS["total"])[label], float)
    pixels = np.asarray(picture, float)[region]
    scaled = pixels / np.maximum(pixels.sum(-1, keepdims=True), 1)
    return float((np.abs(scaled - colour / colour.sum()).sum(-1) < 0.12).mean())


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR", "ILA"])
def test_the_patients_right_is_on_the_left_for_all_axes_of_the_file(axes):
    ct, labels = scene()
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(axes)
    )
    picture = draw(ct.as_reoriented(turn), labels.as_reoriented(turn))
    plain = draw(ct, labels)
    difference = np.abs(np.asarray(picture, int) - np.asarray(plain, int))
    assert difference.mean() < 0.5
    coronal = np.s_[-120:-20, 20 : 20 + 230]
    left, right = np.s_[-100:-20, 40:120], np.s_[-100:-20, 150:230]
    assert share_of(picture, LIVER, left) > share_of(picture, LIVER, right)
    assert np.asarray(picture)[coronal].std() > 10


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [
        ((40, 30, 1), (1.0, 1.0, 5.0)),
        ((64, 64, 4), (0.4, 0.4, 5.0)),
        ((8, 8, 300), (3.0, 3.0, 3.0)),
        ((3, 2, 2), (1.0, 1.0, 1.0)),
        ((256, 256, 1), (1.4, 1.4, 1.0)),
    ],
)
def test_odd_shapes_give_a_picture_of_bounded_size(shape, spacing):
    picture = draw(*scene(shape, spacing))
    assert picture.mode == "RGB"
    assert max(picture.size) < 3500


def test_labels_of_another_grid_are_drawn_on_the_scan():
    ct, labels = scene()
    coarse = nib.Nifti1Image(np.asarray(labels.dataobj)[::2, ::2, ::2], np.diag([4, 4, 4, 1.0]))
    fine, rough = draw(ct, labels), draw(ct, coarse)
    assert abs(fine.size[0] - rough.size[0]) < 30


@pytest.mark.parametrize("shift_mm", [5000, -5000])
def test_labels_outside_of_the_scan_are_refused(shift_mm):
    ct, labels = scene()
    away = labels.affine.copy()
    away[:3, 3] = shift_mm
    with pytest.raises(InputError, match="apart"):
        draw(ct, nib.Nifti1Image(labels.dataobj, away))


def test_a_scan_without_structures_is_drawn():
    ct, labels = scene()
    assert draw(ct, nib.Nifti1Image(np.zeros(labels.shape, np.uint8), labels.affine)).size[0] > 500


def test_the_slice_that_is_shown_has_structures():
    ct, labels = scene()
    only = np.zeros(labels.shape, np.uint8)
    only[10:20, 5:9, 33] = LIVER
    grid = Grid(shape=only.shape, affine=labels.affine)
    volume = LabelledVolume(scan=read_image(ct), labels=only, grid=grid)
    assert volume.slice_with_most_structures(2) == 33
    assert 10 <= volume.slice_with_most_structures(0) < 20
    assert volume.volumes_ml == {LIVER: pytest.approx(10 * 4 * 8 / 1000)}


def test_enlarged_labels_keep_their_area_and_their_places():
    labels = np.zeros((30, 40), np.uint8)
    labels[5:15, 5:20] = 7
    labels[15:25, 5:20] = 9
    large, cover = enlarge_labels(labels, (120, 160))
    for label in (7, 9):
        assert (large == label).sum() == pytest.approx(16 * 150, rel=0.05)
    assert large[40, 40] == 7
    assert large[80, 40] == 9
    assert cover[40, 40] == pytest.approx(1)
    assert not large[:, 100:].any()


def test_short_names():
    assert [short_name(n) for n in ("rib_left_5", "vertebrae_L1", "kidney_right", "liver")] == [
        "rib 5 L",
        "L1",
        "kidney R",
        "liver",
    ]


def test_one_voxel_is_drawn_and_counted():
    ct, labels = scene((200, 150, 60), (0.7, 0.7, 0.7))
    only = np.zeros(labels.shape, np.uint8)
    only[101, 77, 31] = LIVER
    draw(ct, nib.Nifti1Image(only, labels.affine))
    grid = Grid(shape=only.shape, affine=labels.affine)
    volume = LabelledVolume(scan=read_image(ct), labels=only, grid=grid)
    assert volume.volumes_ml == {LIVER: pytest.approx(0.7**3 / 1000)}


def test_a_label_map_without_background_keeps_its_smallest_label():
    ct, labels = scene()
    full = np.full(labels.shape, LIVER, np.uint8)
    full[:10] = SPLEEN
    grid = Grid(shape=full.shape, affine=labels.affine)
    volume = LabelledVolume(scan=read_image(ct), labels=full, grid=grid)
    assert set(volume.volumes_ml) == {LIVER, SPLEEN}


def test_names_are_read_from_the_label_table_of_the_file(tmp_path):
    from totalfast.cli.preview import read_label_map

    write(tmp_path)
    _, _, names = read_label_map(tmp_path / "seg.nii.gz")
    assert names == {LIVER: "liver", SPLEEN: "spleen"}


def test_label_maps_with_a_slope_are_scaled_and_scans_refused(tmp_path):
    from totalfast.cli.preview import read_label_map

    _, labels = scene()
    scaled = nib.Nifti1Image(np.asarray(labels.dataobj, dtype=np.float64), labels.affine)
    scaled.set_data_dtype(np.int16)
    nib.save(scaled, tmp_path / "float.nii.gz")
    assert nib.load(tmp_path / "float.nii.gz").dataobj.slope != 1
    values, _, _ = read_label_map(tmp_path / "float.nii.gz")
    assert np.array_equal(values, np.asarray(labels.dataobj))
    counts = nib.Nifti1Image(np.full((9, 9, 9), 2000, np.uint16), np.eye(4))
    nib.save(counts, tmp_path / "counts.nii.gz")
    with pytest.raises(InputError, match="no label map"):
        read_label_map(tmp_path / "counts.nii.gz")


@pytest.mark.parametrize("name", ["lung_vessels", "lung_nodules", "liver"])
def test_structures_that_enclose_no_others_are_solid(name):
    assert not is_translucent(name)
    assert is_translucent("lung_upper_lobe_left")


def test_every_class_of_every_task_has_a_colour():
    for names in CLASS_MAPS.values():
        assert set(structure_colours(names)) == set(names)


def write(tmp_path):
    ct, labels = scene()
    labels.header.extensions.append(
        nib.nifti1.Nifti1Extension(0, label_table_xml({LIVER: "liver", SPLEEN: "spleen"}))
    )
    nib.save(ct, tmp_path / "ct.nii.gz")
    nib.save(labels, tmp_path / "seg.nii.gz")
    masks = tmp_path / "masks"
    masks.mkdir()
    for label, name in ((LIVER, "liver"), (SPLEEN, "spleen")):
        mask = (np.asarray(labels.dataobj) == label).astype(np.uint8)
        nib.save(nib.Nifti1Image(mask, labels.affine), masks / f"{name}.nii.gz")


@pytest.mark.parametrize("source", ["seg.nii.gz", "masks"])
def test_command_draws_a_label_map_or_a_folder_of_masks(tmp_path, capsys, source):
    write(tmp_path)
    out = tmp_path / "new" / "out.png"
    assert main(["preview", str(tmp_path / "ct.nii.gz"), str(tmp_path / source), str(out)]) == 0
    assert "Done in" in capsys.readouterr().out
    with Image.open(out) as picture:
        assert picture.format == "PNG"
    assert [path.name for path in out.parent.iterdir()] == ["out.png"]


@pytest.mark.parametrize(
    ("scan", "labels", "out", "code", "message"),
    [
        ("ct.nii.gz", "seg.nii.gz", "out.gif", 2, "must end in .png"),
        ("missing.nii.gz", "seg.nii.gz", "out.png", 1, "does not exist"),
        ("ct.nii.gz", "ct.nii.gz", "out.png", 1, "no label map"),
        ("ct.nii.gz", "empty", "out.png", 1, "no masks"),
    ],
)
def test_errors_of_the_command_have_a_message_and_an_exit_code(
    tmp_path, capsys, scan, labels, out, code, message
):
    write(tmp_path)
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    words = ["preview", *(str(tmp_path / name) for name in (scan, labels, out))]
    assert main(words) == code
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
