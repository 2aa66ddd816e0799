"""The mesh's own metrics: which series exist, and for how long."""

from hypothesis import given
from hypothesis import strategies as st

from mesh.observability.metrics import Metrics
from mesh.observability.modelmesh_metrics import PodFigures

FIGURES = PodFigures(0, 0, 0, 0, 0, 0, 0, 0, is_leader=False)
OLD, NEW = "org/m__0123456789", "org/m__9876543210"


def lines(metrics: Metrics, *registered: str) -> list[str]:
    text = metrics.text(FIGURES, lambda name: name in registered).decode()
    return [line for line in text.splitlines() if not line.startswith("#") and "org/m" in line]


def test_metrics_versions_of_a_model_share_its_series() -> None:
    metrics = Metrics()
    for model_id in (OLD, NEW):
        metrics.request(model_id, "grpc", "OK", "Generate", 0.01)
        metrics.first_byte(model_id, 0.01)
    shown = lines(metrics, "org/m")
    assert 'repertory_mesh_requests_total{carrier="grpc",code="OK",model_name="org/m"} 2.0' in shown
    assert 'repertory_mesh_time_to_first_byte_seconds_count{model_name="org/m"} 2.0' in shown


def test_metrics_series_of_a_model_end_with_its_registration_and_last_request() -> None:
    metrics = Metrics()
    metrics.request(OLD, "grpc", "OK", "Generate", 0.01)
    metrics.in_flight(NEW, +1)
    assert lines(metrics)
    metrics.in_flight(NEW, -1)
    assert lines(metrics) == []


@given(st.lists(st.integers(0, 150), max_size=4))
def test_metrics_show_every_request_that_has_ended(between_scrapes: list[int]) -> None:
    metrics, total = Metrics(), 0
    for count in between_scrapes:
        for _ in range(count):
            metrics.first_byte(NEW, 0.01)
            metrics.invoked("Generate", "OK", 0.01)
            metrics.request(NEW, "grpc", "OK", "Generate", 0.01, key="team")
        total += count
        text = metrics.text(FIGURES, lambda _: True).decode()
        for series in (
            'repertory_mesh_requests_total{carrier="grpc",code="OK",model_name="org/m"}',
            'repertory_mesh_key_requests_total{carrier="grpc",code="OK",key="team"}',
            'repertory_mesh_time_to_first_byte_seconds_count{model_name="org/m"}',
            'modelmesh_api_request_milliseconds_count{code="OK",method="Generate"}',
            'modelmesh_invoke_model_milliseconds_count{code="OK",method="Generate"}',
        ):
            assert (f"{series} {total}.0" in text.splitlines()) == (total > 0)
