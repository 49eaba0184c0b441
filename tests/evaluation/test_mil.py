"""Bag networks scored by their folds: against scikit-learn, on slides that they have not seen, with attention on disk; and what is refused."""

import csv
import shutil

import jax
import numpy as np
import pytest
from sklearn import metrics

from wavepath.data.synthetic_bags import make_bags
from wavepath.errors import CheckpointError, ConfigError, DatasetError
from wavepath.evaluation.mil import by_fold, predict_slides, score_slides
from wavepath.evaluation.mil_attention import Exported, spread
from wavepath.evaluation.mil_runs import BagPredictor, arms_of, read_runs
from wavepath.evaluation.mil_train import bag_folders, plan, train_missing
from wavepath.evaluation.probes import Predictions
from wavepath.files import read_json, write_json
from wavepath.interop.attention import read_attention
from wavepath.interop.coords import read_coords
from wavepath.interop.features import read_features, write_features
from wavepath.training.checkpoint import restore_run

TINY = (
    "train.steps=6", "train.eval_every=3", "train.save_every=6", "train.log_every=3", "batch_size=4", "lr=1.0",
    "mil.buckets=(16,)", "mil.embed=4", "mil.hidden=4",
)  # fmt: skip
SLIDES, CASES = 16, 8


@pytest.fixture(scope="module")
def bags(tmp_path_factory):
    """16 slides of 8 cases, at most 16 tiles of 6 features."""
    return make_bags(tmp_path_factory.mktemp("bags"), slides=SLIDES, width=6, tiles=(5, 16))


def jobs_of(bags, out, **more):
    return plan({"": bags[0]}, bags[1], out, folds=2, config="configs/mil.py:smoke", overrides=TINY, **more)


@pytest.fixture(scope="module")
def runs(bags, tmp_path_factory):
    """Both folds of pooling with two seeds, and of CLAM with one."""
    root = tmp_path_factory.mktemp("folds")
    jobs = jobs_of(bags, root / "mean", networks=("mean",), seeds=2) + jobs_of(bags, root / "clam", networks=("clam_mb",))
    assert train_missing(jobs)
    return root


@pytest.fixture(scope="module")
def scored(runs):
    return score_slides([runs / "mean"], runs / "out", positive="class_1", bootstraps=50)


@pytest.fixture
def copy(runs, tmp_path):
    """The runs of pooling, to be spoilt."""
    return shutil.copytree(runs / "mean" / "runs" / "mean", tmp_path / "copy")


def rows(out):
    with open(out / "predictions.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_metrics_are_scikit_learns_together_and_by_fold(runs, scored):
    entry, lines = scored["probes"]["mean"], rows(runs / "out")
    assert scored["slides"] == SLIDES and scored["groups"] == CASES and scored["classes"] == {"class_0": 8, "class_1": 8}
    pooled, folds = [], {}
    for seed in "01":
        mine = [row for row in lines if row["seed"] == seed]
        assert len(mine) == len({row["slide"] for row in mine}) == SLIDES
        pooled.append(area(mine))
        for fold in "01":
            folds.setdefault(fold, []).append(area([row for row in mine if row["fold"] == fold]))
    assert entry["auc"]["value"] == pytest.approx(np.mean(pooled), abs=1e-6) and entry["auc"]["sd"] == pytest.approx(np.std(pooled, ddof=1), abs=1e-6)
    means = [np.mean(values) for values in folds.values()]
    found = entry["per_fold"]["auc"]
    assert found["value"] == pytest.approx(np.mean(means), abs=1e-6) and found["sd"] == pytest.approx(np.std(means, ddof=1), abs=1e-6)
    assert found["values"] == pytest.approx(means, abs=1e-6) and entry["auc"]["low"] <= entry["auc"]["value"] <= entry["auc"]["high"]
    truth, predicted = ([row[name] for row in lines if row["seed"] == "0"] for name in ("label", "predicted"))
    assert np.sum(entry["confusion"]) == 2 * SLIDES and "sensitivity" in entry and entry["seeds"] == 2 and entry["folds"] == 2
    assert 0 <= metrics.balanced_accuracy_score(truth, predicted) <= 1
    text = (runs / "out" / "results.md").read_text()
    assert "16 slides" in text and "auc by fold" in text and "best validation loss" in text
    assert read_json(runs / "out" / "results.json")["probes"].keys() == {"mean"} and (runs / "out" / "confusion.png").stat().st_size > 1000


def area(lines):
    return metrics.roc_auc_score([row["label"] == "class_1" for row in lines], [float(row["p_class_1"]) for row in lines])


def test_each_slide_is_scored_by_the_run_that_has_not_seen_its_case(runs, scored):
    for row in rows(runs / "out"):
        split = read_json(runs / "mean" / "runs" / "mean" / f"seed_{row['seed']}" / f"fold_{row['fold']}" / "constants.json")["split"]
        assert row["slide"] in split["test"] and row["run"].endswith(f"seed_{row['seed']}/fold_{row['fold']}")
        seen = {case_of(slide) for slide in split["train"] + split["validation"]}
        assert row["case"] == case_of(row["slide"]) and row["case"] not in seen


def case_of(slide):
    number = int(slide.rpartition("_")[2])
    return f"case_{number % 2}_{number // 4:03d}"


def test_predictions_and_attention_are_those_of_the_kept_checkpoint(runs, bags, tmp_path):
    score_slides([runs / "clam"], tmp_path, bootstraps=5)
    row = next(row for row in rows(tmp_path) if row["fold"] == "1")
    _, task, state = restore_run(runs / "clam" / "runs" / "clam_mb" / "seed_0" / "fold_1")
    bag = read_features(bags[0] / f"{row['slide']}.h5")
    out = jax.jit(task.predict)(state, {"features": bag.features[None], "tiles": np.ones((1, len(bag)), bool)})
    assert float(row["p_class_1"]) == pytest.approx(float(out["probability"][0, 1]), abs=2e-6)
    path = tmp_path / "attention" / f"{row['slide']}.h5"
    found = read_attention(path)
    np.testing.assert_allclose(found.attention, out["class_attention"][0], atol=1e-6)
    np.testing.assert_allclose(found.attention.sum(1), 1, atol=1e-5)
    np.testing.assert_array_equal(found.of_class(), found.attention[found.classes.index(found.predicted)])
    np.testing.assert_array_equal(found.coords, bag.coords)
    assert found.label == row["label"] and found.predicted == row["predicted"] and found.classes == ("class_0", "class_1")
    assert found.size_level0 == 256 and found.model["fold"] == 1 and found.model["case"] == row["case"]
    assert read_coords(path).geometry.footprint == 256  # TRIDENT's readers take the file for coordinates
    assert len(list((tmp_path / "attention").glob("*.h5"))) == SLIDES


def test_several_arms_are_rows_of_one_table_with_attention_of_each(runs, tmp_path):
    results = score_slides([runs / "mean", runs / "clam"], tmp_path, bootstraps=5)
    assert list(results["probes"]) == ["mean", "clam_mb"] and results["probes"]["clam_mb"]["seeds"] == 1
    assert {path.name for path in (tmp_path / "attention").iterdir()} == {"mean", "clam_mb"}
    assert read_attention(tmp_path / "attention" / "mean" / "synthetic_000.h5").attention.ndim == 1


def test_slides_of_pretraining_are_left_out_of_the_test(bags, copy, tmp_path):
    shutil.copytree(bags[0], tmp_path / "features")
    write_json(tmp_path / "features" / "embed.json", {"train_slides": ["synthetic_000", "elsewhere"]})
    results = score_slides([copy], tmp_path / "out", data=tmp_path / "features", bootstraps=5)
    assert results["slides"] == 15
    assert results["overlap"]["mean"] == {"count": 1, "of": SLIDES, "known": True, "scored": False, "slides": ["synthetic_000"]}
    assert "1 of 16 slides was pretrained on: not in the test" in (tmp_path / "out" / "results.md").read_text()
    assert not (tmp_path / "out" / "attention" / "synthetic_000.h5").exists()
    results = score_slides([copy], tmp_path / "kept", data=tmp_path / "features", keep_pretraining_slides=True, bootstraps=5)
    assert results["slides"] == SLIDES and "scored all the same" in results["notes"][0]
    write_json(tmp_path / "features" / "embed.json", {"train_slides": [f"synthetic_{number:03d}" for number in range(SLIDES)]})
    with pytest.raises(DatasetError, match="--keep-pretraining-slides"):
        score_slides([copy], tmp_path / "none", data=tmp_path / "features")


def test_each_seed_may_have_an_encoder_of_its_own(bags, tmp_path):
    """One arm, whose seed 1 has learnt from, and is tested on, the features of encoder 1: here those of encoder 0 mirrored."""
    root = tmp_path / "features"
    shutil.copytree(bags[0], root / "0")
    for path in sorted(bags[0].glob("*.h5")):
        one = read_features(path)
        write_features(root / "1" / path.name, -one.features, one.coords, one.attributes, one.extra)
    write_json(root / "1" / "embed.json", {"train_slides": ["synthetic_000"]})
    jobs = plan({"": root / "{seed}"}, bags[1], tmp_path, networks=("mean",), seeds=2, folds=2, config="configs/mil.py:smoke", overrides=TINY)
    assert train_missing(jobs)
    runs = read_runs([tmp_path / "runs"])
    assert list(arms_of(runs)) == ["mean"] and {run.features for run in runs} == {str(root / "0"), str(root / "1")}
    predictor = BagPredictor()
    first, second = (next(run for run in runs if (run.seed, run.fold) == (seed, 0)) for seed in (0, 1))
    np.testing.assert_array_equal(predictor.source(second).bag(3), -predictor.source(first).bag(3))
    results = score_slides([tmp_path / "runs"], tmp_path / "out", bootstraps=5)
    # A slide that one of the encoders was pretrained on is tested by none; of the other nothing is known.
    assert results["slides"] == SLIDES - 1 and results["overlap"]["mean"]["count"] == 1 and results["probes"]["mean"]["seeds"] == 2
    with pytest.raises(DatasetError, match=r"no folder .*features/2 for seed 2, fold 0"):  # before any training
        plan({"": root / "{seed}"}, bags[1], tmp_path, networks=("mean",), seeds=3, folds=2, config="configs/mil.py:smoke", overrides=TINY)


def test_each_fold_may_have_an_encoder_that_has_seen_the_other_folds(bags, tmp_path):
    root = tmp_path / "features"
    for fold in "01":
        shutil.copytree(bags[0], root / fold)
    jobs = plan({"": root / "{fold}"}, bags[1], tmp_path, networks=("mean",), folds=2, config="configs/mil.py:smoke", overrides=TINY)
    assert train_missing(jobs)
    tests = {run.fold: run.constants["split"]["test"] for run in read_runs([tmp_path / "runs"])}
    for fold in (0, 1):
        write_json(root / str(fold) / "embed.json", {"train_slides": tests[1 - fold]})
    results = score_slides([tmp_path / "runs"], tmp_path / "out", bootstraps=5)
    assert results["slides"] == SLIDES and results["overlap"]["mean"]["count"] == 0
    write_json(root / "0" / "embed.json", {"train_slides": [*tests[1], tests[0][0]]})
    results = score_slides([tmp_path / "runs"], tmp_path / "out", bootstraps=5)
    assert results["slides"] == SLIDES - 1 and results["overlap"]["mean"]["slides"] == [tests[0][0]]


def test_new_slides_get_the_mean_of_the_runs(runs, tmp_path):
    folder, table = make_bags(tmp_path / "new", slides=5, width=6, tiles=(3, 9), seed=1)
    for number in range(5):  # ids that the runs do not know
        (folder / f"synthetic_{number:03d}.h5").rename(folder / f"fresh_{number}.h5")
    table.write_text(table.read_text().replace("synthetic_00", "fresh_"))
    results = predict_slides([runs / "clam"], folder, tmp_path / "out")
    predictor, found = BagPredictor(), rows(tmp_path / "out")
    members = read_runs([runs / "clam"])
    from wavepath.data.bags import feature_bags

    source = feature_bags(folder)
    each = [predictor.predict(run, source, np.arange(5)) for run in members]
    np.testing.assert_allclose([float(row["p_class_1"]) for row in found], np.mean(each, axis=0)[:, 1], atol=1e-6)
    assert sum(results["predicted"].values()) == 5 and "probes" not in results and len(results["table"][1]) == 5
    one = read_attention(tmp_path / "out" / "attention" / "fresh_3.h5")
    np.testing.assert_allclose(one.attention.sum(1), 1, atol=1e-5)
    assert one.label == "" and one.model["runs"] == 2
    scored = predict_slides([runs / "clam"], folder, tmp_path / "scored", labels=table, bootstraps=5)
    truth = [row["label"] == "class_1" for row in rows(tmp_path / "scored")]
    mean, single = scored["probes"]["clam_mb, mean of 2 runs"], scored["probes"]["clam_mb, each run"]
    assert mean["auc"]["value"] == pytest.approx(metrics.roc_auc_score(truth, np.mean(each, axis=0)[:, 1]), abs=1e-6)
    assert single["auc"]["value"] == pytest.approx(np.mean([metrics.roc_auc_score(truth, scores[:, 1]) for scores in each]), abs=1e-6)


def test_slides_of_the_training_are_no_new_slides(runs, bags, tmp_path, capsys):
    with pytest.raises(DatasetError, match="was trained on .* of the 16 slides"):
        predict_slides([runs / "clam"], bags[0], tmp_path, labels=bags[1])
    predict_slides([runs / "clam"], bags[0], tmp_path)
    assert "no prediction" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="runs of one kind, not 2"):
        predict_slides([runs / "clam", runs / "mean"], bags[0], tmp_path)


def test_features_of_another_width_are_refused(runs, copy, tmp_path):
    folder, table = make_bags(tmp_path / "wide", slides=SLIDES, width=7, tiles=(5, 16))
    with pytest.raises(DatasetError, match="width 6, .*7"):
        predict_slides([runs / "clam"], folder, tmp_path / "out")
    with pytest.raises(DatasetError, match="other features .*width 6, now 7.*--data"):
        score_slides([copy], tmp_path / "out", data=folder)


def test_what_has_moved_or_changed_is_named(bags, copy, tmp_path):
    moved = shutil.copytree(bags[0], tmp_path / "moved")
    assert score_slides([copy], tmp_path / "out", data=moved, bootstraps=5)["slides"] == SLIDES
    with pytest.raises(DatasetError, match="--data"):
        score_slides([copy], tmp_path / "out", data=tmp_path / "nowhere")
    other = tmp_path / "labels.csv"
    other.write_text(bags[1].read_text().replace("synthetic_000,class_0", "synthetic_000,class_1"))
    with pytest.raises(DatasetError, match="other slides or labels"):
        score_slides([copy], tmp_path / "out", labels=other)
    other.write_text(bags[1].read_text().replace("class_1", "class_2"))
    with pytest.raises(DatasetError, match="other slides or labels .*classes"):
        score_slides([copy], tmp_path / "out", labels=other)
    path = moved / f"{read_json(copy / 'seed_0' / 'fold_0' / 'constants.json')['split']['train'][0]}.h5"
    one = read_features(path)
    write_features(path, one.features[:-1], one.coords[:-1], one.attributes)
    with pytest.raises(DatasetError, match="other tiles"):
        score_slides([copy], tmp_path / "out", data=moved)


def test_folds_must_be_whole_once_and_apart(copy, tmp_path, capsys):
    again = shutil.copytree(copy / "seed_0" / "fold_0", tmp_path / "again")
    with pytest.raises(ConfigError, match="fold 0 of 'mean', seed 0, is there twice"):
        score_slides([copy, again], tmp_path / "out")
    shutil.rmtree(copy / "seed_1" / "fold_0")
    with pytest.raises(ConfigError, match="'mean', seed 1, lacks fold 0 of 2"):
        score_slides([copy], tmp_path / "out")
    results = score_slides([copy], tmp_path / "out", partial=True, bootstraps=5)
    assert results["probes"]["mean"]["seeds"] == 2 and "lacks fold 0" in capsys.readouterr().err
    status = copy / "seed_1" / "fold_1" / "status.json"
    write_json(status, read_json(status) | {"status": "preempted", "step": 3})
    shutil.rmtree(copy / "seed_0")
    with pytest.raises(ConfigError, match="not finished"):
        score_slides([copy], tmp_path / "out")
    shutil.rmtree(copy / "seed_1" / "fold_1" / "checkpoints")
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        score_slides([copy], tmp_path / "out", partial=True)


def test_folds_that_share_a_case_are_refused(copy, tmp_path):
    path = copy / "seed_0" / "fold_1" / "constants.json"
    other = read_json(copy / "seed_0" / "fold_0" / "constants.json")["split"]["test"]
    constants = read_json(path)
    constants["split"]["test"].append(other[0])
    write_json(path, constants)
    with pytest.raises(ConfigError, match="is tested by both"):
        score_slides([copy], tmp_path / "out")


def test_runs_of_another_task_and_unbegun_ones_are_refused(copy, tmp_path):
    path = copy / "seed_0" / "fold_1" / "config.json"
    write_json(path, read_json(path) | {"task": "mae"})
    with pytest.raises(ConfigError, match="task 'mae'; wanted is one of configs/mil.py"):
        score_slides([copy], tmp_path / "out")
    (copy / "seed_0" / "fold_0" / "constants.json").unlink()
    with pytest.raises(ConfigError, match="has not begun to train"):
        score_slides([copy], tmp_path / "out")


def test_a_fold_of_one_class_leaves_the_metrics_of_all_folds(capsys):
    parts = [
        Predictions(("a", "b"), np.array(truth), np.eye(2)[np.array(truth)], np.array(["x", "y"]), np.full(2, fold))
        for fold, truth in enumerate(([0, 1], [1, 1]))
    ]
    assert by_fold("arm", [parts]) == {"lacking": {"1": ["a"]}} and "no slide of a is tested in fold 1" in capsys.readouterr().err
    assert by_fold("arm", [parts[:1]]) == {}
    parts[1].truth[0] = 0
    found = by_fold("arm", [parts])
    assert found["accuracy"] == {"value": 0.75, "sd": round(0.125**0.5, 6), "folds": 2, "values": [1.0, 0.5]}
    assert by_fold("arm", [parts[1:], parts[:1]])["accuracy"]["values"] == [1.0, 0.5]  # a seed that lacks the first fold


def test_whole_runs_are_left_alone_and_missing_ones_trained(bags, runs, capsys):
    jobs = jobs_of(bags, runs / "mean", networks=("mean",), seeds=2)
    before = {job.folder: (job.folder / "status.json").stat().st_mtime_ns for job in jobs}
    assert train_missing(jobs) and "4 of them whole already" in capsys.readouterr().err
    assert before == {job.folder: (job.folder / "status.json").stat().st_mtime_ns for job in jobs}


def test_plans_have_a_run_for_each_fold_and_refuse_what_does_not_fit(bags, tmp_path):
    named = {"ours": bags[0], "floor": bags[0]}
    jobs = plan(named, bags[1], tmp_path, networks=("max",), seeds=2, folds=0, overrides=("lr=0.3",))
    assert len({job.folder for job in jobs}) == len(jobs) == 2 * 2 * CASES
    assert jobs[-1].folder == tmp_path / "runs" / "floor" / "max" / "seed_1" / "fold_7" and jobs[-1].config.lr == 0.3
    assert jobs[-1].config.mil.network == "max" and jobs[-1].config.data.fold == 7 and jobs[-1].config.seed == 1
    for number in range(3):
        (tmp_path / f"splits_{number}.csv").write_text("train,val,test\n")
    assert len(plan({"": bags[0]}, bags[1], tmp_path, splits=str(tmp_path))) == 3
    assert len(plan({"": bags[0]}, bags[1], tmp_path, splits=str(tmp_path / "splits_0.csv"))) == 1
    for more, words in (
        (dict(folds=3, splits="camelyon16"), "two ways"), (dict(overrides=["data.fold=1"]), "config.data.fold is set for each run"),
        (dict(folds=9), "give --folds 8 at most"),
        (dict(seeds=0), "at least 1"), (dict(config="configs/finetune.py:smoke"), "network"), (dict(splits=str(bags[0])), "no splits_<fold>.csv"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            plan({"": bags[0]}, bags[1], tmp_path, **more)


def test_folders_may_be_named(tmp_path):
    assert {name: folder.as_posix() for name, folder in bag_folders(["a=x/y"]).items()} == {"a": "x/y"}
    assert list(bag_folders([str(tmp_path / "one"), str(tmp_path / "two")])) == ["one", "two"] and list(bag_folders(["one"])) == [""]
    with pytest.raises(ConfigError, match="are called 'one'"):
        bag_folders(["a/one", "b/one"])
    with pytest.raises(ConfigError, match="twice, as 'a' and 'b'"):
        bag_folders(["a=one", "b=one"])
    with pytest.raises(ConfigError, match="a name and a folder"):
        bag_folders(["=x"])


def test_arms_are_called_by_network_and_features(runs):
    found = read_runs([runs / "mean", runs / "clam"])
    assert list(arms_of(found)) == ["mean", "clam_mb"]
    folder = str(found[0].config.data.bags)
    assert list(arms_of(found, {folder: "ours"})) == ["ours, mean", "ours, clam_mb"]
    for run in found[4:]:
        run.config.data.bags = run.given.data.bags = "/elsewhere/theirs"
    assert list(arms_of(found, {folder: "ours", "/elsewhere/theirs": "theirs"})) == ["ours, mean", "theirs, clam_mb"]


def test_slides_to_draw_are_of_every_class_alike():
    every = [Exported(f"s{number:02d}", None, "abmil", "ab"[number >= 8], "a") for number in range(10)]
    assert [one.slide for one in spread(every, 4)] == ["s00", "s04", "s08", "s09"] and spread(every, 0) == []
    assert len(spread(every, 7)) == 7 and len(spread(every, 99)) == 10
