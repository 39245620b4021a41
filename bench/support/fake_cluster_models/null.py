"""The model test/null. Importing it replaces the server's Ray cluster with fake GPUs, so that only the head works."""

import server.components
from bench.support.fake_cluster import NullRayCluster
from tests.support.fake_models import NullEngine, NullModel

server.components.RayCluster = lambda *_: NullRayCluster()  # type: ignore[attr-defined, assignment]

MODEL = NullModel("test/null", NullEngine)
