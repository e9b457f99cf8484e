"""What tests of both methods in a diffusers UNet share."""

from __future__ import annotations

from typing import Any

import pytest

from tests.tiny.diffusers_unet import CONFIGS, diffusers_unet


@pytest.fixture(params=CONFIGS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def unet() -> Any:
    return diffusers_unet("sd15")
