"""Nested plain data as JSON and raw tensors, so that nothing is ever unpickled.

``encode`` and ``decode`` carry a value between processes; ``pack`` and ``unpack`` lay its tensors into one flat buffer, so
that one broadcast carries all of them.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any

import torch

ALIGNMENT = 16  # bytes; the largest element (complex128) and what vectorised kernels expect

# Deep enough for any options dictionary; only a container that holds itself gets there.
_MAX_DEPTH = 64

Layout = list[tuple[str, list[int], int]]
"""One entry a tensor: dtype name, shape, offset in bytes. Survives JSON (tuples come back as lists)."""


class Untransportable(TypeError):
    """A value that is not plain data, such as a function.

    ``path`` says where it sits (``transformer_options.patches.attn1_patch[0]``), ``type_name`` what it is.
    """

    def __init__(self, path: str, type_name: str):
        super().__init__(f"{path or 'the value'} is a {type_name}, which cannot be sent to another process")
        self.path = path
        self.type_name = type_name


def encode(value: Any) -> tuple[str, list[torch.Tensor]]:
    """Split ``value`` into a JSON header and the tensors in it, each tensor object once.

    Takes None, bool, int, float, str, bytes, list, tuple, set, frozenset, dict (keys of any hashable kind of these), strided
    tensors on any device, torch.dtype, torch.Size, torch.device, uuid.UUID, and numpy scalars (which arrive as Python
    numbers). Raises ``Untransportable`` for anything else, subclasses included: what arrives is what was sent.
    """
    encoder = _Encoder()
    body = encoder.encode(value, "", 0)
    records = [
        {"dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape), "device": _device_kind(tensor.device)}
        for tensor in encoder.tensors
    ]
    return json.dumps({"value": body, "tensors": records}, separators=(",", ":")), encoder.tensors


def decode(header: str | bytes, tensors: Sequence[torch.Tensor], device: torch.device | str | None = None) -> Any:
    """Undo ``encode``: the value with ``tensors`` (same order, dtypes and shapes) put back in.

    Tensors stay where they are unless ``device``, the receiver's accelerator, is given: then those that the sender had on
    its CPU are moved to the CPU and the others to ``device``, and a ``torch.device`` in the value becomes ``device`` unless
    it was the CPU. Raises ``ValueError`` if the tensors are not those that the header describes.
    """
    message = json.loads(header)
    records = message["tensors"]
    if len(records) != len(tensors):
        raise ValueError(f"the header describes {len(records)} tensors, {len(tensors)} came")
    placed = []
    for record, tensor in zip(records, tensors, strict=True):
        if record["shape"] != list(tensor.shape) or record["dtype"] != dtype_name(tensor.dtype):
            raise ValueError(f"a tensor of {tensor.dtype} {list(tensor.shape)} came instead of {record['dtype']} {record['shape']}")
        if device is not None:
            tensor = tensor.to(device if record["device"] == "accelerator" else "cpu")
        placed.append(tensor)
    return _decode(message["value"], placed, device)


def pack(tensors: Sequence[torch.Tensor], device: torch.device | str | None = None) -> tuple[torch.Tensor, Layout]:
    """Copy tensors of any dtype, shape, stride and device into one flat uint8 buffer on ``device``.

    ``device`` defaults to the first tensor's (the CPU if there is none). Each tensor starts at a multiple of ``ALIGNMENT``.
    """
    if device is None:
        device = tensors[0].device if tensors else "cpu"
    layout = laid_out(tensors)
    return filled(tensors, layout, device), layout


def laid_out(tensors: Sequence[torch.Tensor]) -> Layout:
    """Where ``pack`` puts them."""
    layout: Layout = []
    end = 0
    for tensor in tensors:
        start = -(-end // ALIGNMENT) * ALIGNMENT
        layout.append((dtype_name(tensor.dtype), list(tensor.shape), start))
        end = start + tensor.numel() * tensor.element_size()
    return layout


def filled(tensors: Sequence[torch.Tensor], layout: Layout, device: torch.device | str) -> torch.Tensor:
    """The buffer on ``device`` with the tensors in their places."""
    buffer = torch.empty(packed_size(layout), dtype=torch.uint8, device=device)
    for tensor, (_, _, start) in zip(tensors, layout, strict=True):
        data = as_bytes(tensor)
        buffer[start : start + data.numel()].copy_(data)
    return buffer


def unpack(buffer: torch.Tensor, layout: Sequence[Sequence[Any]], device: torch.device | str | None = None) -> list[torch.Tensor]:
    """The tensors that ``pack`` laid into ``buffer``, as contiguous views of it, or of one copy of it on ``device``."""
    if device is not None:
        buffer = buffer.to(device)
    tensors = []
    for name, shape, start in layout:
        dtype = dtype_named(name)
        size = torch.Size(shape).numel() * dtype.itemsize
        tensors.append(buffer[start : start + size].view(dtype).view(shape))
    return tensors


def packed_size(layout: Sequence[Sequence[Any]]) -> int:
    """Bytes of the buffer that ``layout`` describes, for a receiver to allocate."""
    if not layout:
        return 0
    name, shape, start = layout[-1]
    return start + torch.Size(shape).numel() * dtype_named(name).itemsize


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's elements as flat uint8; a view if it is contiguous."""
    plain = tensor.dtype.is_floating_point and not tensor.is_neg() and not tensor.requires_grad
    if plain and tensor.dim() == 1 and tensor.numel() > 1 and tensor.is_contiguous():
        return tensor.view(torch.uint8)  # quickly: two messages a block are of this kind
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1)
    # one expanded element counts as contiguous and keeps its stride of 0, which a view in bytes does not take
    return flat if flat.dtype == torch.uint8 else flat.as_strided(flat.shape, (1,)).view(torch.uint8)


def dtype_name(dtype: torch.dtype) -> str:
    """Such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    """Undo ``dtype_name``. Raises ``ValueError`` if this torch has no such dtype."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"this torch has no dtype {name!r}")
    return dtype


def _device_kind(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else "accelerator"


class _Encoder:
    """Collects tensors while it turns values into JSON: what JSON lacks becomes an object with a tag as its only key."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self._index: dict[int, int] = {}

    def encode(self, value: Any, path: str, depth: int) -> Any:
        kind = type(value)
        if value is None or kind in (bool, int, float, str):
            return value
        if depth > _MAX_DEPTH:
            raise Untransportable(path, "container nested too deeply")
        if kind is list:
            return self._items(value, path, depth)
        if kind is dict:
            return self._mapping(value, path, depth)
        if kind in (tuple, set, frozenset):
            return {kind.__name__: self._items(value, path, depth)}
        if kind in (torch.Tensor, torch.nn.Parameter):
            return {"tensor": self._tensor(value, path)}
        if kind is torch.Size:
            return {"size": list(value)}
        if kind is torch.dtype:
            return {"dtype": dtype_name(value)}
        if kind is torch.device:
            return {"device": _device_kind(value)}
        if kind is uuid.UUID:
            return {"uuid": value.hex}
        if kind is bytes:
            return {"bytes": value.hex()}
        if kind.__module__ == "numpy" and getattr(value, "shape", None) == ():
            number = value.item()
            if type(number) in (bool, int, float, str):
                return number
        raise Untransportable(path, _describe(value))

    def _items(self, values: Any, path: str, depth: int) -> list:
        return [self.encode(value, f"{path}[{position}]", depth + 1) for position, value in enumerate(values)]

    def _mapping(self, mapping: dict, path: str, depth: int) -> dict:
        if all(type(key) is str for key in mapping):
            return {"dict": {key: self.encode(value, _below(path, key), depth + 1) for key, value in mapping.items()}}
        pairs = []
        for key, value in mapping.items():
            below = _below(path, key)
            pairs.append([self.encode(key, f"{below} (the key)", depth + 1), self.encode(value, below, depth + 1)])
        return {"pairs": pairs}

    def _tensor(self, tensor: torch.Tensor, path: str) -> int:
        if tensor.layout != torch.strided or tensor.device.type == "meta" or tensor.is_quantized:
            raise Untransportable(path, f"{tensor.layout} tensor on {tensor.device}")
        index = self._index.get(id(tensor))
        if index is None:
            index = self._index[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)
        return index


def _below(path: str, key: Any) -> str:
    if isinstance(key, str) and key.isidentifier():
        return f"{path}.{key}" if path else key
    return f"{path}[{key!r}]"


def _describe(value: Any) -> str:
    """What to call an object that cannot travel: its own name if it has one, else its type's."""
    name = getattr(value, "__qualname__", None)
    kind = type(value)
    if isinstance(name, str):
        return f"{kind.__name__} {getattr(value, '__module__', None) or '?'}.{name}"
    return f"{kind.__module__}.{kind.__qualname__}"


def _decode(body: Any, tensors: Sequence[torch.Tensor], device: torch.device | str | None) -> Any:
    if isinstance(body, list):
        return [_decode(item, tensors, device) for item in body]
    if not isinstance(body, dict):
        return body
    ((tag, content),) = body.items()
    match tag:
        case "dict":
            return {key: _decode(item, tensors, device) for key, item in content.items()}
        case "pairs":
            return {_decode(key, tensors, device): _decode(item, tensors, device) for key, item in content}
        case "tuple":
            return tuple(_decode(content, tensors, device))
        case "set":
            return set(_decode(content, tensors, device))
        case "frozenset":
            return frozenset(_decode(content, tensors, device))
        case "tensor":
            return tensors[content]
        case "size":
            return torch.Size(content)
        case "dtype":
            return dtype_named(content)
        case "device":
            return torch.device("cpu" if content == "cpu" or device is None else device)
        case "uuid":
            return uuid.UUID(hex=content)
        case "bytes":
            return bytes.fromhex(content)
    raise ValueError(f"unknown tag {tag!r} in a message header")
