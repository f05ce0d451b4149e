"""Options: good and bad values of each, the TOML file, and which layer of values wins."""

import dataclasses
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adq.quant.batches import seeded
from adq.quant.errors import InputError
from adq.quant.files import write_json
from adq.quant.qat import TrainingConfig
from adq.quant.scheme import Scheme
from adq.quant.spec import BitVector
from adq.search.config import (
    OPTIONS,
    PROXIES,
    LayerBits,
    StudyConfig,
    layer_bits,
    make_config,
    option_name,
    read_toml,
    tie_groups,
)

TEXT = ["latency", "task", "model", "weights", "device", "study", "storage", "out"]
TEXT += ["address", "checkpoints"]
WHOLE_FROM = {
    "first_last_bits": 0,
    "trials": 1,
    "reduction": 2,
    "epochs": 0,
    "final_epochs": 0,
    "fp32_epochs": 0,
    "seed": 0,
    "group_size": 2,
    "latency_batch": 1,
    "workers": 1,
    "cpus_per_trial": 1,
    "ranks": 1,
    "window": 1,
}
WORDS = {
    "optimizer": ["adamw", "sgd"],
    "amp": ["auto", "off", "bf16", "fp16"],
    "batchnorm": ["reestimate", "keep"],
    "executor": ["auto", "local", "ray"],
    "gradient_checkpoints": ["off", "on"],
    "sampler": ["adq", "tpe", "nsga2", "nsga3", "gp", "random"],
    "warm_start": ["off", "on"],
    "weight_quantizer": ["adq", "lsq", "n2uq", "apot", "minmax"],
    "act_quantizer": ["n2uq", "lsq", "pact", "minmax"],
    "codebook_start": ["quantile-lloyd", "quantile", "midpoint", "uniform"],
}
NUMBER = [
    "budget_bits",
    "budget_size_mb",
    "budget_gbops",
    "budget_latency_ms",
    "lr",
    "dampening",
    "freeze_above",
    "gpus_per_trial",
]
LISTS = ["bits", "act_bits"]
OPTIONAL = ["model", "weights", "budget_bits", "budget_size_mb", "budget_gbops"]
OPTIONAL += ["fp32_epochs", "study", "storage", "group_size", "start_bits"]
OPTIONAL += ["layers", "rungs", "time_budget"]
OPTIONAL += ["dampening", "freeze_above", "budget_latency_ms", "latency", "latency_batch"]
OPTIONAL += ["workers", "gpus_per_trial", "cpus_per_trial", "ranks", "window"]
OPTIONAL += ["address", "checkpoints", "weights_average"]


def refused(field: str, value: Any) -> str:
    """The error of a bad value, which must open with the option's name and end with the value."""
    with pytest.raises(InputError) as error:
        StudyConfig(**{field: value})
    text = str(error.value)
    assert text.startswith(f"{field.replace('_', '-')}: expected "), text
    assert text.endswith(f"got {value!r}"), text
    assert "\n" not in text
    return text


def test_every_option_is_in_one_of_the_lists_above() -> None:
    assert sorted(
        [
            *TEXT,
            *WHOLE_FROM,
            *WORDS,
            *NUMBER,
            *LISTS,
            "distillation",
            "weights_average",
            "start_bits",
            "proxies",
            "ties",
            "layers",
            "rungs",
            "time_budget",
        ]
    ) == sorted(OPTIONS)
    assert all(f.metadata["help"] for f in OPTIONS.values())


def test_the_defaults_are_valid_and_need_no_budget_yet() -> None:
    config = StudyConfig()
    assert config.task == "digits"
    with pytest.raises(InputError, match="no budget"):
        config.budget  # noqa: B018 (a property that checks)
    limits = StudyConfig(budget_bits=3, budget_size_mb=2.0, budget_gbops=1.0).budget.limits()
    assert limits == {"average_bits": 3.0, "size_bytes": 2e6, "bops": 1e9}


@pytest.mark.parametrize("field", TEXT)
def test_texts(field: str) -> None:
    assert getattr(StudyConfig(**{field: "some text"}), field) == "some text"
    for bad in (3, True, ["a"], 1.5):
        assert "a text" in refused(field, bad)


@pytest.mark.parametrize(("field", "low"), WHOLE_FROM.items())
def test_whole_numbers(field: str, low: int) -> None:
    assert getattr(StudyConfig(**{field: low}), field) == low
    good = 8 if field == "first_last_bits" else 10**6
    assert getattr(StudyConfig(**{field: good}), field) == good
    for bad in (low - 1, -5, 2.0, 2.5, "3", True, False, [2], math.nan):
        assert f"a whole number of at least {low}" in refused(field, bad)


def test_a_seed_is_one_that_every_generator_takes() -> None:
    assert StudyConfig(seed=2**32 - 1).seed == 2**32 - 1
    with seeded(StudyConfig(seed=2**32 - 1).seed * 10_007 + 10**6):  # as in the last epochs
        pass
    assert "less than 2^32" in refused("seed", 2**32)


@pytest.mark.parametrize(("field", "allowed"), WORDS.items())
def test_words_of_a_list(field: str, allowed: list[str]) -> None:
    for word in allowed:
        assert word in OPTIONS[field].metadata["help"]
        assert getattr(StudyConfig(**{field: word}), field) == word
    with pytest.raises(InputError, match=f"expected .*{allowed[0]}.*, got 'other'"):
        StudyConfig(**{field: "other"})
    refused(field, 3)


def test_words_become_the_scheme_and_the_training() -> None:
    config = StudyConfig(
        weight_quantizer="lsq",
        act_quantizer="pact",
        codebook_start="uniform",
        group_size=16,
        optimizer="sgd",
        distillation=0.25,
        lr=0.1,
    )
    assert config.scheme == Scheme("lsq", "pact", "uniform", group_size=16)
    assert config.training(3, "cpu") == TrainingConfig(3, 0.1, optimizer="sgd", distillation=0.25)
    assert config.training(3, "cuda").amp == "bf16"
    chosen = StudyConfig(amp="fp16", dampening=0.1, freeze_above=0.02).training(1, "cuda")
    assert chosen == TrainingConfig(
        1, amp="fp16", codebook_decay=None, dampening=0.1, freeze_above=0.02
    )


def test_a_share_is_from_0_to_1() -> None:
    for good in (0, 0.5, 1):
        assert StudyConfig(distillation=good).distillation == good
        assert StudyConfig(weights_average=good).training(1, "cpu").weights_average == good
    for bad in (-0.1, 1.1, math.nan, "1", True):
        assert "a number from 0 to 1" in refused("distillation", bad)
        assert "a number from 0 to 1" in refused("weights_average", bad)


@pytest.mark.parametrize("field", NUMBER)
def test_numbers(field: str) -> None:
    for good in (1, 2.5, 1e-9):
        value = getattr(StudyConfig(**{field: good}), field)
        assert value == good
        assert type(value) is float
    for bad in (0, 0.0, -1, math.nan, math.inf, -math.inf, True, "3", [1.0]):
        assert "a positive number" in refused(field, bad)


@pytest.mark.parametrize("field", LISTS)
def test_bit_lists(field: str) -> None:
    for good in ("2,3,8", " 2, 3 ,8 ", [2, 3, 8], (2, 3, 8)):
        assert getattr(StudyConfig(**{field: good}), field) == (2, 3, 8)
    for good in (4, "4", [4]):
        assert getattr(StudyConfig(**{field: good}), field) == (4,)
    bad_lists = ["", ",", "2,,3", "2,3,", "2;3", "2,x", "2.5", "-2", [], (), [2, 2], "3,2,3"]
    for bad in (*bad_lists, [1], [9], 1, 9, 16, [2, 3.0], [True], True, 4.0, ["2"], {2: 3}, [[2]]):
        assert "different whole numbers from 2 to 8" in refused(field, bad)


def test_zero_bits_mean_fp32_for_inputs_only() -> None:
    assert StudyConfig(act_bits="8,0").act_bits == (8, 0)
    assert StudyConfig(act_bits=0).act_bits == (0,)
    assert "(or 0 for FP32)" in refused("act_bits", [0, 1])
    assert "FP32" not in refused("bits", [0, 2])


def test_the_pin_is_zero_or_a_bit_width() -> None:
    for good in (0, 2, 5, 8):
        assert StudyConfig(first_last_bits=good).first_last_bits == good
    for bad in (1, 9, 32):
        assert "0 or 2 to 8" in refused("first_last_bits", bad)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("auto", "auto"),
        ("none", "none"),
        ([], "none"),
        ("a.conv=a.shortcut", "a.conv=a.shortcut"),
        (" a = b , c=d =e ", "a=b,c=d=e"),
        ([["a", "b"], ["c", "d", "e"]], "a=b,c=d=e"),
        ((("a", "b"),), "a=b"),
    ],
)
def test_ties_are_a_word_or_groups_in_either_form(value: Any, text: str) -> None:
    assert StudyConfig(ties=value).ties == text
    assert StudyConfig(ties=text).ties == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("conv1=8", "conv1=8"),
        (" conv1 = 8 ,layer4.*=3+2, fc=4+8/8", "conv1=8,layer4.*=2+3,fc=4+8/8"),
        ("fc=/8+0", "fc=/0+8"),
        ({"conv1": 8, "layer4.*": [3, 2]}, "conv1=8,layer4.*=2+3"),
        ({"fc": {"bits": [4, 8], "act-bits": 8}}, "fc=4+8/8"),
        ({"fc": {"act-bits": [0, 8]}, "a": {"bits": 2}}, "fc=/0+8,a=2"),
    ],
)
def test_layers_are_given_bits_in_either_form(value: Any, text: str) -> None:
    assert StudyConfig(layers=value).layers == text
    assert StudyConfig(layers=text).layers == text


def test_a_file_of_bits_pins_all_of_its_layers(tmp_path: Path) -> None:
    path = tmp_path / "best.bits.json"
    bits = BitVector({"conv1": 8, "layer1.0.conv1": 2, "fc": 3}, {"conv1": 8, "fc": 4})
    write_json(path, bits.to_json())
    config = StudyConfig(layers=str(path))
    assert config.layers == "conv1=8/8,layer1.0.conv1=2/0,fc=3/4"
    path.unlink()  # it is needed no more
    assert StudyConfig(layers=config.layers).layers == config.layers
    with pytest.raises(InputError, match=r"best\.bits\.json: not a readable bit-vector file"):
        StudyConfig(layers=str(path))


def test_layers_become_weight_and_input_bits_of_patterns() -> None:
    assert layer_bits("a.*=2+3,b=/0+8,c=4/8") == [
        LayerBits("a.*", (2, 3), None),
        LayerBits("b", None, (0, 8)),
        LayerBits("c", (4,), (8,)),
    ]
    assert StudyConfig().layers is StudyConfig(layers={}).layers is None


@pytest.mark.parametrize(
    "bad",
    [
        *[
            "",
            "a",
            "a=",
            "=2",
            "a=/",
            "a=2/",
            "a=1",
            "a=9",
            "a=0",
            "a=2+2",
            "a=2,a=3",
            "a=x",
            "a=2,",
        ],
        *[3, True, [2], ["a=2"], {"a": "2"}, {"a": True}, {"a": []}, {"a": 9}, {"a": {}}],
        *[{"layer1": {"0": 3}}, {"a": {"bits": 2, "acts": 8}}, {"a,b": 2}, {"a=b": 2}, {"": 2}],
    ],
)
def test_layers_of_another_form_are_refused(bad: Any) -> None:
    assert "each layer or pattern once with bits" in refused("layers", bad)


def test_ties_become_groups_of_names() -> None:
    assert tie_groups("a.conv=a.shortcut,c=d=e") == [["a.conv", "a.shortcut"], ["c", "d", "e"]]


def test_ties_of_another_form_are_refused() -> None:
    wanted = "expected auto, none, or groups of layers, like a.conv=a.shortcut,b=c=d, got"
    for bad in ("", "=", "a=", "a=b,", ",a=b", "a==b", 3, True, {"a": "b"}):
        assert wanted in refused("ties", bad)
    for listed in (["a", "b"], [["a", 2]], [[]], [["a", ""]], [["a", "b=c"]], [["a,b", "c"]]):
        assert wanted in refused("ties", listed)
    for alone in ("a", "b=c,a", [["b", "c"], ["a"]], "a,b=c"):
        assert "at least two layers in a group ('a' is alone)" in refused("ties", alone)
    for twice in ("a=a", "b=a,c=a", [["a", "b"], ["c", "a"]]):
        assert "each layer once ('a' is there twice)" in refused("ties", twice)


@pytest.mark.parametrize(
    ("given", "seconds"),
    [("90s", 90), ("30m", 1800), ("1.5h", 5400), ("45", 45), (45, 45), (0.5, 0.5), ("1e3s", 1000)],
)
def test_a_time_is_seconds_or_has_a_unit(given: Any, seconds: float) -> None:
    assert StudyConfig(time_budget=given).time_budget == seconds


def test_what_is_no_time_is_refused() -> None:
    for bad in ("", "m", "5x", "1h30m", "5ms", "-3m", "0s", "nan", "inf", 0, -1, True, [3], "5 d"):
        assert "a time like 90s, 30m or 1.5h" in refused("time_budget", bad)


def test_rungs_rise_up_to_the_epochs() -> None:
    assert StudyConfig(rungs="0,1", epochs=3).rungs == (0, 1)
    assert StudyConfig(rungs=[0, 2], epochs=3).rungs == (0, 2)
    assert StudyConfig(rungs=1, epochs=2).rungs == (1,)
    for bad in ("", "1,0", "1,1", "-1", "0.5", [0, "1"], True, (), "a"):
        assert "rising whole numbers of epochs, like 0,1" in refused("rungs", bad)
    for epochs in (0, 2):
        with pytest.raises(InputError, match=f"fewer epochs than --epochs {epochs}, got 2"):
            StudyConfig(rungs=(0, 2), epochs=epochs)


@pytest.mark.parametrize("name", ["", ".hidden", "..", "a/b", "/abs", "a\nb", "a\0b"])
def test_a_study_name_stays_inside_its_folder(name: str) -> None:
    assert "a plain name" in refused("study", name)


@pytest.mark.parametrize("field", sorted(OPTIONS))
def test_none_means_not_given_where_there_is_such_a_thing(field: str) -> None:
    if field in OPTIONAL:
        assert getattr(StudyConfig(**{field: None}), field) is None
    else:
        refused(field, None)


def test_a_configuration_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        StudyConfig().seed = 3  # type: ignore[misc]


texts = st.text(st.characters(blacklist_categories=("Cs",)), min_size=1)
positive = st.floats(min_value=1e-300, max_value=1e300)


def subsets(values: list[int]) -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.sampled_from(values), min_size=1, unique=True).map(tuple)


configs = st.builds(
    StudyConfig,
    task=texts,
    model=st.none() | texts,
    weights=st.none() | texts,
    budget_bits=st.none() | positive,
    budget_size_mb=st.none() | positive,
    budget_gbops=st.none() | positive,
    bits=subsets([2, 3, 4, 5, 6, 7, 8]),
    act_bits=subsets([0, 2, 3, 4, 8]),
    first_last_bits=st.sampled_from([0, 2, 8]),
    ties=st.sampled_from(["auto", "none", "a=b,c.0=d.1=e", [["a", "b"], ["c", "d"]]]),
    layers=st.sampled_from([None, "a=8,l.*=2+3/0+8,b=/4", {"a.[0-9]": [2, 4], "b": 3}]),
    trials=st.integers(1, 10**6),
    time_budget=st.none() | positive | st.sampled_from(["30m", "1.5h"]),
    epochs=st.integers(2, 10**6),
    rungs=st.sampled_from([None, "0,1", (1,)]),
    fp32_epochs=st.none() | st.integers(0, 10**6),
    lr=positive,
    seed=st.integers(0, 10**9),
    executor=st.sampled_from(["auto", "local", "ray"]),
    workers=st.none() | st.integers(1, 10**6),
    gpus_per_trial=st.none() | positive,
    ranks=st.none() | st.integers(1, 10**6),
    window=st.none() | st.integers(1, 10**6),
    address=st.none() | texts,
    checkpoints=st.none() | texts,
    study=st.none() | texts.filter(lambda t: t.isprintable() and t[0] != "." and "/" not in t),
    out=texts,
)


@given(configs)
def test_a_configuration_survives_its_file(tmp_path_factory: Any, config: StudyConfig) -> None:
    path = tmp_path_factory.getbasetemp() / "study.toml"
    path.write_bytes(config.to_toml().encode())
    assert StudyConfig(**read_toml(path)) == config


def test_the_file_has_dashes_and_leaves_out_what_was_not_given() -> None:
    data = tomllib.loads(StudyConfig(budget_size_mb=1.5, bits=(4, 2)).to_toml())
    assert data["budget-size-mb"] == 1.5
    assert data["bits"] == [4, 2]
    assert data["first-last-bits"] == 8
    assert "budget-bits" not in data
    assert not any("_" in key for key in data)
    missing = {option_name(f) for f in OPTIONS.values()} - data.keys()
    assert missing == {name.replace("_", "-") for name in OPTIONAL} - {"budget-size-mb"}


def toml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return path


def test_a_file_gives_the_fields_it_names(tmp_path: Path) -> None:
    path = toml(tmp_path, 'task = "digits"\nbudget-bits = 3\nbits = "2,4"\nact-bits = 8\n')
    assert read_toml(path) == {
        "task": "digits",
        "budget_bits": 3.0,
        "bits": (2, 4),
        "act_bits": (8,),
    }


def test_a_file_gives_bits_of_layers_as_text_or_as_a_table(tmp_path: Path) -> None:
    table = '[layers]\nconv1 = 8\n"layer4.*" = [2, 3]\n"fc" = { bits = [4, 8], act-bits = [8] }'
    for text in ('layers = "conv1=8,layer4.*=2+3,fc=4+8/8"', table):
        assert read_toml(toml(tmp_path, text)) == {"layers": "conv1=8,layer4.*=2+3,fc=4+8/8"}
    with pytest.raises(InputError, match="key 'layers': expected each layer or pattern once"):
        read_toml(toml(tmp_path, "[layers]\nlayer1.conv = 8"))  # TOML's own nesting: not quoted


def test_a_file_lists_ties_as_text_or_as_lists(tmp_path: Path) -> None:
    for text in ('ties = "a=b,c=d=e"', 'ties = [["a", "b"], ["c", "d", "e"]]'):
        assert read_toml(toml(tmp_path, text)) == {"ties": "a=b,c=d=e"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("budget-bit = 3", r"mine\.toml: unknown key 'budget-bit'; did you mean 'budget-bits'\?"),
        ("budget_bits = 3", r"unknown key 'budget_bits'; did you mean 'budget-bits'\?"),
        ("zzz = 3", r"unknown key 'zzz'; allowed: task, model, .*budget-size-mb.*, out$"),
        ("[search]\ntrials = 3", r"unknown key 'search'"),
        ("trials = 3.5", r"mine\.toml: key 'trials': expected a whole number .* got 3\.5"),
        ("trials = true", r"key 'trials': expected a whole number .* got True"),
        ("trials = '3'", r"key 'trials': expected a whole number"),
        ("budget-bits = '3'", r"key 'budget-bits': expected a positive number, got '3'"),
        ("budget-bits = nan", r"key 'budget-bits': expected a positive number, got nan"),
        ("lr = true", r"key 'lr': expected a positive number"),
        ("bits = [2, 9]", r"key 'bits': expected different whole numbers from 2 to 8"),
        ("bits = [2, 2]", r"key 'bits': expected different"),
        ("ties = [['a']]", r"key 'ties': expected at least two layers .* got \[\['a'\]\]"),
        ("ties = 'a=a'", r"key 'ties': expected each layer once .* got 'a=a'"),
        ("task = 3", r"key 'task': expected a text, got 3"),
        ("trials = ", r"mine\.toml is not valid TOML: "),
    ],
)
def test_a_bad_file_is_one_line_that_names_file_and_key(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(InputError, match=message) as error:
        read_toml(toml(tmp_path, text))
    assert "\n" not in str(error.value)
    assert str(tmp_path / "mine.toml") in str(error.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read study file .*none\.toml: No such file"):
        read_toml(tmp_path / "none.toml")
    with pytest.raises(InputError, match=r"cannot read study file .*: Is a directory"):
        read_toml(tmp_path)
    (tmp_path / "bytes.toml").write_bytes(b"task = '\xff\xfe'")
    with pytest.raises(InputError, match=r"bytes\.toml is not valid TOML"):
        read_toml(tmp_path / "bytes.toml")


def test_a_later_layer_overrides_and_none_does_not() -> None:
    config = make_config({"trials": 5, "seed": 3}, {"trials": 7, "seed": None, "out": "here"})
    assert (config.trials, config.seed, config.out) == (7, 3, "here")
    assert make_config() == StudyConfig()
    assert make_config(vars(config), {"seed": 9}) == dataclasses.replace(config, seed=9)


def test_an_unknown_option_is_named_with_what_is_allowed() -> None:
    with pytest.raises(InputError, match=r"unknown option 'trails'; allowed: task, .*trials"):
        make_config({"trails": 3})


def test_proxies_are_names_each_once() -> None:
    assert StudyConfig(proxies="fisher, kl").proxy_names == ("fisher", "kl")
    assert set(StudyConfig().proxy_names) <= set(PROXIES)
    for text, message in (
        ("fisher,hutchinson", "proxies: expected some of .*, got 'hutchinson'"),
        ("", "proxies: expected some of .*, got ''"),
        ("kl,kl", "proxies: expected each once, got 'kl,kl'"),
    ):
        with pytest.raises(InputError, match=message):
            StudyConfig(proxies=text)
