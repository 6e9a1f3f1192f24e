"""Every choice that method.md marks [ours] is a key of a config or a flag, and each of its values does something."""

import pytest

from data_pipelines.prepare import builder
from dexportrait_jax import choices, cli
from dexportrait_jax import config as configs
from dexportrait_jax.animate_jobs import checked_job
from dexportrait_jax.errors import UserError
from dexportrait_jax.jobs import JOBS
from dexportrait_jax.tasks import animator_start, make_task
from tests import fixtures, traces
from tests.choices_of_the_method import (
    FLAGS,
    IMAGE,
    MOTION,
    NOT_TRIED,
    SWITCHES,
    TABLE,
    VIDEO,
    Choice,
)

NEEDED = {
    "animate": ["--weights=w", "--source=a.png", "--out=o.mp4"],
    "prepare": ["--videos=*.mp4", "--out=o"],
}


WORDS = {MOTION: choices.MOTION, IMAGE: choices.ANIMATOR, VIDEO: choices.ANIMATOR}
OPTIMIZERS = {"name": ("adam", "adamw", "muon"), "decay": ("constant", "cosine")}


def named(choice):
    return f"{choice.section}-{choice.stage}-{choice.key}"


def plain(value):
    """A config's lists are tuples, or become lists in it."""
    return tuple(value) if isinstance(value, list) else value


def value_of(config, key):
    for part in key.split("."):
        config = config[part]
    return config


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Trace of a dataset of two cameras, and of one whose windows all move differently."""
    root = tmp_path_factory.mktemp("choices")
    drawn = fixtures.make_dataset(root / "drawn", 2, 12, 48, validation_clips=0, cameras=2)
    clips = [fixtures.flickering(number, 12, 32) for number in range(4)]
    restless = builder.write_dataset({"train": lambda: clips}, root / "restless")
    return {"drawn": traces.examples(drawn), "restless": traces.examples(restless, "video")}


@pytest.fixture(scope="module")
def seen(places):
    """What is seen of overrides, once for each set of them."""
    known = {}

    def look(choice, overrides):
        where = (choice.seen, choice.stage, overrides)
        if where not in known:
            function = places.get(choice.seen, choice.seen)
            known[where] = function(choice.stage, list(overrides))
        return known[where]

    return look


@pytest.mark.parametrize("choice", TABLE, ids=named)
def test_key_is_there_with_its_default(choice):
    config = configs.load_config(f"configs/{choice.stage}.py:full", list(choice.given))
    assert plain(value_of(config, choice.key)) == plain(choice.default)


@pytest.mark.parametrize("choice", TABLE, ids=named)
def test_every_other_value_does_something(choice, seen):
    # Lists of widths are those of `full`, beside which the others are of the small networks traced here.
    sizes = isinstance(choice.default, tuple)
    before = seen(
        choice, choice.given if sizes else (*choice.given, choice.override(choice.default))
    )
    for value in choice.others:
        assert traces.differs(seen(choice, (*choice.given, choice.override(value))), before), value


@pytest.mark.parametrize(
    "choice",
    {(choice.seen, choice.stage): choice for choice in TABLE}.values(),
    ids=named,
)
def test_the_same_twice_is_no_difference(choice, places):
    """Or the test above would pass whatever a key does."""
    function = places.get(choice.seen, choice.seen)
    first, second = (function(choice.stage, list(choice.given)) for _ in range(2))
    assert not traces.differs(first, second)


def test_every_word_is_tried():
    tried = {}
    for choice in TABLE:
        values = map(plain, (choice.default, *choice.others))
        tried.setdefault((choice.stage, choice.key), set()).update(values)
    for (stage, key), values in tried.items():
        known = set(WORDS[stage].get(key, values))
        assert values <= known and known - values == NOT_TRIED.get(key, set()), key


def wrong_values():
    """One choice a key, with a word or a number that is none of its values."""
    keys = {(choice.stage, choice.key): choice for choice in TABLE}
    asked = [c for c in keys.values() if c.default is not None or c.key in WORDS[c.stage]]
    numbers = [c for c in asked if c.key in WORDS[c.stage] and isinstance(c.default, int)]
    return [
        *((choice, "nonsense") for choice in asked),
        *((choice, "7") for choice in numbers),
        (keys[MOTION, "data.augment.component_mask.parts"], "('nonsense',)"),
    ]


@pytest.mark.parametrize(
    ("choice", "wrong"),
    wrong_values(),
    ids=lambda value: named(value) if isinstance(value, Choice) else value,
)
def test_a_wrong_value_is_one_line(choice, wrong, places):
    """It names the key and the words that there are; where a number is wanted, it says that."""
    override = choice.override(wrong)
    with pytest.raises(UserError) as caught:
        config = configs.load_config(f"configs/{choice.stage}.py:tiny", [*choice.given, override])
        if choice.key.startswith("optim."):
            traces.optimizer(choice.stage, [override])
        elif choice.key.endswith(".parts"):
            places[choice.seen](choice.stage, [override])
        make_task(config)
    said = str(caught.value)
    last = choice.key.rsplit(".", 1)[-1]
    assert "\n" not in said and last in said and wrong.strip("(',)") in said
    words = WORDS[choice.stage].get(choice.key) or OPTIMIZERS.get(last, ())
    if isinstance(choice.default, int | float) and wrong == "nonsense":
        words = [type(choice.default).__name__]
    elif choice.key.endswith(".parts") and wrong != "nonsense":
        words = choice.default
    assert all(str(word) in said for word in words if word is not None)


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: f"{flag[0]}-{flag[2]}")
def test_flags(flag, capsys):
    _, job, name, values, wrong = flag
    numbers = ("1",)
    for value in values or numbers:
        cli._parse(job, JOBS[job], [*NEEDED[job], f"--{name}={value}"])
    with pytest.raises(SystemExit):
        cli._parse(job, JOBS[job], [*NEEDED[job], f"--{name}={wrong}"])
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and wrong in said[0] and all(value in said[0] for value in values or ())
    if job == "animate":
        with pytest.raises(UserError, match=wrong) as caught:
            checked_job({"source": "a.png", "out": "o.mp4", name: wrong})
        assert all(value in str(caught.value) for value in values or ())


def test_switches_and_components_of_the_pose():
    for job, name in SWITCHES:
        flags, _ = cli._parse(job, JOBS[job], [*NEEDED[job], f"--{name}"])
        assert flags[name] is True
    driven = {"source": "a.png", "out": "o.mp4", "pose": "b.mp4"}
    with pytest.raises(UserError, match="there are rotation, translation, scale"):
        checked_job({**driven, "relative_pose": "roll"})


def test_weights_remember_every_choice_of_the_unets():
    """What no shape tells is compared when weights are taken over (animator_start.py)."""
    model = configs.load_config("configs/animator_video.py:full").model
    for group in ("denoiser", "reference", "temporal"):
        held = {knob for knob in animator_start._MODEL[group] if knob.startswith(f"{group}.")}
        assert held == {f"{group}.{knob}" for knob in model[group]}
