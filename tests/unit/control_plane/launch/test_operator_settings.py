import pytest

from jackpot.control_plane.launch.operator_settings import OperatorSettings
from jackpot.errors import ConfigError


def test_by_default_each_job_has_a_bus_of_its_own_and_metrics_stay_on_loopback() -> None:
    operator_settings = OperatorSettings.from_env({})
    assert operator_settings == OperatorSettings(None, "") and operator_settings.bus_url_of("scorer") is None


def test_every_role_connects_under_its_own_name() -> None:
    operator_settings = OperatorSettings.from_env({"JACKPOT_BUS_URL": "redis://{role}:pw@valkey:6379/0"})
    assert operator_settings.bus_url_of("scorer") == "redis://scorer:pw@valkey:6379/0"
    assert operator_settings.bus_url_of("control-plane") == "redis://control-plane:pw@valkey:6379/0"


def test_over_tls_the_files_of_the_directory_are_used() -> None:
    variables = {"JACKPOT_BUS_URL": "rediss://{role}:pw@valkey/0", "JACKPOT_TLS_DIR": "/etc/jackpot/tls"}
    found = OperatorSettings.from_env(variables).bus_url_of("learner")
    assert found == "rediss://learner:pw@valkey/0?ssl_ca_certs=%2Fetc%2Fjackpot%2Ftls%2Fca.crt"


@pytest.mark.parametrize("host", ["platform:9090", "http://platform", "a b"])
def test_a_host_is_a_host(host: str) -> None:
    with pytest.raises(ConfigError, match="JACKPOT_METRICS_HOST"):
        OperatorSettings.from_env({"JACKPOT_METRICS_HOST": host})
