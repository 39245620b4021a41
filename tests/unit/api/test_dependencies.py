"""Tests of the functions that routes share."""

import pytest

from server.api.dependencies import require_owned_job
from server.errors import NotFound
from tests.support.components import Components, submission


@pytest.mark.parametrize(
    ("endpoint", "app"),
    [
        ("fal-ai/flux-lora", "fal-ai/flux-lora"),
        ("fal-ai/flux-lora", "fal-ai/flux-lora/stream"),
        ("fal-ai/flux/dev", "fal-ai/flux"),
        ("me/lemon/stream", "me/lemon/stream"),
        ("me/lemon/stream", "me/lemon"),
    ],
)
def test_a_job_is_found_under_its_endpoint(components: Components, endpoint: str, app: str) -> None:
    job = components.queue.submit(submission(endpoint=endpoint))
    assert require_owned_job(job, job.owner, app) is job


@pytest.mark.parametrize("app", ["fal-ai/flux", "fal-ai/flux-lora/streams", "fal-ai/flux-lora/stream/stream"])
def test_a_job_is_not_found_under_another_endpoint(components: Components, app: str) -> None:
    job = components.queue.submit(submission(endpoint="fal-ai/flux-lora"))
    with pytest.raises(NotFound):
        require_owned_job(job, job.owner, app)
