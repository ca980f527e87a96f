"""What leaves one process arrives in the other, or is named as what cannot travel."""

from __future__ import annotations

import collections
import enum
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from para_core.group.codec import ALIGNMENT, Untransportable, decode, encode, pack, packed_size, unpack

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.complex128,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.bool,
]

plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.uuids() | st.sampled_from(DTYPES)
keys = st.text() | st.integers() | st.booleans() | st.tuples(st.text(), st.integers())
values = st.recursive(
    plain | st.frozensets(st.integers()) | st.lists(st.integers(0, 9)).map(torch.Size),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(), inner, max_size=4)
        | st.dictionaries(keys, inner, max_size=4)
        | st.sets(st.text(), max_size=4)
    ),
    max_leaves=20,
)


def alike(one: Any, other: Any) -> bool:
    """Equal in type, order and bits, NaN and the sign of zero included."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and bits(one) == bits(other)
    if isinstance(one, float):
        return (math.isnan(one) and math.isnan(other)) or (one == other and math.copysign(1, one) == math.copysign(1, other))
    if isinstance(one, dict):
        return alike(list(one.items()), list(other.items()))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    return one == other


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Any bits, so that every value of the dtype occurs, NaNs too."""
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return raw.view(dtype).reshape(shape)


@given(values)
@settings(max_examples=300, deadline=None)
def test_plain_data_arrives_as_it_was_sent(value: Any) -> None:
    header, tensors = encode(value)
    assert tensors == []
    assert alike(decode(header, tensors), value)


@pytest.mark.parametrize("number", [np.float64(0.1), np.float32(0.5), np.int64(2**40), np.bool_(True), np.str_("name")])
def test_numpy_scalars_arrive_as_python_values(number: Any) -> None:
    assert alike(decode(*encode([number]))[0], number.item())


@given(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=4), st.integers(0, 9))
@settings(max_examples=100, deadline=None)
def test_tensors_arrive_in_their_places(dtype: torch.dtype, shape: list[int], seed: int) -> None:
    tensor = random_tensor(dtype, tuple(shape), seed)
    arrived = decode(*encode({"a": [tensor, 1], ("b", 2): (tensor + 1 if dtype == torch.int64 else tensor.clone(),)}))
    assert arrived["a"][0] is tensor
    assert arrived[("b", 2)][0] is not tensor


def test_a_tensor_held_twice_is_sent_once_and_arrives_as_one() -> None:
    shared, other = torch.arange(3), torch.arange(3)
    header, tensors = encode({"x": shared, "y": [shared, other]})
    assert len(tensors) == 2
    arrived = decode(header, [tensor.clone() for tensor in tensors])
    assert arrived["x"] is arrived["y"][0]
    assert arrived["x"] is not arrived["y"][1]


def test_a_parameter_arrives_as_a_tensor_without_gradient() -> None:
    header, tensors = encode([torch.nn.Parameter(torch.ones(2))])
    (arrived,) = unpack(*pack(tensors))
    assert not arrived.requires_grad and arrived.tolist() == [1, 1]
    assert decode(header, [arrived])[0] is arrived


def test_with_a_receivers_device_tensors_and_devices_go_where_they_were() -> None:
    value = {"cpu": torch.ones(2), "device": torch.device("cuda", 0), "home": torch.device("cpu")}
    header, tensors = encode(value)
    header = header.replace('"device":"cpu"}]', '"device":"accelerator"}]')  # as if the tensor had been on a GPU
    arrived = decode(header, tensors, device="meta")
    assert arrived["cpu"].device.type == arrived["device"].type == "meta"
    assert arrived["home"].type == "cpu"
    assert decode(*encode(value), device="meta")["cpu"].device.type == "cpu"


class Handle:
    def method(self) -> None: ...


class Colour(enum.StrEnum):
    RED = "red"


class Mapping(dict): ...


Pair = collections.namedtuple("Pair", "a b")


def attention_patch(q: Any, k: Any, v: Any) -> None: ...


@pytest.mark.parametrize(
    ("value", "path", "kind"),
    [
        (
            {"transformer_options": {"patches": {"attn1_patch": [attention_patch]}}},
            "transformer_options.patches.attn1_patch[0]",
            "attention_patch",
        ),
        ({"a": (1, {2: lambda: None})}, "a[1][2]", "<lambda>"),
        ({("double_block", 3): Handle()}, "[('double_block', 3)]", "Handle"),
        ({"with space": Handle().method}, "['with space']", "method"),
        ([Handle], "[0]", "Handle"),
        ({"o": collections.OrderedDict(a=1)}, "o", "collections.OrderedDict"),
        ({"o": Mapping(a=1)}, "o", "Mapping"),
        ({"p": Pair(1, 2)}, "p", "Pair"),
        ({"c": Colour.RED}, "c", "Colour"),
        ({"z": 1j}, "z", "complex"),
        ({"n": np.zeros(3)}, "n", "numpy.ndarray"),
        ({"n": np.datetime64("2024-01-01")}, "n", "datetime64"),
        ({Handle: 1}, "the key", "Handle"),
        (torch.zeros(3).to_sparse(), "the value", "sparse"),
        ([torch.zeros(3, device="meta")], "[0]", "meta"),
        (torch.nn.Linear(1, 1), "the value", "Linear"),
    ],
)
def test_what_cannot_travel_is_named_with_its_place(value: Any, path: str, kind: str) -> None:
    with pytest.raises(Untransportable) as raised:
        encode(value)
    assert path in str(raised.value) and kind in raised.value.type_name
    assert path in raised.value.path or not raised.value.path


def test_a_container_that_holds_itself_is_refused() -> None:
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(Untransportable, match="nested too deeply"):
        encode(circle)


def test_tensors_other_than_the_described_are_refused() -> None:
    header, (tensor,) = encode(torch.zeros(2, 3))
    for wrong in ([], [tensor, tensor], [tensor.t()], [tensor.double()]):
        with pytest.raises(ValueError):
            decode(header, wrong)


def test_a_header_cannot_name_anything_but_data() -> None:
    for body in ({"dtype": "load"}, {"dtype": "nn"}, {"eval": "1"}):
        with pytest.raises(ValueError):
            decode(json.dumps({"value": body, "tensors": []}), [])


tensors_of_a_step = st.lists(
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=4).map(tuple), st.integers(0, 99), st.booleans()), max_size=8
)


@given(tensors_of_a_step)
@settings(max_examples=200, deadline=None)
def test_tensors_of_any_dtype_shape_and_stride_survive_one_flat_buffer(specs: list[tuple[torch.dtype, tuple[int, ...], int, bool]]) -> None:
    tensors = [random_tensor(dtype, shape, seed) for dtype, shape, seed, _ in specs]
    tensors = [tensor.transpose(0, -1) if spec[3] and tensor.dim() > 1 else tensor for tensor, spec in zip(tensors, specs, strict=True)]
    buffer, layout = pack(tensors)
    assert buffer.dtype == torch.uint8 and buffer.dim() == 1
    layout = json.loads(json.dumps(layout))
    assert packed_size(layout) == buffer.numel()
    assert all(offset % ALIGNMENT == 0 for _, _, offset in layout)
    arrived = unpack(buffer.clone(), layout)
    assert all(map(alike, arrived, tensors))
    assert all(tensor.is_contiguous() for tensor in arrived)


def test_views_of_all_kinds_are_packed_by_value() -> None:
    base = torch.arange(24.0).reshape(2, 3, 4)
    views = [
        base[:, ::2],
        base.expand(5, 2, 3, 4),
        torch.tensor(0.5).expand(1),
        torch.tensor(0.5).expand(1, 1, 1),
        base[1, 1, 1],
        base.flip(0),
        torch.complex(base, base).conj(),
        base.to(torch.float16).mT,
    ]
    for arrived, view in zip(unpack(*pack(views)), views, strict=True):
        assert torch.equal(arrived, view)


def test_a_layout_can_be_had_without_data() -> None:
    shapes = [(torch.bfloat16, (3, 5)), (torch.float8_e4m3fn, (7,)), (torch.float32, ())]
    _, planned = pack([torch.empty(shape, dtype=dtype, device="meta") for dtype, shape in shapes])
    _, packed = pack([random_tensor(dtype, shape) for dtype, shape in shapes])
    assert planned == packed
