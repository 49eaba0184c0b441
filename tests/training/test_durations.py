"""Steps, epochs, examples, percent: all become whole steps, and only sensible ones."""

import pytest

from wavepath.defaults import train_defaults
from wavepath.errors import ConfigError
from wavepath.training.durations import due, parse, resolve, window


def config(batch_size=10, warmup="0", **train):
    made = train_defaults()
    made.batch_size, made.optim.warmup = batch_size, warmup
    made.train.update(train)
    return made.lock()


@pytest.mark.parametrize(("train", "steps"), [
    ({"steps": 7}, 7), ({"epochs": 3.0}, 30), ({"epochs": 0.25}, 3), ({"examples": 95}, 10), ({"examples": 90}, 9), ({"epochs": 0.3}, 3),
])
def test_the_length_in_any_unit(train, steps):
    resolved = resolve(config(**train), n_examples=100)
    assert resolved.train.steps == steps and isinstance(resolved.train.steps, int)
    assert resolved.train.epochs == 0 and resolved.train.examples == 0


@pytest.mark.parametrize(("text", "steps"), [
    ("5%", 10), ("2ep", 20), ("45ex", 5), ("12", 12), ("12steps", 12), ("0", 0), ("100 %", 200), (7, 7),
    ("0.1%", 1),
])
def test_a_warm_up_in_any_unit(text, steps):
    assert parse(text, batch_size=10, n_examples=100, total=200, name="config.optim.warmup") == steps


def test_resolving_twice_changes_nothing_and_leaves_the_argument_alone():
    given = config(epochs=2.0, warmup="10%")
    once = resolve(given, 100)
    assert (once.train.steps, once.optim.warmup, once.optim.halve_every, once.optim.hold) == (20, 2, 5, 10) and once.is_locked
    assert resolve(once, 100) == once
    assert given.train.epochs == 2.0 and given.optim.warmup == "10%"


@pytest.mark.parametrize(("hold", "steps"), [("66.7%", 14), ("1ep", 10), ("0", 0), ("500", 500)])
def test_where_a_linear_schedule_begins_to_fall(hold, steps):
    given = config(epochs=2.0).unlock()
    given.optim.hold = hold
    assert resolve(given, 100).optim.hold == steps
    given.optim.hold = "soon"
    with pytest.raises(ConfigError, match="config.optim.hold='soon' is no duration"):
        resolve(given, 100)


@pytest.mark.parametrize(("given", "message"), [
    (dict(), "exactly one.*none is given"),
    (dict(steps=3, epochs=1.0), "exactly one.*steps=3, config.train.epochs=1.0"),
    (dict(steps=-3), "no duration"),
    (dict(steps=5, warmup="six"), "config.optim.warmup='six' is no duration.*5%"),
    (dict(steps=5, warmup="120%"), "more than the whole run"),
    (dict(steps=5, warmup="6"), "6 steps, more than the run's 5"),
    (dict(steps=5, warmup="-1"), "no duration"),
    (dict(steps=5, log_every=0), "log_every=0 must be at least 1"),
    (dict(steps=5, batch_size=0), "batch_size=0"),
])
def test_what_makes_no_sense_is_one_clear_error(given, message):
    with pytest.raises(ConfigError, match=message):
        resolve(config(**given), 100)


def test_epochs_of_nothing():
    with pytest.raises(ConfigError, match="source is empty"):
        resolve(config(epochs=1.0), 0)


def test_due_and_window():
    assert [step for step in range(10) if due(step, 4)] == [4, 8]
    assert not any(due(step, 0) for step in range(10))
    assert window("10:20") == (10, 20) and window("") is None
    for text in ("10", "20:10", "a:b", "5:5"):
        with pytest.raises(ConfigError, match="window of steps"):
            window(text)
