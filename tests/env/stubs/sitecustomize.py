"""Runs at interpreter start when this folder is on PYTHONPATH: offers the stand-ins for torchvision and torchaudio."""

import standins

standins.install()
