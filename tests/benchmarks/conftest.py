import pytest

from lib import devices


@pytest.fixture(params=["cpu", "dry-run"])
def device(request):
    return devices.device_named(request.param)
