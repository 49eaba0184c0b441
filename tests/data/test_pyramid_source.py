"""Windows of pyramids: aligned at all levels, the same in any order, bounded in memory; whole samples; what is refused."""

import numpy as np
import pytest
from PIL import Image
from test_prepare import texture

from wavepath.config import load_config
from wavepath.data import pipeline
from wavepath.data.pyramid_images import make_image_pyramids
from wavepath.data.pyramid_source import PyramidSource, open_pyramids
from wavepath.data.sources import open_source
from wavepath.defaults import prepare_defaults
from wavepath.errors import ConfigError, DatasetError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pyramids of six images of three sizes, two of each; four levels."""
    images, out = tmp_path_factory.mktemp("images"), tmp_path_factory.mktemp("out") / "pyramids"
    for number, (width, height) in enumerate([(200, 168), (168, 200), (160, 160)] * 2):
        Image.fromarray(texture(number, width + 128, height)[:, :width]).save(images / f"i{number}.png")
    config = prepare_defaults()
    config.pyramids.update(dict(levels=4, min_tissue=0.0))
    make_image_pyramids(images, out, config)
    return out


def whole_of(source, index):
    return {name: image.astype(int) for name, image in source.whole(index).items()}


@pytest.mark.parametrize(
    ("scale", "window", "lr_source"), [(2, 24, "bicubic"), (4, 16, "bicubic"), (8, 12, "bicubic"), (4, 20, "pyramid"), (8, 20, "pyramid")]
)
def test_windows_are_parts_of_whole_samples(folder, scale, window, lr_source):
    source = PyramidSource(folder, "all", scale=scale, window=window, stride=10, lr_source=lr_source)
    assert len(source.samples) == 6 and source.column_names == (("lr", "hr") if scale == 2 else ("lr", "hr", "next"))
    columns = source.columns(np.arange(len(source)))
    seen = [np.zeros(source.whole(number)["lr"].shape[:2], bool) for number in range(6)]
    for index in range(len(source)):
        meta = source.meta(index)
        top, left = map(int, meta["name"].split("_")[-2:])
        images = source.whole(meta["region"])
        seen[meta["region"]][top : top + window, left : left + window] = True
        for name, factor in (("lr", 1), ("hr", scale), ("next", 2)):
            if name in columns:
                place = images[name][factor * top : factor * (top + window), factor * left : factor * (left + window)]
                assert columns[name].dtype == np.uint8 and np.array_equal(columns[name][index], place)
    assert all(part.all() for part in seen)
    for number, facts in enumerate(source.samples):
        images = whole_of(source, number)
        assert images["hr"].shape == (facts["height"], facts["width"], 3) and facts["height"] % scale == facts["width"] % scale == 0
        picture = Image.fromarray(images["hr"].astype(np.uint8))
        size = (facts["width"] // scale, facts["height"] // scale)
        made = np.asarray(picture.resize(size, Image.Resampling.BICUBIC)).astype(int)
        # One bicubic reduction and repeated halvings differ a little; a level that lay elsewhere would differ much.
        assert images["lr"].shape == made.shape and np.abs(images["lr"] - made).mean() < (1e-9 if lr_source == "bicubic" else 3)
        if "next" in images:
            assert np.abs(images["next"] - np.asarray(picture.resize((2 * size[0], 2 * size[1]), Image.Resampling.BICUBIC))).mean() < 3
    assert len({source.meta(index)["name"] for index in range(len(source))}) == len(source) == sum(source.blocks)
    assert [span.slide for span in source.spans] == [facts["slide"] for facts in source.samples]
    assert ("low resolution: pyramid, in 6 of 6 slides made by bicubic halving" in source.describe()) == (lr_source == "pyramid")


def test_splits_share_no_slide(folder):
    parts = {split: PyramidSource(folder, split, scale=2, window=24) for split in ("train", "test", "all")}
    slides = {split: {facts["slide"] for facts in part.samples} for split, part in parts.items()}
    assert len(slides["test"]) == 1 and not slides["train"] & slides["test"] and slides["all"] == slides["train"] | slides["test"]
    assert len(parts["all"]) == len(parts["train"]) + len(parts["test"]) and all(0 < value < 1 for value in parts["test"].mean)


def test_windows_of_one_group_have_names_of_their_own(tmp_path):
    images, config = tmp_path / "images", prepare_defaults()
    images.mkdir()
    for name in ("p1_a", "p1_b", "p2_a"):
        Image.fromarray(texture(0, 288, 160)[:, :160]).save(images / f"{name}.png")
    config.pyramids.update(dict(levels=2, min_tissue=0.0))
    make_image_pyramids(images, tmp_path / "out", config, group_pattern="(p[0-9])")
    source = PyramidSource(tmp_path / "out", "all", scale=2, window=40)
    names = [source.meta(index)["name"] for index in range(len(source))]
    assert len(set(names)) == len(names) == 12 and {name.partition(".")[0] for name in names} == {"p1_a", "p1_b", "p2_a"}


def test_a_small_memory_gives_the_same_windows(folder):
    plain = PyramidSource(folder, "all", scale=4, window=16)
    tight = PyramidSource(folder, "all", scale=4, window=16, cache_mb=0.25)
    assert (plain.best_order, tight.best_order) == ("global", "blocks")
    ids = np.random.default_rng(0).permutation(len(plain))
    for name, column in plain.columns(ids).items():
        assert np.array_equal(column, tight.columns(ids)[name]), name
    assert 0 < tight._held <= 0.25 * 2**20 and len(tight._cache) < 6
    assert tight._held == sum(image.nbytes for images in tight._cache.values() for image in images.values())


def test_batches_of_several_columns(folder, monkeypatch):
    source = PyramidSource(folder, "train", scale=4, window=16)
    with pipeline.batches(source, batch_size=6, seed=1, order="blocks") as stream:
        batch = next(stream)
    kinds = {name: (value.dtype, value.shape) for name, value in batch.items()}
    assert kinds == {
        "lr": (np.uint8, (6, 16, 16, 3)), "hr": (np.uint8, (6, 64, 64, 3)), "next": (np.uint8, (6, 32, 32, 3)),
        "example_id": (np.int32, (6,)), "epoch": (np.int32, (6,)), "position": (np.uint32, (6,)),
    }
    assert all(np.array_equal(batch[name], column) for name, column in source.columns(batch["example_id"]).items())
    with pipeline.eval_batches(source, 5, limit=7) as stream:
        assert [float(batch["mask"].sum()) for batch in stream] == [5, 2]
    # A damaged sample names itself, or is passed over as a tile would be.
    real, bad = PyramidSource._decoded, int(source._rows[1][0])

    def decoded(self, sample):
        if self._rows[sample][0] == bad:
            raise DatasetError("sample is damaged")
        return real(self, sample)

    monkeypatch.setattr(PyramidSource, "_decoded", decoded)
    fresh = PyramidSource(folder, "train", scale=4, window=16)
    with pytest.raises(DatasetError, match="sample is damaged"), pipeline.eval_batches(fresh, 8) as stream:
        list(stream)
    with pipeline.eval_batches(fresh, 8, on_corrupt="replace") as stream:
        ids = np.concatenate([batch["example_id"] for batch in stream])
    assert bad not in {fresh.meta(index)["region"] for index in ids} and stream.corrupt_count == fresh.blocks[1]


def test_what_is_refused(folder, tmp_path, capsys):
    with pytest.raises(DatasetError, match="every sample .* less than 400 px"):
        PyramidSource(folder, "train", scale=2, window=200)
    assert len(PyramidSource(folder, "train", scale=2, window=84).samples) >= 4 and "have less than 168 px" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="scale is 3; choose from 2, 4, 8"):
        PyramidSource(folder, "train", scale=3)
    config = load_config("cwt_net:scale=8,smoke", [f"data.dir={folder}", "superres.patch=12", "superres.margin=0", "data.max_tiles=7"])
    source = open_source(config)
    assert len(source) == 7 and source.column_names == ("lr", "hr", "next") and source.columns([3])["hr"].shape == (1, 96, 96, 3)
    assert len(open_pyramids(config, "test").samples) == 1
    for text, message in (("nobody", "names none of the slides"), ("i0\ni1\ni2\ni3\ni4\ni5", "no sample to train on")):
        (tmp_path / "exclude.txt").write_text(text)
        with config.unlocked():
            config.data.exclude_slides = str(tmp_path / "exclude.txt")
        with pytest.raises(DatasetError, match=message):
            open_source(config)
    with pytest.raises(ConfigError, match="^super-resolution does not stream from slides; make them"):
        open_source(load_config("cwt_net:smoke", [f"data.slides={tmp_path}"]))
    three = prepare_defaults()
    three.pyramids.update(dict(levels=3, min_tissue=0.0))
    images = tmp_path / "images"
    images.mkdir()
    for number in range(2):
        Image.fromarray(texture(number, 288, 160)[:, :160]).save(images / f"{number}.png")
    make_image_pyramids(images, tmp_path / "three", three)
    with pytest.raises(DatasetError, match="3 levels; 8x with lr_source=pyramid needs 4: make them with `wavepath pyramids --levels 4`"):
        PyramidSource(tmp_path / "three", scale=8, window=12, lr_source="pyramid")
    with pytest.raises(DatasetError, match="holds pyramids, which are for task 'superres'"):
        open_source(load_config("wise_mae:smoke", [f"data.dir={folder}"]))
    with pytest.raises(DatasetError, match="there are none in it; make them with `wavepath pyramids"):
        open_source(load_config("cwt_net:smoke", [f"data.dir={images}"]))
    next((tmp_path / "three").glob("pyramids-train*")).unlink()
    with pytest.raises(DatasetError, match="lacks pyramids-train.*run `wavepath pyramids` again"):
        PyramidSource(tmp_path / "three", scale=2, window=12)
