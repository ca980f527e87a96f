"""Stand-ins for torchvision and torchaudio, importable but not usable.

ComfyUI imports both at start-up for features that no test here touches, and builds of them that match the pinned
torch are gigabytes of CUDA. The finder below answers `import torchvision.anything` with an empty module whose
attributes exist, so imports succeed; calling one says plainly what it is. Installed packages always win, because the
finder stands last in `sys.meta_path`.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types

NAMES = ("torchvision", "torchaudio")


class _AnyAttribute(type):
    """Metaclass for stand-in classes: constants looked up on the class exist too."""

    def __getattr__(cls, name: str) -> _StandIn:
        if name.startswith("__"):
            raise AttributeError(name)
        return _StandIn()


class _StandIn(metaclass=_AnyAttribute):
    """What every attribute of a stand-in module is, or derives from."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __getattr__(self, name: str) -> _StandIn:
        if name.startswith("__"):
            raise AttributeError(name)
        return _StandIn()

    def __call__(self, *args: object, **kwargs: object) -> None:
        raise NotImplementedError("torchvision and torchaudio are only stand-ins in the test environment")


class _StandInModule(types.ModuleType):
    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        submodule = sys.modules.get(f"{self.__name__}.{name}")
        if submodule is not None:
            return submodule
        return type(name, (_StandIn,), {}) if name[:1].isupper() else _StandIn()


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] not in NAMES:
            return None
        # `importlib.util.find_spec` is how libraries ask whether a package is installed: it is not.
        if sys._getframe(2).f_globals.get("__name__") == "importlib.util":
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec):
        module = _StandInModule(spec.name)
        module.__version__ = "0.0.0"
        return module

    def exec_module(self, module):
        pass


def install() -> None:
    """Offer the stand-ins to this interpreter; a second call changes nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
