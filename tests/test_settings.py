"""Every knob is declared once: flags, checks, presets and stored settings follow from the table."""

import argparse

import numpy as np
import pytest

from unetseg import settings
from unetseg.settings import INHERITED, KNOBS, PRESETS, Settings, SettingsError, check, choices_of, complete


@pytest.mark.parametrize("setting, expected", [
    ({"epochs": 2.5}, "epochs: expected a whole number from 1 to 100000; found 2.5"),
    ({"epochs": "10"}, "epochs: expected a whole number from 1 to 100000; found '10'"),
    ({"seed": True}, "seed: expected a whole number"), ({"batch_size": None}, "batch_size: expected a whole number"),
    ({"lr": float("nan")}, "lr: expected a number from 1e-12 to 100; found nan"),
    ({"occlusion": 1.5}, "occlusion: expected a number from 0 to 1; found 1.5"),
    ({"num_processes": 10**6}, "num_processes: expected a whole number from 1 to 64"),
    ({"deterministic": "no"}, "deterministic: expected True or False, without quotes; found 'no'"),
    ({"aim_at": "person"}, "aim_at: expected a list of names, such as ['person']; found 'person'"),
    ({"augment": ("rain",)}, "augment: expected a list of names, such as ['basic', 'occlude']"),
    ({"loss": "focal"}, "loss: expected one of ce, ce_dice, dice; found 'focal'"),
    ({"stage": "tuning"}, "stage: expected one of scratch, weighted_ce, ce_dice, published; found 'tuning'"),
    ({"data": 3}, "data: expected a text; found 3"),
])  # fmt: skip
def test_an_invalid_setting_says_what_to_write(setting, expected):
    with pytest.raises(SettingsError) as error:
        check(Settings(**setting))
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_the_defaults_and_every_name_in_a_registry_are_valid():
    check(Settings())
    for name in KNOBS:
        for choice in choices_of(name):
            check(Settings(**{name: (choice,) if name == "augment" else choice}))


@pytest.mark.parametrize("stage", PRESETS)
def test_a_preset_fills_what_is_not_given_and_nothing_else(stage):
    filled = settings.with_preset(Settings(stage, init="x"))
    assert {name: getattr(filled, name) for name in PRESETS[stage]} == PRESETS[stage]
    asked = settings.with_preset(Settings(stage, init="x", loss="dice", occlusion=0.25, epochs=7))
    assert (asked.loss, asked.occlusion, asked.epochs, asked.lr) == ("dice", 0.25, 7, PRESETS[stage]["lr"])


def test_a_fine_tuning_needs_weights_to_start_from():
    with pytest.raises(SettingsError, match="is a fine-tuning: name the run or weights"):
        settings.with_preset(Settings("ce_dice"))


def test_every_setting_has_a_flag_of_its_type():
    parser = argparse.ArgumentParser()
    settings.add_flags(parser)
    given = ["scratch", "--data=d", "--out=o", "--epochs=3", "--lr=1e-3", "--compile", "--aim-at", "person", "rider"]
    args = vars(parser.parse_args(given))
    assert args.keys() == KNOBS.keys()
    found = {name: value for name, value in args.items() if value is not None}
    assert found.pop("aim_at") == ["person", "rider"]
    assert found == {"stage": "scratch", "data": "d", "out": "o", "epochs": 3, "lr": 1e-3, "compile": True}
    assert check(Settings(**{name: value for name, value in args.items() if value is not None}))


def test_settings_of_another_version_get_todays_defaults():
    stored = complete({"stage": "ce_dice", "lr": 0.5, "removed_since": 1})
    assert stored["lr"] == 0.5 and stored["loss"] == "ce_dice" and stored["channels"] == INHERITED["channels"]
    assert stored.keys() == KNOBS.keys()


def test_a_function_gets_the_settings_it_names():
    assert settings.named_by(lambda logits, mask, dice_share, gamma=2: 0, vars(Settings())) == {"dice_share": 0.5}
    assert np.isclose(Settings(lr=1).lr, 1.0) and check(Settings(lr=1))  # a whole number is a number
