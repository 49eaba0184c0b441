"""Fine-tuning runs trained on folds of a toy set, pooled: against scikit-learn, on held-out tiles alone, and what is refused."""

import csv
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn import metrics

from wavepath.cli import main
from wavepath.config import load_config
from wavepath.data.labelled import LabelledSource, open_labelled, split
from wavepath.errors import ConfigError, DatasetError
from wavepath.evaluation.crossvalidate import check, cross_validated, group, read_fold_runs
from wavepath.evaluation.report import write_report
from wavepath.files import read_json, write_json
from wavepath.interop.features import write_features
from wavepath.models.vit import VARIANTS, Variant
from wavepath.training.checkpoint import restore_run
from wavepath.training.loop import train

SETTINGS = (
    "model.image_size=16", "model.patch=8", "data.label_pattern=^(.)/", "data.case_pattern=/([0-9]+)_", "data.folds=2", "batch_size=8", "lr=0.5",
    "train.steps=4", "train.eval_every=2", "train.log_every=1", "train.save_every=2", "writers.tensorboard=false", "parallel.devices=1",
    "augment.crop_scale=(1.0,1.0)", "finetune.rand_ops=0", "finetune.erasing=0.0", "model.drop_path=0.0", "prepare.tiles.size=16",
)


@pytest.fixture(scope="module", autouse=True)
def tiny():
    before, VARIANTS["XT"] = VARIANTS["XT"], Variant(16, 1, 2)
    yield
    VARIANTS["XT"] = before


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    """10 cases x 3 tiles of two classes that differ in brightness."""
    root, rng = tmp_path_factory.mktemp("tiles"), np.random.default_rng(0)
    for case in range(10):
        for tile in range(3):
            path = root / "ab"[case % 2] / f"{case}_{tile}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(np.clip(rng.normal(110 + 30 * (case % 2), 40, (16, 16, 3)), 0, 255).astype(np.uint8)).save(path)
    return root


def fold_config(tiles, fold, seed=0, *more):
    return load_config("configs/finetune.py:smoke", [f"config.{item}" for item in (
        *SETTINGS, f"data.dir={tiles}", f"data.fold={fold}", f"seed={seed}", *more)])


@pytest.fixture(scope="module")
def runs(tiles, tmp_path_factory):
    """Both folds with two seeds."""
    root = tmp_path_factory.mktemp("folds")
    for seed in range(2):
        for fold in range(2):
            train(fold_config(tiles, fold, seed), root / f"fold={fold}" / f"seed{seed}")
    return root


@pytest.fixture(scope="module")
def scored(runs):
    return cross_validated([runs], runs / "evaluation", positive="b", bootstraps=50)


def rows(runs):
    with open(runs / "evaluation" / "predictions.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_pooled_metrics_are_scikit_learns(runs, scored):
    entry = scored["probes"]["fine-tuned"]
    values = {name: [] for name in ("accuracy", "balanced_accuracy", "macro_f1", "auc", "sensitivity", "specificity")}
    for seed in "01":
        mine = [row for row in rows(runs) if row["seed"] == seed]
        truth, predicted = np.array([row["label"] for row in mine]), np.array([row["predicted"] for row in mine])
        values["accuracy"].append(metrics.accuracy_score(truth, predicted))
        values["balanced_accuracy"].append(metrics.balanced_accuracy_score(truth, predicted))
        values["macro_f1"].append(metrics.f1_score(truth, predicted, average="macro"))
        values["auc"].append(metrics.roc_auc_score(truth == "b", [float(row["p_b"]) for row in mine]))
        values["sensitivity"].append(metrics.recall_score(truth, predicted, pos_label="b"))
        values["specificity"].append(metrics.recall_score(truth, predicted, pos_label="a"))
    for name, each in values.items():
        assert entry[name]["value"] == pytest.approx(np.mean(each), abs=2e-3 if name == "auc" else 1e-6), name
        assert entry[name]["sd"] == pytest.approx(np.std(each, ddof=1), abs=2e-3 if name == "auc" else 1e-6), name
        assert entry[name]["low"] <= entry[name]["value"] <= entry[name]["high"]
    assert scored["tiles"] == 30 and scored["groups"] == 10 and scored["classes"] == {"a": 15, "b": 15} and entry["seeds"] == 2
    assert np.sum(entry["confusion"]) == 60
    assert read_json(runs / "evaluation" / "results.json") == json.loads(json.dumps(scored))
    assert "±" in (runs / "evaluation" / "results.md").read_text() and (runs / "evaluation" / "confusion.png").stat().st_size > 1000


def test_each_tile_is_scored_once_by_the_run_that_has_not_seen_its_case(runs, scored):
    for seed in "01":
        mine = [row for row in rows(runs) if row["seed"] == seed]
        assert len({row["tile"] for row in mine}) == len(mine) == 30
        for row in mine:
            held = read_json(runs / f"fold={row['fold']}" / f"seed{seed}" / "constants.json")["held_out_cases"]
            assert row["case"] in held and row["run"].endswith(f"fold={row['fold']}/seed{seed}")


def test_predictions_are_those_of_the_last_checkpoint(runs, scored):
    run = runs / "fold=1" / "seed0"
    config, task, state = restore_run(run)
    held = split(open_labelled(config), 2, 1, 0).held_out
    predict = jax.jit(lambda state, images: task.predict(state, {"image": images}, ["probability"])["probability"])
    expected = np.asarray(predict(state, jnp.asarray(held.images(np.arange(len(held))))))
    found = {row["tile"]: float(row["p_b"]) for row in rows(runs) if row["seed"] == "0" and row["fold"] == "1"}
    np.testing.assert_allclose([found[held.tile_name(index)] for index in range(len(held))], expected[:, 1], atol=1e-5)


def test_the_loop_evaluates_on_the_held_out_fold(runs):
    run = runs / "fold=0" / "seed1"
    config, task, state = restore_run(run)
    held = split(open_labelled(config), 2, 0, 0).held_out
    sums = jax.jit(task.eval_step)(state, {"image": jnp.asarray(held.images(np.arange(len(held)))), "label": jnp.asarray(held.labels)})
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert last["eval_loss"] == pytest.approx(float(sums["loss"][0] / sums["loss"][1]), rel=1e-4)
    assert last["eval_accuracy"] == pytest.approx(float(sums["accuracy"][0] / sums["accuracy"][1]))
    assert read_json(run / "constants.json")["classes"] == ["a", "b"]


def test_missing_folds_are_refused_unless_partial(runs, tmp_path):
    one = runs / "fold=0" / "seed0"
    with pytest.raises(ConfigError, match="lacks fold 1 of 2.*config.data.fold=1.*--partial"):
        cross_validated([one], tmp_path / "out")
    results = cross_validated([one], tmp_path / "out", partial=True, bootstraps=10)
    assert results["tiles"] == sum(read_json(one / "constants.json")["held_out_tiles"].values()) < 30
    assert "sensitivity" not in results["probes"]["fine-tuned"] and results["seeds"] == 1


def test_a_fold_twice_shared_cases_and_other_tasks_are_refused(runs, tmp_path):
    shutil.copytree(runs / "fold=0" / "seed0", tmp_path / "again")
    with pytest.raises(ConfigError, match="fold 0 of .* is there twice"):
        cross_validated([runs / "fold=0" / "seed0", tmp_path / "again", runs / "fold=1" / "seed0"], tmp_path / "out")
    constants = read_json(tmp_path / "again" / "constants.json")
    other = "1" if "1" not in constants["held_out_cases"] else "0"
    write_json(tmp_path / "again" / "constants.json", {**constants, "held_out_cases": [other, *constants["held_out_cases"]]})
    with pytest.raises(ConfigError, match=f"case '{other}' is held out by both"):
        check("arm", read_fold_runs([tmp_path / "again", runs / "fold=1" / "seed0"]), False)
    config = read_json(tmp_path / "again" / "config.json")
    write_json(tmp_path / "again" / "config.json", {**config, "task": "mae"})
    with pytest.raises(ConfigError, match="is a run of task 'mae'"):
        read_fold_runs([tmp_path / "again"])


def test_an_unfinished_run_is_refused_by_its_step(runs, tmp_path):
    shutil.copytree(runs / "fold=0" / "seed0", tmp_path / "run")
    status = read_json(tmp_path / "run" / "status.json")
    write_json(tmp_path / "run" / "status.json", {**status, "status": "preempted", "step": 3})
    with pytest.raises(ConfigError, match=r"not finished \(stopped, step 3 of 4\)"):
        cross_validated([tmp_path / "run", runs / "fold=1" / "seed0"], tmp_path / "out")


def test_labels_that_changed_since_the_training_are_refused(runs, tmp_path):
    shutil.copytree(runs / "fold=0" / "seed0", tmp_path / "run")
    constants = read_json(tmp_path / "run" / "constants.json")
    write_json(tmp_path / "run" / "constants.json", {**constants, "labels": "00000000"})
    with pytest.raises(ConfigError, match="not those that the run began with"):
        cross_validated([tmp_path / "run"], tmp_path / "out", partial=True)


def test_other_settings_are_other_arms(runs, tmp_path):
    for fold in range(2):
        shutil.copytree(runs / f"fold={fold}" / "seed0", tmp_path / f"other{fold}")
        config = read_json(tmp_path / f"other{fold}" / "config.json")
        config["lr"] = 0.25
        write_json(tmp_path / f"other{fold}" / "config.json", config)
    found = read_fold_runs([runs / "fold=0", runs / "fold=1", tmp_path / "other0", tmp_path / "other1"])
    arms = group(found)
    assert {name: len(members) for name, members in arms.items()} == {"lr=0.25": 2, "lr=0.5": 4}
    results = cross_validated([run.folder for run in found], tmp_path / "out", bootstraps=10)
    one, two = results["probes"]["lr=0.25"], results["probes"]["lr=0.5"]
    assert "sd" not in one["accuracy"] and "sd" in two["accuracy"] and results["tiles"] == 30


def test_templates_of_pretraining_runs_are_one_arm(runs, tmp_path):
    for fold in range(2):
        shutil.copytree(runs / f"fold={fold}" / "seed0", tmp_path / f"fold{fold}")
        config = read_json(tmp_path / f"fold{fold}" / "config.json")
        write_json(tmp_path / f"fold{fold}" / "config.json", {**config, "init_from": "pre/fold{fold}"})
    assert {name: len(members) for name, members in group(read_fold_runs([tmp_path])).items()} == {"fine-tuned": 2}


def test_moved_data_is_found_by_its_new_place_and_other_data_is_refused(runs, scored, tiles, tmp_path, monkeypatch):
    members = [runs / f"fold={fold}" / "seed0" for fold in range(2)]
    for fold, run in enumerate(members):
        shutil.copytree(run, tmp_path / f"run{fold}")
        config = read_json(tmp_path / f"run{fold}" / "config.json")
        config["data"]["dir"] = str(tmp_path / f"gone{fold}")
        write_json(tmp_path / f"run{fold}" / "config.json", config)
    moved = [tmp_path / "run0", tmp_path / "run1"]
    closed = []
    close = LabelledSource.close
    monkeypatch.setattr(LabelledSource, "close", lambda source: closed.append(source) or close(source))
    with pytest.raises(DatasetError, match="gone0; give the place where they are with --data"):
        cross_validated(moved[:1], tmp_path / "out", partial=True)
    shutil.copytree(tiles, tmp_path / "tiles")
    found = cross_validated(moved, tmp_path / "out", data=tmp_path / "tiles", bootstraps=5)
    assert found["probes"] == cross_validated(members, tmp_path / "again", bootstraps=5)["probes"]
    assert len(closed) == 2
    for path in (tmp_path / "tiles").rglob("*.png"):  # the same labels and cases, other tiles
        path.rename(path.with_name(path.name.replace("_", "_x")))
    with pytest.raises(DatasetError, match="run0 was trained on other tiles than those of .*tiles; give its own with --data"):
        cross_validated(moved, tmp_path / "out", data=tmp_path / "tiles")
    assert len(closed) == 3, "closed after an error too"
    with pytest.raises(ConfigError, match="leave --labels out"):
        cross_validated(moved, tmp_path / "out", data=tmp_path / "tiles", labels=tmp_path / "labels.csv")


def test_labels_of_runs_may_have_moved(runs, tiles, tmp_path):
    names = sorted(path.relative_to(tiles).with_suffix("").as_posix() for path in tiles.rglob("*.png"))
    text = "tile_id,label,case_id\n" + "".join(f"{name},{name[0]},{name[2]}\n" for name in names)
    (tmp_path / "labels.csv").write_text(text)
    shutil.copytree(runs / "fold=0" / "seed0", tmp_path / "run")
    config = read_json(tmp_path / "run" / "config.json")
    config["data"] |= {"labels": str(tmp_path / "gone.csv"), "label_pattern": "", "case_pattern": ""}
    write_json(tmp_path / "run" / "config.json", config)
    with pytest.raises(DatasetError, match="gone.csv; give the place where they are with --labels"):
        cross_validated([tmp_path / "run"], tmp_path / "out", partial=True)
    assert cross_validated([tmp_path / "run"], tmp_path / "out", partial=True, labels=tmp_path / "labels.csv", bootstraps=5)["tiles"] < 30
    (tmp_path / "labels.csv").write_text(text.replace(",a,", ",c,"))
    with pytest.raises(ConfigError, match="not those that the run began with"):
        cross_validated([tmp_path / "run"], tmp_path / "out", partial=True, labels=tmp_path / "labels.csv")


def pretrained(runs, folder, train_slides):
    """Both folds of the first seed, as if they had started from an encoder that was trained on these."""
    for fold in range(2):
        run = folder / f"fold{fold}"
        shutil.copytree(runs / f"fold={fold}" / "seed0", run)
        write_json(run / "config.json", {**read_json(run / "config.json"), "init_from": "pre"})
        seen = train_slides[fold] if isinstance(train_slides, tuple) else train_slides
        write_json(run / "constants.json", {**read_json(run / "constants.json"), "init_from": {"run": "pre", "train_slides": seen}})
    return folder


def test_what_the_encoder_was_pretrained_on_is_not_scored(runs, scored, tiles, tmp_path):
    assert scored["overlap"]["fine-tuned"] == {"count": 0, "of": 2, "known": True, "scored": False, "slides": []}
    assert not any("pretrained" in note for note in scored["notes"])
    some = pretrained(runs, tmp_path / "some", [str(tiles / "a"), "/elsewhere/b"])
    found = cross_validated([some], tmp_path / "out", bootstraps=5)
    assert found["tiles"] == 15 and found["classes"] == {"a": 0, "b": 15} and found["probes"]["fine-tuned"]["auc"]["value"] is None
    assert found["notes"][0] == "1 of 2 slides was pretrained on: not in the test" and np.sum(found["probes"]["fine-tuned"]["confusion"]) == 15
    kept = cross_validated([some], tmp_path / "out", bootstraps=5, keep_pretraining=True)
    assert kept["tiles"] == 30 and kept["overlap"]["fine-tuned"]["slides"] == [str(tiles / "a")] and kept["overlap"]["fine-tuned"]["scored"]
    every = pretrained(runs, tmp_path / "all", [str(tiles / "a"), str(tiles / "b")])
    with pytest.raises(DatasetError, match="pretrained on all 2 slides.*exclude_slides.*--keep-pretraining-slides"):
        cross_validated([every], tmp_path / "out", bootstraps=5)
    unknown = cross_validated([pretrained(runs, tmp_path / "unknown", None)], tmp_path / "out", bootstraps=5)
    assert unknown["tiles"] == 30 and "unknown which of the 2 slides" in unknown["notes"][0]


@pytest.fixture
def features(tiles, tmp_path):
    """Features of the tiles that the runs were trained and tested on, as `wavepath embed` names them."""
    rng = np.random.default_rng(0)
    for label in "ab":
        names = np.array(sorted(f"{label}/{path.stem}" for path in (tiles / label).glob("*.png")))
        values = rng.normal(size=(len(names), 4)) + 3 * (label == "b")
        write_features(tmp_path / "features" / f"{label}.h5", values, np.zeros((len(names), 2), int), {}, {"names": names})
    return tmp_path / "features"


def test_probes_and_runs_share_one_table(runs, scored, features, tmp_path, capsys):
    labels = ["--label-pattern", "^(.)/", "--case-pattern", "/([0-9]+)_"]
    one = ["evaluate", "--features", str(features), "--runs", str(runs), "--out", str(tmp_path / "out")]
    assert main([*one, *labels, "--probe", "knn", "--folds", "2", "--positive", "b"]) == 0
    results = read_json(tmp_path / "out" / "results.json")
    assert set(results["probes"]) == {"knn", "fine-tuned"} and results["tiles"] == 30 and results["runs"] == scored["runs"]
    assert results["probes"]["fine-tuned"]["accuracy"]["value"] == scored["probes"]["fine-tuned"]["accuracy"]["value"]
    assert "fine-tuned" in capsys.readouterr().out and "pool cls and fine-tuned networks" in (tmp_path / "out" / "results.md").read_text()
    assert {picture["file"] for picture in results["pictures"]} == {"roc.png", "confusion.png", "features_map.png"}
    assert (tmp_path / "out" / "predictions.csv").is_file() and (tmp_path / "out" / "predictions_knn.csv").is_file()

    # Other cases, other classes, or tiles that were not embedded.
    assert main([*one, *labels[:2], "--probe", "knn"]) == 1
    assert "is of case '0' and label 'a' in the runs of 'fine-tuned', and has case 'a/0_0'" in capsys.readouterr().err
    assert main([*one, "--label-pattern", "_([01])$", *labels[2:], "--probe", "knn"]) == 1
    assert "the runs know the classes a, b, the features have 0, 1" in capsys.readouterr().err
    assert main([*one, *labels, "--max-per-class", "5", "--probe", "knn"]) == 1
    assert "and is not among the labelled features; one table needs the same tiles" in capsys.readouterr().err


def test_the_report_shows_the_positive_class_and_the_terms(runs, scored, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs / "fold=0" / "seed0", run)
    shutil.copytree(runs / "evaluation", run / "evaluation")
    page = write_report(run, tmp_path / "report.html").read_text()
    assert "<th>arm</th>" in page and "<th>sensitivity</th>" in page and "<th>binary_auc</th>" in page
    assert "; fine-tuned networks; " in page and "Positive class: b" in page and "features: " not in page
    assert "fine-tuned networks; 95 %" in (runs / "evaluation" / "results.md").read_text().replace(", positive class b", "")
    assert page.count("<img") == 6, "loss, accuracy, learning rate, images per second, ROC, confusion"


def test_an_unknown_positive_class_is_refused(runs, tmp_path):
    with pytest.raises(DatasetError, match="--positive tumour is not one of the classes a, b"):
        cross_validated([runs], tmp_path / "out", positive="tumour")


def test_a_run_that_goes_on_from_the_middle_ends_the_same(tiles, runs, tmp_path, capsys):
    whole = runs / "fold=0" / "seed0"
    shutil.copytree(whole, tmp_path / "run")
    largest = max((tmp_path / "run" / "checkpoints" / "4").rglob("d/*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    result = train(fold_config(tiles, 0, 0), tmp_path / "run")
    assert result.fresh and "going back to step 2" in capsys.readouterr().err
    jax.tree.map(np.testing.assert_array_equal, restore_run(whole)[2], restore_run(tmp_path / "run")[2])
