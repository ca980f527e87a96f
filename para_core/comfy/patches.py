"""Patches of other nodes where ranks share a forward: their code exists in ComfyUI's process only, and runs there.

Stock model code calls patches at the same places on every rank, because sidecars get stand-ins under the same names. A
call is then made together: whole tokens are brought to the first rank, the patch runs there as it would without a
split, and what it returned, or wrote into its arguments, is handed out. That is exact whatever a patch does. What
travels is data (which names have patches, how many), never code.

Before the first block, and between blocks where tokens are whole on every rank, arguments are the same everywhere; inside
a block each rank has its rows. A patch that replaces a block may call it as often as it likes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch

from ..group.codec import Untransportable, encode
from ..group.tell import hear, tell
from ..plans.plan import Blocks
from ..sequence.cut import TokenError
from ..sequence.first import collect, hand_out, whole_slice
from ..sequence.hooks import Forward, Hooks
from .calls import BEFORE, title

Marks = dict[str, dict[str, Any]]
PLAIN = (type(None), bool, int, float, str)
# called inside blocks: the token tensors among the arguments where they come by position, where they come in a dictionary
INSIDE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "attn1_patch": (("q", "k", "v"), ("x", "q", "k")),
    "attn1_output_patch": (("out",), ()),
    "attn2_patch": (("q",), ("x",)),
    "mlp_patch": ((), ("x",)),
}


def marks(options: Mapping[str, Any]) -> Marks:
    """The names under which ``options`` holds patches, as plain data."""
    patches = {name: sum(map(callable, held)) for name, held in (options.get("patches") or {}).items()}
    replaced = list((options.get("patches_replace") or {}).get("dit", ()))
    return {name: held for name, held in (("patches", patches), ("replaced", {"dit": replaced} if replaced else {})) if held}


def mixes(options: Mapping[str, Any]) -> bool:
    """Whether patches may look at all tokens between blocks."""
    found = marks(options)
    return "replaced" in found or any(name not in BEFORE and name not in INSIDE for name in found.get("patches", ()))


class Together:
    """The patches of one run on one rank. ``hooks`` say where in the forward a call is made."""

    def __init__(self, hooks: Hooks):
        self.hooks = hooks

    def lead(self, options: dict[str, Any]) -> dict[str, Any]:
        """On the first rank: options whose patches wait for the other ranks."""
        patches = {
            name: [Patch(self, name, function) if callable(function) else function for function in held]
            for name, held in (options.get("patches") or {}).items()
        }
        replaced = dict(options.get("patches_replace") or {})
        if "dit" in replaced:
            replaced["dit"] = {place: Replacement(self, place, function) for place, function in replaced["dit"].items()}
        return {**options, **({"patches": patches} if patches else {}), **({"patches_replace": replaced} if replaced else {})}

    def follow(self, options: dict[str, Any], found: Marks) -> dict[str, Any]:
        """On the others: options with a stand-in for every patch that the first rank has."""
        patches = {name: [Patch(self, name, None) for _ in range(count)] for name, count in found.get("patches", {}).items()}
        replaced = {kind: {place: Replacement(self, place, None) for place in places} for kind, places in found.get("replaced", {}).items()}
        return {**options, **({"patches": patches} if patches else {}), **({"patches_replace": replaced} if replaced else {})}


class Patch:
    """One patch, or its stand-in (``function`` None)."""

    def __init__(self, together: Together, name: str, function: Callable | None):
        self.hooks, self.name, self.function = together.hooks, name, function

    def __call__(self, *args, **kwargs):
        forward = self.hooks.forward
        if forward is None or forward.over or forward.mesh.sequence.size == 1:
            return self._run(*args, **kwargs)
        if forward.inside is not None:
            return self._inside(forward, forward.inside, args, kwargs)
        if forward.sharded and not forward.whole >= self.hooks.plan.segments:
            raise TokenError(f"a {self.name} patch is called where tokens are not whole")
        return self._outside(forward, args, kwargs)

    def _run(self, *args, **kwargs):
        assert self.function is not None, "only the first rank is ever alone"
        with self.hooks.alone():
            return self.function(*args, **kwargs)

    def _outside(self, forward: Forward, args: tuple, kwargs: dict[str, Any]):
        """Arguments are whole, and the same, on every rank."""
        comm = forward.mesh.sequence
        shared = Shared(_named(args, kwargs), watch=comm.rank == 0)
        if comm.rank:
            return shared.read(hear(comm, shared.device), "result")
        result = self._run(*args, **kwargs)
        tell(comm, shared.message("result", result), shared.device)
        return result

    def _inside(self, forward: Forward, spec: Blocks, args: tuple, kwargs: dict[str, Any]):
        """Token arguments hold this rank's rows of the attended sequence."""
        cut, comm = forward.cut, forward.mesh.sequence
        if self.name not in INSIDE or not spec.joints:
            raise TokenError(f"a {self.name} patch is called inside a block, where its arguments are not known")
        form = isinstance(args[0], dict)
        names = INSIDE[self.name][form]
        given = dict(args[0]) if form else {**dict(zip(names, args, strict=False)), **kwargs}
        segments = spec.joints[0][0]

        def place(tensor: torch.Tensor) -> dict[str, Any]:
            """Which dim counts rows: (B, H, S, D) by position, (B, S, H, D) or (B, S, C) else; a grid as its blocks have it."""
            grid = tensor.ndim == 5
            return {"dim": spec.dim if grid else 2 if tensor.ndim == 4 and not form else 1, "attended": not grid}

        whole = {name: collect(cut, comm, given[name], segments, **place(given[name])) for name in names}
        changes: dict[str, torch.Tensor] = {}
        if comm.rank == 0:
            before = {name: tensor.clone() for name, tensor in whole.items() if tensor is not None}
            found = self._whole_call(forward, segments, args, kwargs, form, names, whole)
            for name, tensor in found.items():
                if tensor.shape != before[name].shape or tensor.dtype != before[name].dtype:
                    raise TokenError(f"{title(self.function)} changes the number of tokens or their type")
                if not torch.equal(tensor, before[name]):
                    changes[name] = tensor
        device = given[names[0]].device
        flags = torch.tensor([name in changes for name in names], dtype=torch.uint8, device=device)
        comm.broadcast(flags)
        local = {
            name: hand_out(cut, comm, changes.get(name), given[name], segments, **place(given[name]))
            for name, changed in zip(names, flags.tolist(), strict=True)
            if changed
        }
        if self.name in ("attn1_patch", "attn2_patch") and not form:
            return local
        if self.name == "mlp_patch":
            return {**given, **local}
        return local.get(names[0], given[names[0]])

    def _whole_call(
        self,
        forward: Forward,
        segments: tuple[str, ...],
        args: tuple,
        kwargs: dict[str, Any],
        form: bool,
        names: tuple[str, ...],
        whole: dict[str, torch.Tensor | None],
    ) -> dict[str, torch.Tensor]:
        """The patch's results by name, from whole tensors and whole tables. Stock code reads one, or q, k and v."""
        cut = forward.cut
        other = {name: cut.source(value) for name, value in (args[0] if form else kwargs).items() if name not in whole}
        options = other.get("transformer_options") or other.get("extra_options") or (args[-1] if isinstance(args[-1], dict) else {})
        with whole_slice(options, cut, segments, self.hooks.plan.streams[0]):
            if form:
                result = self._run({**args[0], **whole, **other})
            else:
                result = self._run(*whole.values(), *args[len(names) :], **other)
        if isinstance(result, torch.Tensor):
            return {names[0]: result}
        changed = [name for name, value in result.items() if name not in whole and value is not other.get(name) and value is not None]
        if changed and not form:
            raise TokenError(f"{title(self.function)} changes {', '.join(changed)} of an attention call")
        return {name: result.get(name, tensor) for name, tensor in whole.items() if tensor is not None}


class Replacement:
    """What stands for a whole block, or its stand-in (``function`` None), which runs the block whenever the first rank does."""

    def __init__(self, together: Together, place: Hashable, function: Callable | None):
        self.hooks, self.place, self.function = together.hooks, place, function

    def __call__(self, args: dict[str, Any], extra: dict[str, Any]):
        forward = self.hooks.forward
        if forward is None or forward.over or forward.mesh.sequence.size == 1:
            assert self.function is not None, "only the first rank is ever alone"
            return self.function(args, extra)
        if forward.inside is not None or forward.sharded and not forward.whole >= self.hooks.plan.segments:
            raise TokenError(f"the block {self.place} is replaced where tokens are not whole")
        comm, block = forward.mesh.sequence, extra["original_block"]
        shared = Shared(args, watch=comm.rank == 0)

        def together(given: dict[str, Any]):
            self.hooks.forward = forward
            try:
                result = block(given)
            finally:
                self.hooks.forward = None
            shared.ran(result)
            return result

        def original(given: dict[str, Any]):
            tell(comm, shared.message("run", given), shared.device)
            return together(given)

        with self.hooks.alone():
            if comm.rank == 0:
                assert self.function is not None
                result = self.function(args, {**extra, "original_block": original})
                tell(comm, shared.message("result", result), shared.device)
                return result
            while True:
                message = hear(comm, shared.device)
                if "result" in message:
                    return shared.read(message, "result")
                together(shared.read(message, "run"))


def _named(args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by name, those of dictionaries by their own."""
    found: dict[str, Any] = {}
    for place, value in enumerate(args):
        found.update(value if isinstance(value, dict) else {str(place): value})
    return {**found, **kwargs}


class Shared:
    """Values that every rank has, in one order, so that only what is new must travel, or was written into (``watch``)."""

    def __init__(self, values: dict[str, Any], *, watch: bool):
        self._watch = watch
        self._names = frozenset(values)
        self._values: list[Any] = []
        self._copies: dict[int, torch.Tensor] = {}
        self.add(values)
        self.device = next((value.device for value in self._values if isinstance(value, torch.Tensor)), torch.device("cpu"))

    def add(self, values: Any) -> None:
        for value in values.values() if isinstance(values, dict) else values if isinstance(values, (list, tuple)) else [values]:
            if self._watch and isinstance(value, torch.Tensor):
                self._copies[len(self._values)] = value.clone()
            self._values.append(value)

    def ran(self, result: Any) -> None:
        """All ranks have run a block, which may write into its arguments: the same everywhere."""
        for index, copy in self._copies.items():
            copy.copy_(self._values[index])
        self.add(result)

    def message(self, kind: str, value: Any) -> dict[str, Any]:
        """On the first rank. Raises Untransportable for what is new and no plain data."""
        changed = {}
        for index, copy in self._copies.items():
            tensor = self._values[index]
            if not torch.equal(tensor, copy):
                changed[index] = tensor
                copy.copy_(tensor)
        return {kind: self._pack(value), "changed": changed}

    def read(self, message: dict[str, Any], kind: str) -> Any:
        """On the others: the value of ``kind``, once what was written into tensors stands in this rank's as well."""
        for index, tensor in message["changed"].items():
            self._values[index].copy_(tensor)
        return self._unpack(message[kind])

    def _pack(self, value: Any) -> list:
        if not isinstance(value, PLAIN):
            for index, known in enumerate(self._values):
                if known is value:
                    return ["known", index]
        if type(value) is dict:
            return ["dict", {name: packed for name, item in value.items() if (packed := self._entry(name, item)) is not None}]
        if type(value) in (list, tuple):
            return [type(value).__name__, [self._pack(item) for item in value]]
        encode(value)
        return ["plain", value]

    def _entry(self, name: Any, value: Any) -> list | None:
        """None for what stock code never asked for and cannot travel."""
        try:
            return self._pack(value)
        except Untransportable:
            if name in self._names:
                raise
            return None

    def _unpack(self, packed: list) -> Any:
        kind, value = packed
        if kind == "known":
            return self._values[value]
        if kind == "dict":
            return {name: self._unpack(item) for name, item in value.items()}
        if kind in ("list", "tuple"):
            return [self._unpack(item) for item in value] if kind == "list" else tuple(map(self._unpack, value))
        return value
