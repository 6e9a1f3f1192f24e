"""The plan: figures put together by hand, what is not compiled twice, and one real program for chips not here."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import threading
import time
import types

import jax
import pytest

from dexportrait_jax import (
    animator_inference,
    cli,
    compiling,
    plan,
    plan_cache,
    plan_clip,
    sharding,
)
from dexportrait_jax.chips import CHIPS
from dexportrait_jax.errors import UserError
from dexportrait_jax.inference import MotionModel, Sampling, model_kind
from dexportrait_jax.models.attention import choose_backend
from dexportrait_jax.plan_advice import advice
from dexportrait_jax.plan_report import in_words, summary
from dexportrait_jax.platforms import planned_for, target_platform
from dexportrait_jax.programs import abstract_state
from dexportrait_jax.tasks import make_task
from dexportrait_jax.train_checks import check_shares

KEYS = [
    "topology",
    "devices",
    "mesh",
    "params",
    "hbm_gib_per_device",
    "hbm_limit_gib",
    "fits",
    "model_tflops_per_step",
    "collectives",
    "bound_seconds",
    "bound_step_seconds",
    "bound_mfu",
    "recompute_overhead",
    "compile_seconds",
]


def program(**changes):
    return {
        "share": 1.0,
        "events": [],
        "fits": True,
        "model_tflops": 197.0 * 4 * 0.5,
        "executed_tflops_per_device": 98.5 * 1.1,
        "matrix_tflops_per_device": 98.5 * 1.2,
        "rematerialised_tflops": 197.0 * 4 * 0.05,
        "hbm_bytes_per_device": 819e9 * 0.3,
        "between_slices_bytes_per_device": 0.0,
        "collectives": {"all-reduce": {"count": 3, "bytes": 200e9 * 0.1}},
        "link_bytes": {"0,1": 50e9 * 0.1},
        "loops_counted_once": [],
        "kernels_not_counted": [],
        "hbm_gib_per_device": 10.0,
        "compile_seconds": 5.0,
    } | changes


def test_bounds_by_hand():
    """Four chips that multiply for half a second, a tenth more for what is done again, a tenth in further passes."""
    found = summary([program()], CHIPS["v5e"], 4)
    assert found["bound_seconds"] == pytest.approx({"compute": 0.6, "memory": 0.3, "network": 0.1})
    assert found["bound_step_seconds"] == pytest.approx(0.6)
    assert found["bound_mfu"] == pytest.approx(0.5 / 0.6)
    assert found["executed_overhead"] == pytest.approx(1.1)
    assert found["recompute_overhead"] == pytest.approx(1.1)


def test_memory_does_not_bound_a_quick_plan():
    """At that effort the program moves more than the one that is trained with; the figure is told all the same."""
    slow = program(hbm_bytes_per_device=819e9 * 0.9)
    assert summary([slow], CHIPS["v5e"], 4)["bound_step_seconds"] == pytest.approx(0.9)
    quick = summary([slow], CHIPS["v5e"], 4, "quick")
    assert quick["bound_step_seconds"] == pytest.approx(0.6)
    assert quick["bound_seconds"]["memory"] == pytest.approx(0.9)
    said = in_words(quick | {"programs": [], "effort": "quick"} | NAMES)
    assert "memory 900 ms, network 100 ms: compute bounds it" in said
    assert "does not count here" in said


def test_samples_between_steps_that_do_not_fit():
    """What helps the steps does not help them, and training itself would go."""
    samples = LACKING | {"events": ["evaluation"], "share": 0.0}
    found = summary([program(), samples], CHIPS["v5e"], 4) | NAMES
    said = in_words(found | {"advice": ["--config.remat=blocks"], "programs": [program(), samples]})
    assert "steps fit, but not the samples between them: needs 19.40 of 15.75 GiB; try" in said
    assert "--config.evaluate.every_steps=0" in said and "remat" not in said


@pytest.mark.parametrize(
    ("share", "words"),
    [(0.24, "alone (24% of the weights); 2 devices"), (0.0, "shares nothing of this stage: 2")],
)
def test_what_tensor_shares_is_told(share, words):
    names = NAMES | {"mesh": {"data": 1, "fsdp": 2, "context": 1, "tensor": 2}}
    found = summary([program()], CHIPS["v5e"], 4) | {"programs": [], "effort": "exact"} | names
    assert words in in_words(found | {"tensor_cuts": share})


def test_programs_count_by_their_share():
    rare = program(
        share=0.25,
        model_tflops=197.0 * 4,
        executed_tflops_per_device=197.0,
        matrix_tflops_per_device=197.0,
        hbm_gib_per_device=15.0,
        between_slices_bytes_per_device=25e9 / 8 * 2,
    )
    found = summary([program(share=0.75), rare], CHIPS["v5e"], 4)
    assert found["hbm_gib_per_device"] == 15.0 and found["compile_seconds"] == 10.0
    assert found["model_tflops_per_step"] == pytest.approx(197.0 * 4 * (0.75 * 0.5 + 0.25))
    assert found["bound_seconds"]["network"] == pytest.approx(0.75 * 0.1 + 0.25 * 2)
    # Twice is done a tenth of the usual one's half, and the same of the rare one's whole: 0.05 of 0.625.
    assert found["recompute_overhead"] == pytest.approx(1.08)
    assert found["executed_overhead"] == pytest.approx((0.75 * 0.55 + 0.25) / 0.625)
    # The rare one waits for the network between slices.
    assert found["bound_step_seconds"] == pytest.approx(0.75 * 0.6 + 0.25 * 2)


def test_collectives_are_those_of_the_mean_step():
    """Every sixteenth step sends ten times as much, and to other slices too."""
    rare = program(
        share=1 / 16,
        collectives={
            "all-reduce": {"count": 30, "bytes": 200e9},
            "all-to-all": {"count": 4, "bytes": 1600},
        },
        link_bytes={"0,1": 50e9},
        between_slices_bytes_per_device=3200.0,
    )
    between = program(share=0.0, collectives={"all-gather": {"count": 1, "bytes": 8}})
    found = summary([program(share=15 / 16), rare, between], CHIPS["v5e"], 4)
    assert found["collectives"] == {
        "all-reduce": {"count": round(3 * 15 / 16 + 30 / 16, 2), "bytes": 31.25e9},
        "all-to-all": {"count": 0.25, "bytes": 100},
    }
    assert found["between_slices_bytes"] == 200
    said = in_words(found | {"programs": [], "effort": "quick"} | NAMES)
    assert "between slices" in said and "0.25 a step" in said


# What a plan says of config and mesh, made up.
NAMES = {
    "job": "train",
    "topology": "v5e:2x2",
    "devices": 4,
    "mesh": {"data": 1, "fsdp": 4, "context": 1, "tensor": 1},
    "batch": {"sources": 4, "targets": 2, "accumulate": 1},
    "tensor_cuts": 0.0,
    "params": {"a": 10**6},
    "hbm_limit_gib": 15.75,
}
LACKING = {
    "events": [],
    "share": 1.0,
    "fits": False,
    "hbm_gib_per_device": 19.4,
    "model_tflops": 1.0,
    "compile_seconds": 5.0,
}


def test_what_does_not_fit_is_an_answer():
    advised = ["--config.remat=blocks", "--config.accumulate=2"]
    found = summary([LACKING], CHIPS["v5e"], 4) | NAMES | {"advice": advised, "programs": [LACKING]}
    assert found["fits"] is False and set(KEYS) <= set(found)
    assert found["bound_seconds"] is found["collectives"] is found["bound_mfu"] is None
    assert "needs 19.40 of 15.75 GiB; try --config.remat=blocks or --config.accumulate=2" in (
        in_words(found)
    )
    assert "try more chips" in in_words(found | {"advice": []})


def test_too_much_by_nobody_says_how_much():
    """One program of two of which XLA says only that memory ran out, in words that are not known here."""
    unknown = LACKING | {"hbm_gib_per_device": None, "share": 0.5}
    found = (
        summary([program(share=0.5), unknown], CHIPS["v5e"], 4)
        | NAMES
        | {"advice": [], "programs": [unknown]}
    )
    assert found["hbm_gib_per_device"] is None and not found["fits"]
    assert "does not fit: needs more than 15.75 GiB;" in in_words(found)
    json.dumps(found)


def test_memory_that_ran_out_in_other_words():
    found = compiling.compiled(
        lambda: Lowered("RESOURCE_EXHAUSTED: no more, in some other words"), "name", "quick"
    )
    assert found["fits"] is False and found["hbm_gib_per_device"] is None
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        compiling.compiled(lambda: Lowered("INTERNAL: something else"), "name", "quick")


class Lowered:
    """A program that does not compile."""

    def __init__(self, message, text="module @step"):
        self.message, self.text, self.compiled = message, text, 0

    def as_text(self):
        return self.text

    def compile(self):
        self.compiled += 1
        raise jax.errors.JaxRuntimeError(self.message)


def test_a_program_is_compiled_once(tmp_path, monkeypatch, capsys):
    """Kept by its text, where it runs, and how: a plan that was broken off goes on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    mesh = jax.sharding.Mesh(jax.devices()[:2], "x")
    turned = jax.sharding.Mesh(jax.devices()[1::-1], "x")
    lowered = Lowered("RESOURCE_EXHAUSTED: Used 19.40G of 15.75G hbm")

    def ask(lowered=lowered, effort="quick", mesh=mesh, again=False):
        found = compiling.compiled(lambda: lowered, "name", effort, mesh, again)
        assert found["hbm_gib_per_device"] == 19.4 and found["compile_seconds"] >= 0
        return lowered.compiled

    assert [ask(), ask(), ask()] == [1, 1, 1]
    assert capsys.readouterr().out.count("name: compiled before") == 2
    assert ask(again=True) == 2 and ask(effort="exact") == 3 and ask(mesh=turned) == 4
    assert ask(Lowered(lowered.message, "module @other_step")) == 1
    monkeypatch.setattr(compiling, "TPU_OPTIONS", {})
    assert ask() == 5


class Compiles(Lowered):
    """A program of one copy, of 1 GiB."""

    def compile(self):
        self.compiled += 1
        memory = dict.fromkeys(compiling._MEMORY, 0) | {"argument_size": 2**30}
        named = types.SimpleNamespace(**{f"{name}_in_bytes": size for name, size in memory.items()})
        line = "%y = f32[256]{0} copy(%x)"
        text = "ENTRY %main () -> f32[] {\n  %x = f32[256]{0} parameter(0)\n  " + line + "\n}\n"
        return types.SimpleNamespace(memory_analysis=lambda: named, as_text=lambda: text)


def test_a_better_reading_costs_no_compilation(tmp_path, monkeypatch):
    """What XLA said is kept, its text too; without the text it is asked again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    mesh, lowered = jax.sharding.Mesh(jax.devices()[:1], "x"), Compiles("")

    def ask():
        return compiling.compiled(lambda: lowered, "name", "quick", mesh)

    first = ask()
    assert first["fits"] and first["hbm_gib_per_device"] == 1.0
    assert first["hbm_bytes_per_device"] == 2 * 1024 and ask() == first
    reading = compiling.read_program
    monkeypatch.setattr(
        compiling, "read_program", lambda *a: dataclasses.replace(reading(*a), flops=5e12)
    )
    assert ask() == first | {"executed_tflops_per_device": 5.0} and lowered.compiled == 1
    (text,) = tmp_path.glob("dexportrait/programs/*.hlo.gz")
    text.write_bytes(text.read_bytes()[:-9])
    assert ask()["fits"] and lowered.compiled == 2


class Slow(Compiles):
    """Compiles until `meeting` of such programs are at it, or for a quarter of a second."""

    def __init__(self, text, meeting):
        super().__init__("", text)
        self.meeting, self.beside = meeting, None

    def compile(self):
        try:
            self.meeting.wait(0.25)
            self.beside = True
        except threading.BrokenBarrierError:
            self.beside = False
        return super().compile()


@pytest.mark.parametrize(("room", "beside"), [(2.9, True), (2.7, False)])
def test_two_programs_are_compiled_at_a_time_where_there_is_memory(monkeypatch, room, beside):
    """A megabyte of text takes 1.4 GiB."""
    monkeypatch.setattr(compiling, "_available_gib", lambda: room)
    meeting = threading.Barrier(2)
    programs = [Slow(text * 10**6, meeting) for text in "ab"]
    with compiling.Compiler("quick") as compiler:
        answers = [compiler.ask(lambda one=one: one, "name") for one in programs]
    assert [one.beside for one in programs] == [beside] * 2
    assert all(answer.result()["fits"] for answer in answers)
    # What needs more than there is has all that there is.
    with compiling.Compiler("quick") as compiler:
        assert compiler.ask(lambda: Compiles("", "a" * 10**7), "name").result()["fits"]


def test_one_program_that_cannot_be_compiled_ends_the_plan(monkeypatch):
    monkeypatch.setattr(compiling, "_available_gib", lambda: 1e3)
    with compiling.Compiler("quick") as compiler:
        broken = compiler.ask(lambda: Lowered("INTERNAL: something else"), "name")
        whole = compiler.ask(lambda: Compiles(""), "name")
    assert whole.result()["fits"]
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        broken.result()


def test_what_a_kernel_lacks_is_no_plan():
    """No mesh and no batch gives a core more memory of its own."""
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 21.50M of 16.00M vmem"
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):
        compiling.compiled(lambda: Lowered(message), "name", "quick")


def test_while_it_compiles_it_says_so(capsys):
    with compiling._told("motion.py:full on v5e:16x16: r1", every=0.02):
        time.sleep(0.3)
    first, *others = capsys.readouterr().out.splitlines()
    assert first == "motion.py:full on v5e:16x16: r1: compiling"
    assert others and all(
        re.fullmatch(r"motion.py:full on v5e:16x16: r1: compiling, \d+ s", line) for line in others
    )


@pytest.mark.parametrize(
    ("address", "overrides", "advised"),
    [
        # 12 sources by fsdp 4 and context 4, three parts: nothing can be cut further but what is kept.
        ("animator_image.py:full@v5e:4x4", [], ["--config.remat=blocks"]),
        (
            "animator_image.py:full",
            ["mesh.data=2", "mesh.fsdp=2", "data.batch_size=12"],
            [
                "--config.remat=products",
                "--config.remat=blocks",
                "--config.mesh.data=1 --config.mesh.fsdp=4",
                "--config.mesh.data=1 --config.mesh.context=2 --config.accumulate=6",
                "--config.mesh.fsdp=1 --config.mesh.context=2 --config.accumulate=6",
            ],
        ),
        (
            "autoencoder.py:full",
            ["mesh.data=1", "mesh.fsdp=16"],
            [
                "--config.accumulate=2",
                "--config.mesh.fsdp=8 --config.mesh.context=2 --config.accumulate=4",
            ],
        ),
        (
            "autoencoder.py:tiny",
            ["mesh.data=2", "data.targets=1"],
            ["--config.mesh.data=1 --config.mesh.fsdp=2"],
        ),
    ],
)
def test_advice_names_only_what_can_be_done(address, overrides, advised):
    config = plan.configs.load_config(f"configs/{address}", overrides)
    found = advice(config, dict(config.mesh))
    assert found == advised
    for flags in found:
        changes = [flag.removeprefix("--config.") for flag in flags.split()]
        config = plan.configs.load_config(f"configs/{address}", overrides + changes)
        sizes = {axis: config.mesh[axis] for axis in sharding.AXES}
        check_shares(config, jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes)))


def test_advice_leaves_a_part_of_data_to_every_slice():
    config = plan.configs.load_config(
        "configs/autoencoder.py:tiny", ["mesh.data=2", "data.targets=1"]
    )
    assert advice(config, dict(config.mesh), slices=2) == []


@pytest.mark.parametrize("job", ["train", "animate"])
def test_a_mesh_that_is_left_open_is_that_of_the_topology(job, tmp_path, monkeypatch, capsys):
    """Of a batch that the chips cannot share one source each; the address to train with is said."""
    asked = []

    def made_up(config, topology, slices, effort, name, again):
        asked.append((config.data.batch_size, dict(config.mesh)))
        rest = {"programs": [], "effort": effort, "job": "train"}
        return summary([program()], CHIPS["v5e"], 4) | NAMES | rest

    monkeypatch.setitem(plan.run_plan.__globals__, "plan", made_up)
    monkeypatch.setitem(plan.run_plan.__globals__, "plan_clip", made_up)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    full = ("plan", f"--job={job}", "--config=configs/animator_image.py:full")
    assert cli.run([*full, "--topology=v5e:8x8"]) == 0
    said = capsys.readouterr().out
    if job == "animate":
        assert asked[0][1]["data"] == -1 and "instead" not in said
        return
    assert asked == [(16, {"data": 1, "fsdp": 16, "context": 4, "tensor": 1})]
    assert "--config=configs/animator_image.py:full@v5e:8x8" in said
    assert "16 sources instead of 12" in said
    assert cli.run([*full, "--topology=v5e:2x2", "--config.data.batch_size=4"]) == 0
    assert asked[1][1]["data"] == -1
    assert cli.run([*full, "--topology=v5e:2x2", "--slices=2"]) == 0
    assert asked[2] == (12, {"data": 2, "fsdp": 2, "context": 2, "tensor": 1})


def test_topologies_of_config_and_flag():
    tiny = "configs/autoencoder.py:tiny"
    assert plan._where(tiny, "v5e:2x2", None) == ("v5e:2x2", 1)
    assert plan._where(f"{tiny}@2xv5e:2x2", None, None) == ("v5e:2x2", 2)
    assert plan._where(f"{tiny}@v5e:2x2", "v5e:2x2", None) == ("v5e:2x2", 1)
    with pytest.raises(UserError, match="autoencoder.py:tiny@v5e:16x16"):
        plan._where(tiny, None, None)
    for other in (("v5e:2x4", None), (None, 2)):
        with pytest.raises(UserError, match="leave out one of them"):
            plan._where(f"{tiny}@v5e:2x2", *other)


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (1.02T) "
            "exceeds available HBM (15.75G).",
            1.02 * 1024,
        ),
        ("RESOURCE_EXHAUSTED: other words", None),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 19.40G "
            "of 15.75G hbm. Exceeded hbm capacity by 3.65G.",
            19.4,
        ),
        ("INTERNAL: something else", None),
    ],
)
def test_memory_that_ran_out(message, gib):
    assert compiling._needed_gib(message) == (None if gib is None else pytest.approx(gib))


def test_networks_are_written_for_the_chip():
    long = jax.ShapeDtypeStruct((1, 4096, 8, 40), "bfloat16")
    here = target_platform()
    assert here == "cpu" and choose_backend(long, long) == "blocked"
    with planned_for("tpu"):
        assert target_platform() == "tpu" and choose_backend(long, long) == "splash"
    assert target_platform() == "cpu"


def test_mesh_and_batch_that_do_not_fit(monkeypatch):
    """Found before anything is compiled."""
    monkeypatch.setattr(plan.chips, "topology", lambda *_: (CHIPS["v5e"], jax.devices()))
    config = plan.configs.load_config("configs/autoencoder.py:tiny", [])
    with pytest.raises(UserError, match="batch_size=2 cannot be shared"):
        plan.plan(config, "v5e:2x4", 1, "quick", "name")
    config.mesh.update(data=3)
    with pytest.raises(UserError, match="does not fit 8 devices"):
        plan.plan(config, "v5e:2x4", 1, "quick", "name")


def test_a_quick_plan_goes_without_what_hardly_happens(monkeypatch):
    """Gradient norms of every image term, in every 200th step, are a program of their own."""
    monkeypatch.setattr(plan.chips, "topology", lambda *_: (CHIPS["v5e"], jax.devices()[:4]))
    seen = []

    def made_up(task, config, mesh, events, *_):
        seen.append(sorted(events))
        return lambda: {name: value for name, value in program().items() if name != "share"}

    monkeypatch.setattr(plan, "_step", made_up)
    config = plan.configs.load_config(
        "configs/motion.py:tiny",
        [
            *("num_steps=1000", "pretraining.steps=0", "loss.adversarial_start=0"),
            *("loss.r1_every=4", "loss.gradient_norms_every=200", "evaluate.at_end=False"),
            *("data.batch_size=4", "mesh.data=4"),
        ],
    )
    often = [["adversarial", "joint"], ["adversarial", "joint", "r1"]]
    rare = ["adversarial", "gradient_norms", "joint", "r1"]
    quick = plan.plan(config, "v5e:2x2", 1, "quick", "name")
    assert seen == often and quick["left_out"] == [{"events": rare, "share": 0.005}]
    assert sum(one["share"] for one in quick["programs"]) == pytest.approx(1)
    assert "steps with adversarial, gradient_norms, joint, r1, 0.50% of all" in in_words(quick)
    seen.clear()
    exact = plan.plan(config, "v5e:2x2", 1, "exact", "name")
    assert seen == [*often, rare] and exact["left_out"] == []


def test_planned_before(tmp_path, monkeypatch, capsys):
    """Kept by config, topology, effort and the compiler's flags; written to --json each time."""
    asked = []

    def made_up(config, topology, slices, effort, name, again):
        asked.append((config.num_steps, topology, effort))
        return summary([program()], CHIPS["v5e"], 4) | NAMES | {"programs": [], "effort": effort}

    monkeypatch.setattr(plan, "plan", made_up)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "plan.json"
    job = ("plan", "--config=configs/autoencoder.py:tiny", "--topology=v5e:2x2", f"--json={out}")
    for flags in (
        (),
        (),
        ("--config.num_steps=7",),
        ("--effort=exact",),
        ("--effort=exact", "--again"),
    ):
        out.unlink(missing_ok=True)
        assert cli.run([*job, *flags]) == 0
        assert json.loads(out.read_text())["fits"] is True
    assert len(asked) == 4 and len(set(asked)) == 3
    # XLA listens to these, too.
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_something=1")
    assert cli.run(list(job)) == 0 and len(asked) == 5
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", "") + " --xla_something=1")
    assert cli.run(list(job)) == 0 and len(asked) == 6
    said = capsys.readouterr().out
    assert said.count("planned before") == 1 and said.count("compute bounds it") == 7


def test_a_plan_is_kept_under_all_that_it_depends_on(monkeypatch):
    config = plan.configs.load_config("configs/autoencoder.py:tiny", [])
    asked = {"config": config, "job": "train", "topology": "v5e:2x2", "slices": 1}

    def kept(**changes):
        return plan._cache_file(**asked | {"effort": "quick"} | changes).name

    names = [
        kept(),
        kept(config=plan.configs.load_config("configs/autoencoder.py:tiny", ["num_steps=7"])),
        kept(job="animate"),
        kept(topology="v5e:2x4"),
        kept(slices=2),
        kept(effort="exact"),
    ]
    assert kept() == names[0]
    monkeypatch.setattr(plan, "code_sha256", lambda: "0" * 64)
    names.append(kept())
    monkeypatch.setattr(plan_cache, "package_version", lambda package: f"{package} 9.9")
    names.append(kept())
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("effort", "inside"), [("quick", ["O0", "O0"]), ("exact", ["O1", "O3"])])
def test_effort_is_that_of_one_program(effort, inside):
    """XLA's levels are others while a plan is compiled, and afterwards as they were, whatever happens."""
    names = ("jax_optimization_level", "jax_memory_fitting_level")

    def levels():
        return [getattr(jax.config, name) for name in names]

    def lower():
        seen.append(levels())
        raise RuntimeError("no program")

    def set_levels(values):
        for name, value in zip(names, values, strict=True):
            jax.config.update(name, value)

    before, seen = levels(), []
    try:
        set_levels(["O1", "O3"])
        with pytest.raises(RuntimeError, match="no program"):
            compiling.compiled(lower, "name", effort)
        assert seen == [inside] and levels() == ["O1", "O3"]
    finally:
        set_levels(before)


def planned(tmp_path, *flags, answer="fits"):
    """The plan for v5e:2x2 by the command line."""
    out = tmp_path / "plan.json"
    done = subprocess.run(
        [sys.executable, "-m", "dexportrait_jax", "plan", "--topology=v5e:2x2", *flags]
        + [f"--json={out}"],
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert answer in done.stdout and done.stderr == ""
    return json.loads(out.read_text())


# GiB of buffers a device, one beside the other, of `tiny` on four v5e chips, weights shared out, as libtpu 0.0.42.1
# says at a quick effort.
FROZEN_GIB = {
    "autoencoder": 0.284,
    "motion": 0.482,
    "animator_image": 0.294,
    "animator_video": 0.25,
}


@pytest.mark.xdist_group("memory")
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "stage",
    [
        pytest.param("autoencoder", marks=pytest.mark.slow),
        pytest.param("motion", marks=pytest.mark.exhaustive),
        pytest.param("animator_image", marks=pytest.mark.exhaustive),
        pytest.param("animator_video", marks=pytest.mark.exhaustive),
    ],
)
def test_program_for_chips_that_are_not_here(stage, tmp_path):
    """Compiled, not run: a stage's step on four chips, its memory as it was, and what stands in its plan."""
    pytest.importorskip("libtpu", reason="needs libtpu: pip install -e '.[tpu]'")
    sizes = ("data.batch_size=4", "mesh.data=1", "mesh.fsdp=4")
    flags = (f"--config.{size}" for size in sizes)
    found = planned(tmp_path, f"--config=configs/{stage}.py:tiny", *flags)
    assert set(KEYS) <= set(found) and found["compiled_not_run"]
    assert found["devices"] == found["mesh"]["fsdp"] == 4
    assert found["collectives"]["all-reduce"]["count"] >= 1
    assert found["recompute_overhead"] == 1.0
    assert 0.9 <= found["executed_overhead"] < 1.3
    assert found["programs"][0]["kernels_not_counted"] == []
    assert found["programs"][0]["loops_counted_once"] == []
    fullest = max(program["buffers_gib_per_device"] for program in found["programs"])
    assert fullest == pytest.approx(FROZEN_GIB[stage], rel=0.05)
    # At one time less is in use, but no less than the State and the batch.
    assert found["programs"][0]["argument_gib_per_device"] < found["hbm_gib_per_device"] < fullest
    if stage == "autoencoder":
        assert found["hbm_gib_per_device"] == pytest.approx(0.218, rel=0.05)


@pytest.mark.slow
def test_a_batch_that_no_chip_holds(tmp_path):
    """That it does not fit is an answer, and by how much: the command ends well and writes its file."""
    pytest.importorskip("libtpu", reason="needs libtpu: pip install -e '.[tpu]'")
    batch = "--config.data.batch_size=8000000"
    config = "--config=configs/autoencoder.py:tiny"
    found = planned(tmp_path, config, batch, "--config.mesh.data=4", answer="does not fit")
    assert found["fits"] is False and found["compiled_not_run"] and found["advice"]
    # A source and two targets of 64 x 64 bytes in three colours, before anything is computed.
    pictures = 8_000_000 / 4 * 3 * 64 * 64 * 3 / 2**30
    assert found["hbm_gib_per_device"] > pictures > found["hbm_limit_gib"] == 15.75


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_gradients_alone_cross_slices(tmp_path):
    """Two slices of four chips: every device gets its part of the gradient from the other slice, and some scalars."""
    pytest.importorskip("libtpu", reason="needs libtpu: pip install -e '.[tpu]'")
    # Features that fill a chip's tiles of 128: of narrower ones the filling is sent, too.
    changes = ["data.batch_size=8", "mesh.data=2", "mesh.fsdp=4"]
    changes += ["model.autoencoder.block_channels=(128,128,128)"]
    flags = [f"--config.{change}" for change in changes]
    found = planned(tmp_path, "--config=configs/autoencoder.py:tiny", "--slices=2", *flags)
    assert found["slices"] == 2 and found["devices"] == 8
    config = plan.configs.load_config("configs/autoencoder.py:tiny", changes)
    mesh = jax.sharding.AbstractMesh((2, 4, 1, 1), sharding.AXES)
    task = make_task(config)
    state, constants = abstract_state(task, config), task.abstract_constants()
    cut = whole = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(state["params"])[0]:
        spec = sharding.parameter_spec(sharding.path_name(path), leaf.shape, mesh)
        size = leaf.size * leaf.dtype.itemsize
        cut, whole = cut + (size if any(spec) else 0), whole + (0 if any(spec) else size)
    assert cut > 100 * whole
    # Of weights that every device has, the compiler sums some in parts and some as they are; they fill no tile.
    crossing = found["between_slices_bytes"]
    assert cut / 4 + whole / 4 <= crossing <= 1.05 * (cut / 4 + whole)
    # What a device is given: a quarter of the weights, of their averages and of both moments, and all that is constant.
    constant = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(constants))
    given = found["programs"][0]["argument_gib_per_device"] * 2**30
    assert given == pytest.approx(4 * (cut / 4 + whole) + constant, rel=0.1, abs=2**20)


def test_samples_are_made_beside_the_whole_state(monkeypatch):
    """4 GiB of which 3 are weights, beside the 6 of a step's State: 7 in all; the second time 17, where 15.75 fit."""
    config = plan.configs.load_config("configs/autoencoder.py:tiny", ["data.batch_size=8"])
    monkeypatch.setattr(plan.chips, "topology", lambda *_: (CHIPS["v5e"], jax.devices()))
    step, samples = (program(argument_gib_per_device=size) for size in (6.0, 3.0))
    monkeypatch.setattr(plan, "_step", lambda *_: lambda: dict(step))
    for needed, together in ((4.0, 7.0), (14.0, 17.0)):
        made = samples | {"events": ["evaluation"], "share": 0.0, "hbm_gib_per_device": needed}
        monkeypatch.setattr(plan, "_evaluation", lambda *_, made=made: lambda: dict(made))
        found = plan.plan(config, "v5e:2x4", 1, "quick", "name")
        assert [each["hbm_gib_per_device"] for each in found["programs"]] == [10.0, together]
        assert found["hbm_gib_per_device"] == max(10.0, together)
        assert found["fits"] == (together < 15.75)
    assert found["devices"] == 8 and found["batch"] == {"sources": 8, "targets": 2, "accumulate": 1}


def test_what_tensor_cuts_is_counted():
    """Of three matrices of one size that of queries alone, whatever fsdp cuts."""
    matrix = jax.ShapeDtypeStruct((256, 256), "float32")
    unet = {"attn1": {"to_q": {"kernel": matrix}, "other": {"kernel": matrix}}}
    task = types.SimpleNamespace(
        networks={
            "unet": types.SimpleNamespace(abstract=unet),
            "encoder": types.SimpleNamespace(abstract={"dense": {"kernel": matrix}}),
        }
    )
    for sizes, share in (((1, 2, 1, 2), 0.333), ((1, 4, 1, 1), 0.0)):
        mesh = jax.make_mesh(sizes, sharding.AXES, devices=jax.devices()[:4])
        assert plan._cut_by_tensor(task, mesh) == share


def test_programs_of_a_clip(monkeypatch):
    """The paper's guidance: 74 passes a window, the reference and its projections once; nothing has weights here."""
    config = plan.configs.load_config("configs/animator_video.py:tiny", ["sampling.steps=35"])
    kind, networks = model_kind(config)
    params = {group: network.abstract for group, network in networks.items()}
    frames, programs, kept = kind({"stage": config.stage}, config, networks, params).clip_programs(
        Sampling(hybrid_steps=5)
    )
    times = {each.name: each.times for each in programs}
    assert frames == config.data.frames and kept > 0
    assert times.pop("denoiser") + times.pop("bare denoiser") == 74
    assert (times.pop("decode"), times.pop("encode")) == (1, 2)  # the source is one more picture
    assert times == {"source": 1, "keys and values": 1, "warp": 1}
    monkeypatch.setattr(animator_inference, "WINDOW_CACHE_BYTES", 0)
    _, programs, _ = kind({"stage": config.stage}, config, networks, params).clip_programs(
        Sampling(hybrid_steps=5)
    )
    full = sum(each.times for each in programs if each.name == "denoiser")
    assert [each.times for each in programs if each.name == "warp"] == [full]


def test_memory_of_a_clip_is_that_of_all_weights(monkeypatch):
    """What a program takes beside its arguments comes on top of all groups, also of those it does not read."""
    config = plan.configs.load_config("configs/motion.py:tiny", [])
    monkeypatch.setattr(plan_clip.chips, "topology", lambda *_: (CHIPS["v5e"], jax.devices()))
    needs = program(hbm_gib_per_device=3.0, argument_gib_per_device=2.0, compile_seconds=1.0)
    needs = {name: needs[name] for name in needs if name not in ("share", "model_tflops")}
    answer = types.SimpleNamespace(result=lambda: dict(needs, collectives={}))
    monkeypatch.setattr(plan_clip.Compiler, "ask", lambda *_: answer)
    found = plan_clip.plan_clip(config, "v5e:2x2", 1, "quick", "name")
    weights = 4 * sum(found["params"].values()) / 2**30
    assert found["hbm_gib_per_device"] == pytest.approx(1 + weights)
    assert found["fits"] and found["devices"] == 1 and found["frames"] == 8
    # Two runs of the encoders, one of them for the source, and one of the generator.
    assert found["bound_step_seconds"] == pytest.approx(3 * 0.6)
    assert found["bound_seconds_per_frame"] == pytest.approx(3 * 0.6 / 8)
    said = in_words(found)
    assert "ms a frame" in said and "for 8 frames" in said
    # And what is kept for the clip between its programs.
    clip_programs = MotionModel.clip_programs
    monkeypatch.setattr(
        MotionModel, "clip_programs", lambda *given: (*clip_programs(*given)[:2], 2**29)
    )
    found = plan_clip.plan_clip(config, "v5e:2x2", 1, "quick", "name")
    assert found["hbm_gib_per_device"] == pytest.approx(1 + weights + 0.5)
    needs["hbm_gib_per_device"] = 17.75
    found = plan_clip.plan_clip(config, "v5e:2x2", 1, "quick", "name")
    assert not found["fits"] and "shorter windows" in in_words(found)


def test_a_clip_is_made_on_one_chip():
    config = plan.configs.load_config("configs/motion.py:tiny", [])
    with pytest.raises(UserError, match="--slices=2: --job=animate works on one chip"):
        plan_clip.plan_clip(config, "v5e:2x2", 2, "quick", "name")


def test_a_stage_without_clips():
    with pytest.raises(UserError, match="makes no clips"):
        plan_clip.plan_clip(
            plan.configs.load_config("configs/autoencoder.py:tiny", []), "v5e:2x2", 1, "quick", ""
        )


@pytest.mark.slow
def test_a_clip_for_a_chip_that_is_not_here(tmp_path):
    """Compiled, not run: a portrait by the motion trainer."""
    pytest.importorskip("libtpu", reason="needs libtpu: pip install -e '.[tpu]'")
    found = planned(tmp_path, "--config=configs/motion.py:tiny", "--job=animate")
    assert found["devices"] == 1 and found["job"] == "animate" and found["compiled_not_run"]
    assert [each["name"] for each in found["programs"]] == ["encode", "reenact"]
    assert 0.5 < found["executed_overhead"] < 3
