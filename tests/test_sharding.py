"""Where parameters and batches go, on eight devices."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from dexportrait_jax import sharding
from dexportrait_jax.errors import UserError


def mesh(data=1, fsdp=1, context=1, tensor=1, rows=None):
    return sharding.make_mesh(
        ConfigDict(dict(data=data, fsdp=fsdp, context=context, tensor=tensor)), rows=rows
    )


def test_minus_one_takes_what_is_left():
    assert dict(mesh(data=-1, fsdp=4).shape) == {"data": 2, "fsdp": 4, "context": 1, "tensor": 1}


@pytest.mark.parametrize(
    ("sizes", "rows", "found"),
    [
        ({"data": -1}, 8, (8, 1)),
        ({"data": -1}, 4, (4, 1)),
        ({"data": -1}, 2, (2, 1)),
        ({"data": -1}, 1, (1, 1)),
        ({"data": -1}, 12, (6, 1)),
        ({"data": -1, "fsdp": 2}, 4, (2, 2)),
        ({"data": -1, "fsdp": 3}, 6, (2, 3)),
        ({"data": 2, "fsdp": -1}, 4, (2, 2)),
    ],
)
def test_minus_one_takes_no_more_than_can_share_the_batch(sizes, rows, found):
    placed = mesh(**sizes, rows=rows)
    assert (placed.shape["data"], placed.shape["fsdp"]) == found
    assert list(placed.devices.flat) == jax.devices()[: found[0] * found[1]]


def test_explicit_sizes_stay_strict():
    with pytest.raises(UserError, match="does not fit 8 devices"):
        mesh(data=4, rows=4)


def test_a_mesh_that_does_not_fit_is_an_error():
    with pytest.raises(UserError, match="does not fit 8 devices"):
        mesh(data=3)


@dataclasses.dataclass(frozen=True)
class Device:
    """Of two hosts with four each, which XLA calls slices."""

    id: int
    platform: str
    device_kind: str = "a kind without a known grid"

    @property
    def process_index(self):
        return self.id // 4

    slice_index = process_index


def two_hosts(platform, **sizes):
    axes = ConfigDict({axis: sizes.get(axis, 1) for axis in sharding.AXES})
    return sharding.make_mesh(axes, [Device(number, platform) for number in range(8)])


@pytest.mark.parametrize("platform", ["gpu", "cpu"])
@pytest.mark.parametrize(
    "sizes",
    [{"fsdp": 8}, {"context": 8}, {"data": 1, "fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 4}],
)
def test_any_axis_crosses_hosts_of_gpus(platform, sizes):
    """In the order of the hosts, so that the devices of one lie side by side."""
    found = two_hosts(platform, **sizes)
    assert [device.id for device in found.devices.flat] == list(range(8))
    assert dict(found.shape) == dict.fromkeys(sharding.AXES, 1) | sizes


def test_only_data_crosses_slices_of_tpus():
    with pytest.raises(UserError, match="data=1 cannot be shared by 2 slices"):
        two_hosts("tpu", fsdp=8)


@pytest.mark.parametrize(
    ("sizes", "rows"),
    [
        ({"data": 8}, []),
        ({"fsdp": 2, "context": 4}, []),
        ({"fsdp": 1, "context": 8}, list(range(16))),
        ({"data": 2, "tensor": 4}, []),
        ({"context": 2, "tensor": 4}, list(range(16))),
    ],
)
def test_sources_that_several_processes_bring(sizes, rows):
    assert sharding.rows_of_several_processes(two_hosts("cpu", **sizes), 16) == rows


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("params/g/conv/kernel", (3, 3, 64, 256), (None, None, None, "fsdp")),
        ("params/g/conv/kernel", (3, 3, 512, 255), (None, None, "fsdp", None)),
        ("params/g/conv/bias", (256,), (None,)),
        ("opt/denoise/tx/1/mu/denoiser/attn1/to_q/kernel", (320, 320), ("fsdp", "tensor")),
        ("params/denoiser/attn1/to_out/0/kernel", (320, 320), ("tensor", "fsdp")),
        ("params/g/odd/kernel", (333, 333), (None, None)),
    ],
)
def test_parameter_rule(path, shape, spec):
    found = sharding.parameter_spec(path, shape, mesh(fsdp=4, tensor=2))
    assert found == PartitionSpec(*spec)


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((3, 3, 64, 256), (None, None, None, ("fsdp", "context"))),
        ((3, 3, 66, 260), (None, None, "context", "fsdp")),  # 260 goes into 4 parts, not into 8
        ((260, 65), ("fsdp", None)),
        ((130, 129), ("context", None)),
        ((256,), (None,)),
    ],
)
def test_devices_that_share_targets_share_the_weights_too(shape, spec):
    found = sharding.parameter_spec("params/g/kernel", shape, mesh(fsdp=4, context=2))
    assert found == PartitionSpec(*spec)


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((3, 3, 64, 256), (None, None, None, "fsdp")),
        ((3, 3, 66, 260), (None, None, None, "fsdp")),
        ((130, 129), (None, None)),
    ],
)
def test_weights_are_whole_over_context_while_they_are_used(shape, spec, monkeypatch):
    monkeypatch.setattr(sharding, "LARGEST_WHOLE", 1000)
    weights = {"g": {"kernel": jax.ShapeDtypeStruct(shape, "float32")}}
    places = sharding.shardings_in_use(weights, mesh(fsdp=4, context=2))
    assert places["g"]["kernel"].spec == PartitionSpec(*spec)


def test_a_small_network_is_whole_but_for_its_heads_while_it_is_used(monkeypatch):
    kernel = jax.ShapeDtypeStruct((256, 512), "float32")
    groups = {
        "small": {"to_q": {"kernel": kernel}},
        "large": {"to_q": {"kernel": kernel}, "more": {"kernel": kernel}},
    }
    monkeypatch.setattr(sharding, "LARGEST_WHOLE", 256 * 512)
    on = mesh(fsdp=2, context=2, tensor=2)
    assert sharding.parameter_spec("small/to_q/kernel", (256, 512), on) == PartitionSpec(
        ("fsdp", "context"), "tensor"
    )
    places = sharding.shardings_in_use(groups, on)
    assert places["small"]["to_q"]["kernel"].spec == PartitionSpec(None, "tensor")
    assert places["large"]["to_q"]["kernel"].spec == PartitionSpec(("fsdp",), "tensor")


def test_frames_go_over_context():
    where = sharding.batch_shardings({"source_image": 0, "target_image": 0}, mesh(2, 2, 2))
    assert where["source_image"].spec == PartitionSpec(("data", "fsdp"))
    assert where["target_image"].spec == PartitionSpec(("data", "fsdp"), "context")


def test_put_batch_is_the_batch():
    batch = {"target_image": np.arange(8 * 2 * 3, dtype=np.uint8).reshape(8, 2, 3)}
    on = mesh(2, 2, 2)
    assert sharding.rows_of_process(on, 8) == list(range(8))
    placed = sharding.put_batch(batch, on, 8, range(8))["target_image"]
    np.testing.assert_array_equal(np.asarray(jax.device_get(placed)), batch["target_image"])
    assert len({shard.device for shard in placed.addressable_shards}) == 8
