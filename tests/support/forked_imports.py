"""The imports of the process from which `forking` forks programs."""

import gc
from importlib import import_module

from server import library_env

gc.disable()
library_env.disable_telemetry_and_warnings()
library_env.set_pytorch_variables()
for _name in ("models.flux.loader", "server.cli.serve"):
    import_module(_name)
# Forked processes then leave the memory of these objects shared.
gc.freeze()
